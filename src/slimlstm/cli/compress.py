"""``slimlstm compress``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimlstm.cli.options import (
    Allocation,
    Bytes,
    Energy,
    Force,
    Form,
    InputFile,
    Json,
    Keep,
    Method,
    Part,
    Rank,
    ReportPage,
    Request,
    SiteFilter,
    Storage,
    Targets,
    check_report,
)
from slimlstm.cli.output import show
from slimlstm.errors import SlimLSTMError
from slimlstm.files import check_not_input

if TYPE_CHECKING:
    from slimlstm.pipeline.report import Report

USE_OF_ONNX = """import onnxruntime

session = onnxruntime.InferenceSession({!r})
outputs = session.run(None, inputs)  # the same inputs and outputs as before
"""
USE_OF_FOLDER = """import slimlstm as sl

model = sl.load({!r}, MyModel())  # into a fresh, dense model
"""
_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def command(
    file: InputFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write; for an ONNX file, the ONNX file to write.")
    ],
    method: Method = "svd",
    rank: Rank = None,
    keep: Keep = None,
    bytes_: Bytes = None,
    energy: Energy = None,
    allocation: Allocation = None,
    target: Targets = "both",
    site_filter: SiteFilter = None,
    storage: Storage = None,
    part: Part = None,
    batches: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="<path>",
            help="An .npz file of an ONNX file's inputs, by name, the first axis for runs; may be repeated.",
        ),
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="<path>",
            help="Compare the outputs of both ONNX files on these inputs, given as for --batches; by default random ones.",
        ),
    ] = None,
    also: Annotated[
        str | None,
        typer.Option(
            metavar="<kinds>",
            help="Also store an ONNX file's other weights in int8: linear, conv, embedding, or several with commas.",
        ),
    ] = None,
    form: Form = "auto",
    page: ReportPage = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compress the LSTMs of a weight file or an ONNX file.

    A weight file becomes a folder for slimlstm.load, an ONNX file another ONNX file. Outputs that exist need --force.
    """
    request = Request(method, rank, keep, target, storage, bytes_, energy, allocation, site_filter)
    _check_output(file, output, force)
    check_report(page, force)
    to_onnx = output.suffix.lower() == ".onnx"
    options = _OnnxOptions(batches, inputs, also, form)
    if to_onnx:
        if part is not None:
            raise SlimLSTMError("--part names a state dict of a PyTorch checkpoint; an ONNX file has no parts")
        report, difference = _to_onnx(file, output, request, options)
        use = f"any ONNX runtime reads it. {difference['difference_note']}"
    else:
        options.check_unused()
        report, difference = _to_folder(file, output, request, part), dict[str, Any]()
        use = f"slimlstm.load({str(output)!r}, model) loads it into the model."
    if page is not None:
        usage = (USE_OF_ONNX if to_onnx else USE_OF_FOLDER).format(str(output))
        report.to_html(page, title=f"{file.name}, compressed", usage=usage, files=(*_input_files(file), output))
        use += f" The report is in {page}."
    show(report.to_dict() | difference, as_json, report, f"Written to {output}; {use}")


def _input_files(file: Path) -> list[Path]:
    """Return the file, and the files in which an ONNX file stores its weights."""
    if file.suffix.lower() != ".onnx":
        return [file]
    from slimlstm.onnx.reading import files_of

    return files_of(file)


@dataclass(frozen=True)
class _OnnxOptions:
    """Options that only ONNX files take."""

    batches: list[Path] | None
    inputs: list[Path] | None
    also: str | None
    form: str

    def check_unused(self) -> None:
        """Raise :class:`SlimLSTMError` if one was given."""
        into_another = "compress an ONNX file into another, with -o small.onnx"
        if self.batches:
            raise SlimLSTMError(f"--batches are inputs of an ONNX file; {into_another}")
        if self.inputs:
            raise SlimLSTMError("--inputs compares two ONNX files; a weight file has no outputs")
        if self.form != "auto":
            raise SlimLSTMError(f"--form says what LSTMs of an ONNX file become; {into_another}")
        if self.also:
            raise SlimLSTMError("--also is for ONNX files; in a PyTorch model, quantise other layers after slimlstm.load")


def _to_folder(file: Path, output: Path, request: Request, part: str | None) -> Report:
    """Compress a weight file, and return the report."""
    from slimlstm.weight_files import compress_file

    config = request.configuration()
    request.check_needs_no_data("in Python, compress_ takes batches with the model that reads them")
    return compress_file(file, config, output, storage=request.storage_of_masked(), part=part)


def _to_onnx(file: Path, output: Path, request: Request, options: _OnnxOptions) -> tuple[Report, dict[str, Any]]:
    """Compress an ONNX file; return the report, and how much the outputs of both files differ."""
    from slimlstm.methods import Needs
    from slimlstm.onnx.calibrate import read_batches
    from slimlstm.onnx.compress import compress_onnx
    from slimlstm.onnx.difference import output_difference
    from slimlstm.pipeline.plan import calibration_needs

    config, batches, inputs, also = request.configuration(), options.batches, options.inputs, options.also
    if request.storage_of_masked():
        raise SlimLSTMError("prune takes no --storage for an ONNX file; compress the result again, with --storage alone")
    if not batches:
        request.check_needs_no_data("give inputs of the file as --batches")
    if batches and calibration_needs(config) == Needs.NOTHING and not also:
        raise SlimLSTMError("--batches calibrate, which neither this method nor this storage needs; leave them out")
    runs = [run for path in batches for run in read_batches(path)] if batches else None
    compared = [run for path in inputs for run in read_batches(path)] if inputs else None
    if compared:
        output_difference(file, file, compared[:1])  # Inputs that do not fit are refused before anything is written.
    kinds = [kind.strip() for kind in also.split(",")] if also else []
    report = compress_onnx(file, config, output, batches=runs, also=kinds, form=options.form)
    return report, _difference(file, output, compared)


def _difference(file: Path, output: Path, runs: list[Any] | None) -> dict[str, Any]:
    """Return how much the outputs of both files differ, as a number and in words."""
    from slimlstm.onnx.difference import output_difference

    try:
        found = output_difference(file, output, runs)
    except SlimLSTMError as error:
        return {"output_difference": None, "difference_note": f"Its outputs were not compared: {error}."}
    given = f"On {len(runs)} given runs" if runs else "On one run of random inputs"
    advice = "" if runs else "; --inputs compares on your own"
    note = f"{given}, its outputs differ from the outputs of {file} by {found:.2%} of their norm at most{advice}."
    return {"output_difference": found, "difference_note": note}


def _check_output(file: Path, output: Path, force: bool) -> None:
    """Refuse an output that would destroy the input, lose weights, or replace something without ``--force``."""
    is_onnx = file.suffix.lower() == ".onnx"
    check_not_input(file, output)
    if not is_onnx:
        from slimlstm.weight_files.compress import check_folder

        check_folder(file, output)
    if is_onnx and output.suffix.lower() != ".onnx":
        _check_that_nothing_is_lost(file, output)
    elif not is_onnx and output.suffix.lower() == ".onnx":
        raise SlimLSTMError(
            f"{file} holds weights without a model, so no ONNX file can be made of it; name a folder, such as "
            f"-o {output.stem}, load it with slimlstm.load, and write ONNX with slimlstm.export_onnx"
        )
    elif output.suffix.lower() in _WEIGHT_FILES:
        raise SlimLSTMError(f"{output} looks like a file, but the output is a folder; name one, such as -o {output.stem}")
    from slimlstm.folders import CONFIG

    taken = output if output.is_file() else output / CONFIG
    if taken.exists() and not force:
        raise SlimLSTMError(f"{output} exists; add --force to replace it, or name another output")


def _check_that_nothing_is_lost(file: Path, output: Path) -> None:
    """Refuse to write an ONNX file with weights outside LSTMs as a folder, which holds the LSTMs only."""
    from slimlstm.onnx.find import find_lstms
    from slimlstm.onnx.reading import read_model
    from slimlstm.onnx.sizes import count_in_lstms, count_numbers

    model = read_model(file)
    others = count_numbers(model) - count_in_lstms(find_lstms(model, file))
    if others > 0:
        raise SlimLSTMError(
            f"{file} has {others:,} weights outside its LSTMs, which a folder would not hold; name an ONNX file to write, "
            f"such as -o {output.name}.onnx"
        )
