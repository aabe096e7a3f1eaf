"""LSTM layers as ONNX: the LSTM operator, or a Scan over time.

The operator's weights are constants, or factors and integers that a runtime multiplies when it loads the file. Shapes as in
:mod:`slimlstm.ops.weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimlstm.onnx.builder import OPSET, GraphBuilder, value_info
from slimlstm.onnx.forms import LSTM, Form, choose_form
from slimlstm.onnx.scan import add_scans, add_widened, check_dtype, dtype_of
from slimlstm.ops.gates import ONNX, reordered
from slimlstm.ops.weights import Direction, Matrix, columns, rows


class Ports(NamedTuple):
    """The names of a layer's inputs and outputs.

    Attributes:
        x: the input [T, B, I].
        h0: the first hidden states [D, B, P]; "" for zeros, together with ``c0``.
        c0: the first cell states [D, B, H].
        y: the output [T, B, D P].
        h: the last hidden states [D, B, P].
        c: the last cell states [D, B, H].
        lengths: the lengths of the sequences, int32 [B], as ONNX's LSTM takes them; "" where all have T steps. Beyond a
            sequence's length y is zero, and the backward direction starts at that length.
    """

    x: str
    h0: str
    c0: str
    y: str
    h: str
    c: str
    lengths: str = ""


def add_layer(
    builder: GraphBuilder,
    directions: Sequence[Direction],
    ports: Ports,
    reverse: bool = False,
    form: str = "auto",
) -> Form:
    """Add the nodes of a layer; the sizes of time and batch stay open.

    Args:
        builder: takes the nodes and constants.
        directions: the weights. The second of two directions runs backward.
        ports: the names of inputs and outputs.
        reverse: whether a single direction runs backward.
        form: see :func:`slimlstm.onnx.forms.choose_form`.

    Returns:
        The form that the layer has in the file.

    Raises:
        SlimLSTMError: the weights are neither float32 nor float64, or ``form`` cannot compute the layer.
        ImportError: onnx is not installed.
    """
    check_dtype(directions)
    chosen = choose_form(directions, form)
    if chosen.name == LSTM:
        direction = "bidirectional" if len(directions) == 2 else "reverse" if reverse else "forward"
        _add_operator(builder, directions, ports, direction)
        return chosen
    backward = [reverse] if len(directions) == 1 else [False, True]
    ends = add_scans(builder, directions, ports.x, (ports.h0, ports.c0), ports.lengths, backward, chosen.is_integer)
    builder.add("Concat", *(end.y for end in ends), to=ports.y, axis=2)
    axis = builder.constant(torch.tensor([0]))
    for parts, name in (([end.h for end in ends], ports.h), ([end.c for end in ends], ports.c)):
        builder.add("Concat", *(builder.add("Unsqueeze", part, axis) for part in parts), to=name, axis=0)
    return chosen


def layer_model(directions: Sequence[Direction], form: str = "auto") -> Any:
    """Return an ONNX model of one layer, from x [T, B, I] and zero states to y [T, B, D P].

    Args:
        directions: the weights.
        form: see :func:`slimlstm.onnx.forms.choose_form`.

    Raises:
        SlimLSTMError: the weights are neither float32 nor float64, or ``form`` cannot compute the layer.
        ImportError: onnx is not installed.

    Examples:
        >>> from slimlstm import LowRankLSTM
        >>> model = layer_model(LowRankLSTM(3, 4, ranks={"weight_hh_l0": 2}).layers()[0], form="scan")
        >>> sorted({node.op_type for node in model.graph.node} & {"LSTM", "Scan"})
        ['Scan']
    """
    import onnx
    from onnx import helper

    builder, dtype, first = GraphBuilder("layer"), dtype_of(directions), directions[0]
    h, c = builder.names(2)
    add_layer(builder, directions, Ports("x", "", "", "y", h, c), form=form)
    graph = helper.make_graph(
        builder.nodes,
        "layer",
        [value_info("x", dtype, [None, None, columns(first.ih)])],
        [value_info("y", dtype, [None, None, len(directions) * columns(first.hh)])],
        builder.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _add_operator(builder: GraphBuilder, directions: Sequence[Direction], ports: Ports, direction: str) -> None:
    hidden = rows(directions[0].hh) // 4
    ih, hh = ([one.ih for one in directions], [one.hh for one in directions])
    storages = [one.ih_storage for one in directions], [one.hh_storage for one in directions]
    weights = (
        builder.shared(directions, "W", lambda: _add_operand(builder, ih, storages[0])),
        builder.shared(directions, "R", lambda: _add_operand(builder, hh, storages[1])),
    )
    bias = ""
    if directions[0].bias_ih is not None:
        biases = [(one.bias_ih, one.bias_hh) for one in directions]
        bias = builder.once(
            directions, "B", lambda: torch.stack([torch.cat([*map(_in_onnx_order, pair)]) for pair in biases])
        )
    (y,) = builder.names(1)
    inputs = [ports.x, *weights, bias, ports.lengths, ports.h0, ports.c0]
    builder.add_many("LSTM", inputs, [y, ports.h, ports.c], hidden_size=hidden, direction=direction)
    # y is [T, D, B, H].
    together = builder.add("Transpose", y, perm=[0, 2, 1, 3])
    builder.add("Reshape", together, builder.constant(torch.tensor([0, 0, -1])), to=ports.y)


def _add_operand(builder: GraphBuilder, matrices: Sequence[Matrix], storages: Sequence[str]) -> str:
    """Add W or R [D, 4H, n] of all directions; return its name."""
    if all(isinstance(matrix, Tensor) for matrix in matrices) and set(storages) == {"float32"}:
        return builder.constant(torch.stack([_in_onnx_order(matrix) for matrix in matrices]))
    parts = [_add_matrix(builder, *pair) for pair in zip(matrices, storages, strict=True)]
    return parts[0] if len(parts) == 1 else builder.add("Concat", *parts, axis=0)


def _add_matrix(builder: GraphBuilder, matrix: Matrix, storage: str) -> str:
    """Add the value [1, 4H, n] of one direction's matrix; return its name."""
    if isinstance(matrix, Tensor):
        return add_widened(builder, _in_onnx_order(matrix), storage, outer=(1,))
    u, v = _in_onnx_order(matrix[0]), matrix[1]
    return builder.add("MatMul", *(add_widened(builder, part, storage, outer=(1,)) for part in (u, v)))


def _in_onnx_order(weight: Any) -> Tensor:
    return reordered(weight.detach(), ONNX)
