"""LSTM layers as ONNX: the LSTM operator where everything is dense, a Scan over time elsewhere.

Shapes as in :mod:`slimlstm.ops.weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods.storages import to_int8
from slimlstm.onnx.builder import OPSET, GraphBuilder, onnx_type, value_info
from slimlstm.ops.gates import ONNX, reordered
from slimlstm.ops.weights import Direction, Matrix, columns, is_clipped, rows


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


def add_layer(builder: GraphBuilder, directions: Sequence[Direction], ports: Ports, reverse: bool = False) -> None:
    """Add the nodes of a layer; the sizes of time and batch stay open.

    Weights stored in int8 stay so: the inputs are quantised in every step, and the products are of integers. Weights stored
    in bfloat16 are widened where they are used.

    Args:
        builder: takes the nodes and constants.
        directions: the weights. The second of two directions runs backward.
        ports: the names of inputs and outputs.
        reverse: whether a single direction runs backward.

    Raises:
        SlimLSTMError: weights of another dtype than float32 and float64.
        ImportError: onnx is not installed.
    """
    dtype = _dtype(directions)
    backward = [reverse] if len(directions) == 1 else [False, True]
    if all(_fits_operator(weights) for weights in directions):
        direction = "bidirectional" if len(directions) == 2 else "reverse" if reverse else "forward"
        _add_operator(builder, directions, ports, direction)
        return
    if not (ports.h0 and ports.c0):
        hidden, outputs = rows(directions[0].hh) // 4, columns(directions[0].hh)
        h0, c0 = (_zeros(builder, ports.x, len(directions), size, dtype) for size in (outputs, hidden))
        ports = ports._replace(h0=h0, c0=c0)
    is_active = _add_is_active(builder, ports.x, ports.lengths) if ports.lengths else ""
    ends: list[tuple[str, str, str]] = []
    for index, weights in enumerate(directions):
        number = builder.constant(torch.tensor(index))
        states = [builder.add("Gather", name, number, axis=0) for name in (ports.h0, ports.c0)]
        ends.append(_add_scan(builder, weights, ports.x, states, is_active, backward[index]))
    builder.add("Concat", *(y for y, _, _ in ends), to=ports.y, axis=2)
    axis = builder.constant(torch.tensor([0]))
    for which, name in ((1, ports.h), (2, ports.c)):
        parts = [builder.add("Unsqueeze", end[which], axis) for end in ends]
        builder.add("Concat", *parts, to=name, axis=0)


def layer_model(directions: Sequence[Direction]) -> Any:
    """Return an ONNX model of one layer, from x [T, B, I] and zero states to y [T, B, D P].

    Raises:
        SlimLSTMError: weights of another dtype than float32 and float64.
        ImportError: onnx is not installed.

    Examples:
        >>> from slimlstm import LowRankLSTM
        >>> model = layer_model(LowRankLSTM(3, 4, ranks={"weight_hh_l0": 2}).layers()[0])
        >>> sorted({node.op_type for node in model.graph.node} & {"LSTM", "Scan"})
        ['Scan']
    """
    import onnx
    from onnx import helper

    builder, dtype, first = GraphBuilder("layer"), _dtype(directions), directions[0]
    h, c = builder.names(2)
    add_layer(builder, directions, Ports("x", "", "", "y", h, c))
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


def _fits_operator(weights: Direction) -> bool:
    """Return whether ONNX's LSTM computes a direction from its weights as they are stored.

    The operator knows no factors or projections, and clips only gates. ONNX Runtime has it for float32 only.
    """
    is_dense = isinstance(weights.ih, Tensor) and isinstance(weights.hh, Tensor) and weights.hr is None
    is_dense = is_dense and not is_clipped([weights])
    return is_dense and _dtype([weights]) == torch.float32 and weights.ih_storage == weights.hh_storage == "float32"


def _dtype(directions: Sequence[Direction]) -> torch.dtype:
    hh = directions[0].hh
    dtype = (hh if isinstance(hh, Tensor) else hh[0]).dtype
    if dtype not in (torch.float32, torch.float64):
        raise SlimLSTMError(f"layers are written to ONNX in float32 or float64, not {dtype}; convert the model first")
    return dtype


def _zeros(builder: GraphBuilder, x: str, directions: int, width: int, dtype: torch.dtype) -> str:
    """Add zeros [D, B, width], with the batch size of x."""
    from onnx import helper

    batch = builder.size(x, 1)
    count, last = (builder.constant(torch.tensor([value])) for value in (directions, width))
    zero = helper.make_tensor("", onnx_type(dtype), [1], [0.0])
    return builder.add("ConstantOfShape", builder.add("Concat", count, batch, last, axis=0), value=zero)


def _add_is_active(builder: GraphBuilder, x: str, lengths: str) -> str:
    """Add bool [T, B, 1]: whether a sequence has that step."""
    first, one, two = (builder.constant(torch.tensor([number])) for number in (0, 1, 2))
    steps = builder.add("Squeeze", builder.size(x, 0))
    start, stride = (builder.constant(torch.tensor(number)) for number in (0, 1))
    at = builder.add("Unsqueeze", builder.add("Range", start, steps, stride), one)
    until = builder.add("Unsqueeze", builder.cast(lengths, torch.int64), first)
    return builder.add("Unsqueeze", builder.add("Less", at, until), two)


def _add_operator(builder: GraphBuilder, directions: Sequence[Direction], ports: Ports, direction: str) -> None:
    hidden = rows(directions[0].hh) // 4
    weights = [
        builder.once(directions, kind, lambda which=which: torch.stack([_in_onnx_order(one[which]) for one in directions]))
        for which, kind in enumerate(("W", "R"))
    ]
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


def _add_scan(
    builder: GraphBuilder, weights: Direction, x: str, states: list[str], is_active: str, reverse: bool
) -> tuple[str, str, str]:
    """Add one direction from states h0 [B, P] and c0 [B, H]; return the names of y [T, B, P], h and c.

    Where ``is_active`` [T, B, 1] is given and false, states stay, so the backward direction starts at a sequence's end.
    """
    gates = _add_product(builder, x, weights.ih, weights.ih_storage)
    biases = [bias for bias in (weights.bias_ih, weights.bias_hh) if bias is not None]
    if biases:
        gates = builder.add("Add", gates, builder.once(weights, "bias", lambda: torch.stack(biases).sum(0)))
    scanned = [gates, is_active] if is_active else [gates]
    last_h, last_c, y = builder.add_many(
        "Scan",
        [*states, *scanned],
        builder.names(3),
        body=_scan_body(builder, weights, has_lengths=bool(is_active)),
        num_scan_inputs=len(scanned),
        scan_input_directions=[int(reverse)] * len(scanned),
        scan_output_directions=[int(reverse)],
    )
    return y, last_h, last_c


def _scan_body(builder: GraphBuilder, weights: Direction, has_lengths: bool) -> Any:
    """Return the graph of one step, from h [B, P], c [B, H], the gates of x [B, 4H] and whether sequences are active."""
    from onnx import TensorProto, helper

    step, dtype = GraphBuilder(f"{builder.names(1)[0]}_step", builder), _dtype([weights])
    hidden, outputs = rows(weights.hh) // 4, columns(weights.hh)
    h, c, gates_of_x, h_next, c_next, y = step.names(6)
    new_h, new_c = _add_step(step, weights, h, c, gates_of_x)
    entries = [value_info(name, dtype, [None, n]) for name, n in ((h, outputs), (c, hidden), (gates_of_x, 4 * hidden))]
    if has_lengths:
        (is_active,) = step.names(1)
        entries.append(helper.make_tensor_value_info(is_active, TensorProto.BOOL, [None, 1]))
        step.add("Where", is_active, new_h, h, to=h_next)
        step.add("Where", is_active, new_c, c, to=c_next)
        step.add("Where", is_active, new_h, step.constant(torch.zeros((), dtype=dtype)), to=y)
    else:
        for name, output in ((new_h, h_next), (new_c, c_next), (new_h, y)):
            step.add("Identity", name, to=output)
    results = [value_info(name, dtype, [None, n]) for name, n in ((h_next, outputs), (c_next, hidden), (y, outputs))]
    return helper.make_graph(step.nodes, step.prefix, entries, results)


def _add_step(step: GraphBuilder, weights: Direction, h: str, c: str, gates_of_x: str) -> tuple[str, str]:
    """Add one step of the recurrence; return the names of the new h and c."""
    hidden = rows(weights.hh) // 4
    gates = step.add("Add", gates_of_x, _add_product(step, h, weights.hh, weights.hh_storage))
    sizes = step.constant(torch.full((4,), hidden))
    i, f, g, o = step.add_many("Split", [gates, sizes], step.names(4), axis=1)
    carried = step.add("Mul", step.add("Sigmoid", f), c)
    added = step.add("Mul", step.add("Sigmoid", i), step.add("Tanh", g))
    new_c = _add_clip(step, step.add("Add", carried, added), weights.cell_clip, weights)
    new_h = step.add("Mul", step.add("Sigmoid", o), step.add("Tanh", new_c))
    if weights.hr is not None:
        projected = _add_product(step, new_h, weights.hr, weights.hh_storage)
        new_h = _add_clip(step, projected, weights.proj_clip, weights)
    return new_h, new_c


def _add_clip(builder: GraphBuilder, x: str, bound: float | None, weights: Direction) -> str:
    if bound is None:
        return x
    limits = (torch.tensor(limit, dtype=_dtype([weights])) for limit in (-bound, bound))
    return builder.add("Clip", x, *(builder.constant(limit) for limit in limits))


def _add_product(builder: GraphBuilder, x: str, matrix: Matrix, storage: str) -> str:
    """Add x Wᵀ, or x Vᵀ Uᵀ, over the last axis."""
    for weight in (matrix,) if isinstance(matrix, Tensor) else reversed(matrix):
        x = _PRODUCTS.get(storage, _add_plain_product)(builder, x, weight)
    return x


def _add_plain_product(builder: GraphBuilder, x: str, weight: Tensor) -> str:
    return builder.add("MatMul", x, builder.once(weight, "plain", lambda: weight.T))


def _add_bfloat16_product(builder: GraphBuilder, x: str, weight: Tensor) -> str:
    return builder.add("MatMul", x, builder.cast(builder.once(weight, "bfloat16", weight.T.bfloat16)))


def _add_int8_product(builder: GraphBuilder, x: str, weight: Tensor) -> str:
    """Add a product of integers, with one scale for every row of inputs and one for every row of weights.

    DynamicQuantizeLinear would give all inputs one scale, whatever their time step and sequence.
    """
    magnitude = builder.largest(builder.add("Abs", x))
    least = builder.constant(torch.tensor(torch.finfo(torch.float32).tiny))
    scale = builder.add("Max", builder.add("Mul", magnitude, builder.constant(torch.tensor(1 / 127))), least)
    signed = builder.add("Round", builder.add("Div", x, scale))
    # Both sides are unsigned, which ONNX Runtime computes fast and exactly on every CPU. With signed weights it saturates
    # sums of two products at 16 bits on x86 without VNNI; with signed inputs it takes a slow path.
    quantized = builder.cast(builder.add("Add", signed, builder.constant(torch.tensor(128.0))), torch.uint8)
    zero = builder.constant(torch.tensor(128, dtype=torch.uint8))
    codes = builder.once(weight, "codes", lambda: _unsigned(to_int8(weight).codes.T))
    scales = builder.once(weight, "scales", lambda: _scales(weight))
    total = builder.cast(builder.add("MatMulInteger", quantized, codes, zero, zero))
    # ONNX Runtime would mistake a product of both scales for its own pattern, which has one scale for all inputs.
    return builder.add("Mul", builder.add("Mul", total, scale), scales)


_PRODUCTS = {"int8": _add_int8_product, "bfloat16": _add_bfloat16_product}


def _unsigned(integers: Tensor) -> Tensor:
    """Return int8 as uint8 with the zero point 128."""
    return (integers.short() + 128).to(torch.uint8)


def _scales(weight: Tensor) -> Tensor:
    scale = to_int8(weight).scale
    assert scale is not None  # noqa: S101 (int8 always has scales)
    return scale


def _in_onnx_order(weight: Any) -> Tensor:
    return reordered(weight.detach(), ONNX)
