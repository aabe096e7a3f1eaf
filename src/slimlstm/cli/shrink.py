"""``slimlstm shrink``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimlstm.cli.compress import USE_OF_ONNX
from slimlstm.cli.options import Force, Json, ReportPage, check_report
from slimlstm.cli.output import show
from slimlstm.errors import SlimLSTMError
from slimlstm.files import check_not_input


def command(
    file: Annotated[Path, typer.Argument(help="An .onnx file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    inputs: Annotated[
        list[Path],
        typer.Option(
            metavar="<path>", help="An .npz file of the file's inputs, by name, the first axis for runs; may be repeated."
        ),
    ],
    at_most: Annotated[
        str, typer.Option(help="How much the outputs may disagree with the file's, such as 1%, or a number from 0 to 1.")
    ] = "1%",
    measure: Annotated[
        str,
        typer.Option(
            help="argmax (the share of rows whose largest entry moves), cosine (1 - the cosine similarity) or noise (the "
            "squared difference over squared output); auto chooses by the outputs.",
        ),
    ] = "auto",
    evaluations: Annotated[int, typer.Option(help="How many files to measure at most.")] = 10,
    page: ReportPage = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make an ONNX file as small as its outputs allow.

    The last third of the runs is for measuring, the rest for calibration.
    """
    from slimlstm.onnx.calibrate import read_batches
    from slimlstm.onnx.reading import files_of
    from slimlstm.search.onnx_file import shrink_onnx

    if file.suffix.lower() != ".onnx":
        raise SlimLSTMError(
            f"{file} is no ONNX file by its name; use slimlstm compress for weights, or slimlstm.find_smallest in Python"
        )
    if output.suffix.lower() != ".onnx":
        raise SlimLSTMError(f"{output} is no name of an ONNX file; name one that ends in .onnx")
    check_not_input(file, output)
    if output.exists() and not force:
        raise SlimLSTMError(f"{output} exists; add --force to replace it, or name another output")
    check_report(page, force)
    runs = [run for path in inputs for run in read_batches(path)]
    limit = at_most if at_most.strip().endswith("%") else _number(at_most)
    found = shrink_onnx(file, output, runs, at_most=limit, measure=measure, evaluations=evaluations)
    ending = "Interrupted; the best so far is" if found.interrupted else "Written to"
    note = f"{ending} {output}; it has the inputs and outputs of {file.name}."
    if page is not None:
        usage = USE_OF_ONNX.format(str(output))
        found.report.to_html(
            page, title=f"{file.name}, compressed", trials=found, usage=usage, files=(*files_of(file), output)
        )
        note += f" The report is in {page}."
    show(found.to_dict(), as_json, found, note)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SlimLSTMError(f"--at-most is a share such as 1%, or a number from 0 to 1, not {text!r}") from None
