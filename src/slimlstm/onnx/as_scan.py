"""Turn an LSTM operator of a graph into Scans over time, whose steps multiply by factors or integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import Replacement
from slimlstm.onnx.builder import OLDEST_OPSET, GraphBuilder
from slimlstm.onnx.forms import LSTM, SCAN, Form, choose_form
from slimlstm.onnx.graph import OnnxLSTM, WeightLocation, attribute_of
from slimlstm.onnx.operators import peculiarity_of
from slimlstm.onnx.scan import add_scans
from slimlstm.ops.weights import Direction, parts_of

_LENGTHS, _H0, _C0 = 4, 5, 6
"""The positions of inputs of an LSTM operator."""


def form_of(lstm: OnnxLSTM, directions: Sequence[Direction], opset: int, form: str) -> Form:
    """Return the form that an operator gets.

    Args:
        lstm: the operator.
        directions: its new weights.
        opset: the file's opset.
        form: see :func:`slimlstm.onnx.forms.choose_form`.

    Raises:
        SlimLSTMError: ``form`` is unknown, or ``"scan"`` where a Scan cannot compute the operator.
    """
    obstacle = _obstacle(lstm, directions, opset)
    if obstacle and form == SCAN:
        raise SlimLSTMError(f"{lstm.name} cannot become a Scan, because {obstacle}; give form='lstm' or 'auto'")
    return Form(LSTM, obstacle) if obstacle and form == "auto" else choose_form(directions, form)


def directions_of(lstm: OnnxLSTM, new: Mapping[str, Replacement], storages: Mapping[str, str | None]) -> list[Direction]:
    """Return an operator's weights, direction by direction.

    Args:
        lstm: the operator.
        new: replacements of its matrices, by name; other matrices stay as they are.
        storages: the storage of every matrix, by name.
    """
    found: list[Direction] = []
    for direction in sorted({location.direction for location in lstm.locations}):
        own = [location for location in lstm.locations if location.direction == direction]
        ih, hh = sorted(own, key=lambda location: location.index)
        matrices = [_matrix(location, new.get(location.name)) for location in (ih, hh)]
        biases = [lstm.biases.get(location.name.replace("weight", "bias")) for location in (ih, hh)]
        kept = [storages[location.name] or "float32" for location in (ih, hh)]
        found.append(Direction(matrices[0], matrices[1], biases[0], biases[1], None, kept[0], kept[1]))
    return found


def _matrix(location: WeightLocation, new: Replacement | None) -> Any:
    return location.matrix if new is None else new.effective(location.matrix)


def add_operator_as_scans(builder: GraphBuilder, lstm: OnnxLSTM, directions: Sequence[Direction], is_integer: bool) -> None:
    """Add Scans with the outputs of an LSTM operator.

    Args:
        builder: takes the nodes and constants.
        lstm: the operator.
        directions: its weights.
        is_integer: see :func:`slimlstm.onnx.scan.add_scans`.
    """
    node = lstm.node
    lengths, h0, c0 = (node.input[at] if at < len(node.input) else "" for at in (_LENGTHS, _H0, _C0))
    is_reverse = attribute_of(node, "direction", b"forward") == b"reverse"
    backward = [is_reverse] if len(directions) == 1 else [False, True]
    ends = add_scans(builder, directions, node.input[0], (h0, c0), lengths, backward, is_integer)
    outputs = [*node.output, "", "", ""][:3]
    for output, parts, axis in zip(outputs, zip(*ends, strict=True), (1, 0, 0), strict=True):
        if output:
            at = builder.constant(torch.tensor([axis]))
            builder.add("Concat", *(builder.add("Unsqueeze", part, at) for part in parts), to=output, axis=axis)


def _obstacle(lstm: OnnxLSTM, directions: Sequence[Direction], opset: int) -> str:
    """Return why an operator cannot become a Scan; "" where it can."""
    if opset < OLDEST_OPSET:
        return f"the file's opset {opset} is older than {OLDEST_OPSET}"
    peculiarity = peculiarity_of(lstm.node) or ("a batch-first layout" if attribute_of(lstm.node, "layout", 0) else "")
    if peculiarity:
        return f"the operator has {peculiarity}"
    if lstm.has_computed_bias:
        return "its bias is no constant of the file"
    storages = {storage for one in directions for storage in (one.ih_storage, one.hh_storage)}
    other = sorted(storages - {"float32", "bfloat16", "int8", "int4"})
    if other:
        return f"Scans hold no {other[0]} weights"
    dtypes = {parts_of(matrix)[0].dtype for one in directions for matrix in (one.ih, one.hh)}
    return "" if dtypes == {torch.float32} else "its weights are not float32"
