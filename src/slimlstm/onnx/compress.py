"""``compress_onnx``: compress the LSTMs of an ONNX file, in operators that every runtime has.

An LSTM operator remains, with its states, lengths and attributes, and its weights become products of factors, which
runtimes multiply when they load the file. Where a Scan is predicted to be faster, the operator becomes a Scan, whose steps
multiply by the factors. In an LSTM that is written out in single operators, a product with a constant becomes two thin
products.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slimlstm.calibration.moments import Calibration
from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.files import path_of, replacing
from slimlstm.methods import Needs, Replacement
from slimlstm.modules.arguments import check_batches
from slimlstm.modules.modes import plain_defaults, plain_mode
from slimlstm.onnx.calibrate import RunInputs
from slimlstm.onnx.find import find_lstms
from slimlstm.onnx.forms import check_form
from slimlstm.onnx.graph import OnnxLSTM, graphs_of
from slimlstm.onnx.observe import GraphObserver
from slimlstm.onnx.others import check_kinds
from slimlstm.onnx.reading import LARGEST_FILE, check_onnx_output, read_model
from slimlstm.onnx.source import GraphSource
from slimlstm.ops.weights import Matrix, rebuilt
from slimlstm.pipeline.plan import Config, calibration_needs, check_config
from slimlstm.pipeline.report import Report
from slimlstm.pipeline.run import apply, check_smaller, solve
from slimlstm.progress import Progress, shown


@plain_mode()
@plain_defaults()
def compress_onnx(
    path: str | os.PathLike[str],
    config: Config,
    output: str | os.PathLike[str],
    *,
    batches: Iterable[RunInputs] | None = None,
    calibration: Calibration | None = None,
    refit: int | None = None,
    also: Collection[str] = (),
    form: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Compress the LSTMs of an ONNX file, nested graphs included, and write the result to another file.

    Everything else in the file stays, and so does its opset. LSTMs that share their weights are listed once, and still
    share them afterwards. An LSTM whose weights the file computes from its inputs stays as it is, and the report says so.

    Args:
        path: the file.
        config: see :func:`slimlstm.compress_`; the keys of sites begin with the names of nodes, as in
            ``"<node>.weight_hh_l0"``. The storage ``"int4"`` needs a file of opset 21 or later.
        output: the file to write, not ``path`` itself. An existing file is replaced after everything else has succeeded.
        batches: for each run a mapping from the names of inputs to NumPy arrays. Calibrated methods need batches and ONNX
            Runtime; with batches, rounding to fewer than 8 bits loses less.
        calibration: moments by site key, used instead of batches.
        refit: see :func:`slimlstm.compress_`; the mean squared change of the file's outputs decides which factors stay.
        also: weights outside LSTMs that become int8 by ONNX Runtime's own quantiser: any of ``"linear"`` (MatMul and Gemm),
            ``"conv"`` and ``"embedding"`` (tables that Gather reads). The report says by how much this changes the outputs,
            on the batches or on random inputs; a change of more than a tenth of their norm is an error.
        form: the form of LSTM operators in the result; see :func:`slimlstm.export_onnx`. Operators with clipping,
            peepholes, other activations or a computed bias, and operators of opsets before 13, stay operators.
        progress: called with a site's key and the fraction done; None draws a bar on a terminal.

    Returns:
        The report, with the form of every compressed operator; the model's bytes are the bytes of the file,
        including weights that it stores in other files.

    Raises:
        SlimLSTMError: the file is missing, damaged or holds no LSTM, a site cannot be compressed, nothing would get
            smaller, ``form="scan"`` cannot compute an operator, or onnx is not installed. Nothing is written then.
    """
    path, output = _checked_paths(path, output, batches, also, form)
    model = read_model(path)
    _check(model, path)
    is_inferable = not _shape_problem(model)
    lstms = find_lstms(model, path)
    problems = [lstm.problem for lstm in lstms if lstm.problem]
    repeatable = None if isinstance(batches, Iterator) else batches
    runs = list(repeatable) if also and repeatable is not None else None
    source = GraphSource(model, [lstm for lstm in lstms if lstm.locations], form, also, runs)
    if not source.sites():
        raise SlimLSTMError("; ".join([f"{path} holds no LSTM with constant weights", *problems]))
    check_config(config, source.sites())
    needs = calibration_needs(config)
    if batches is not None and calibration is None and needs > Needs.NOTHING:
        calibration = source.calibrate(batches, with_gradients=needs >= Needs.GRADIENTS)
    observer = None
    if repeatable is not None and needs > Needs.NOTHING and refit != 0:
        observer = GraphObserver(model, source.groups, repeatable)
    with shown("compressing", progress) as report_progress:
        solution = solve(
            source,
            config,
            calibration=calibration,
            observer=observer,
            refit_obstacle="it takes batches that can be iterated more than once",
            refit=refit,
            progress=report_progress,
        )
    check_smaller(solution)
    solution.notes += problems
    report = replace(apply(source, solution), forms={name: str(found) for name, found in source.forms.items()})
    _check_size(report, solution.replacements)
    _check_result(model, source, solution.replacements, output)
    if is_inferable and (problem := _shape_problem(model)):
        raise SlimLSTMError(f"the shapes in {output} would not fit each other: {problem}; this is a bug, report it")
    with replacing(output) as draft:
        draft.write_bytes(model.SerializeToString())
    return report


def _checked_paths(
    path: str | os.PathLike[str], output: str | os.PathLike[str], batches: object, also: Collection[str], form: str
) -> tuple[Path, Path]:
    """Return the paths of a call, or raise :class:`SlimLSTMError` if an argument cannot be used."""
    check_form(form)
    path = path_of(path, "path", "name an ONNX file; compress_ takes models")
    output = path_of(output, "output", "name the ONNX file to write")
    if batches is not None:
        check_batches(batches)
    check_kinds(also)
    check_onnx_output(path, output)
    return path, output


def _check_size(report: Report, replacements: Mapping[str, Replacement]) -> None:
    """Raise :class:`SlimLSTMError` if the file would not get smaller, unless matrices were pruned: zeros save no bytes."""
    before, after = report.model.bytes_before, report.model.bytes_after
    if after >= before and not any(found.mask is not None for found in replacements.values()):
        raise SlimLSTMError(
            f"the file would take {after:,} bytes, and takes {before:,} now: its weights are used elsewhere too, or hardly "
            "become smaller; give a lower rank"
        )


def _check(model: Any, path: Path) -> None:
    from onnx import checker

    if not model.graph.node:
        raise SlimLSTMError(f"{path} holds no graph; is it an ONNX file?")
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if version < 7:
        raise SlimLSTMError(f"{path} is of ONNX opset {version}, whose operators differ; convert it to 7 or later first")
    if model.ByteSize() > LARGEST_FILE:
        raise SlimLSTMError(f"{path} with its outside weights takes over 2 GiB, more than one ONNX file can hold")
    try:
        checker.check_model(_with_shapes(model))
    except Exception as error:  # classes of several libraries
        raise SlimLSTMError(f"{path} is no intact ONNX file: {reason_of(error)}") from error


def _with_shapes(model: Any) -> Any:
    """Return a copy without inputs and outputs of unknown rank, which runtimes accept and the checker does not."""
    copy = type(model)()
    copy.CopyFrom(model)
    for graph in graphs_of(copy.graph):
        for value in (*graph.input, *graph.output):
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
    return copy


def _shape_problem(model: Any) -> str:
    """Return what ONNX's shape inference finds wrong with a model; "" if nothing."""
    from onnx import shape_inference

    try:
        shape_inference.infer_shapes(model, strict_mode=True)
    except Exception as error:  # the classes of onnx's C++ code
        return reason_of(error)
    return ""


def _check_result(model: Any, source: GraphSource, replacements: Mapping[str, Replacement], output: Path) -> None:
    """Raise :class:`SlimLSTMError` unless the new model is valid and holds exactly the intended matrices."""
    _check(model, output)
    found = find_lstms(model, output)
    for group in source.groups:
        for lstm in group:
            now = _matrices(lstm, found, source.scans.get(lstm.name))
            for location in lstm.locations:
                new = replacements.get(f"{group[0].name}.{location.name}")
                expected = rebuilt(location.matrix if new is None else new.effective(location.matrix))
                matrix = now.get(location.name)
                if matrix is None or not torch.allclose(rebuilt(matrix), expected, rtol=1e-4, atol=1e-6):
                    raise SlimLSTMError(
                        f"{lstm.name}.{location.name} would not be right in {output}; this is a bug, report it"
                    )


def _matrices(lstm: OnnxLSTM, found: list[OnnxLSTM], scans: str | None) -> dict[str, Matrix]:
    """Return the matrices of an LSTM in the new model, by their old names; Scans may have replaced the operator."""
    if scans is None:
        return {one.name: one.matrix for same in found if same.name == lstm.name for one in same.locations}
    matrices: dict[str, Matrix] = {}
    directions = [one for one in found if one.node.name.startswith(scans)]
    endings = [one.name.removeprefix("weight_hh_l0") for one in lstm.locations if one.name.startswith("weight_hh")]
    for ending, one in zip(endings, directions, strict=True):
        matrices |= {f"{location.name}{ending}": location.matrix for location in one.locations}
    return matrices
