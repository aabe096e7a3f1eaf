"""One LSTM layer as a Scan over time, whose body multiplies by factors and by integers as they are stored.

Shapes as in :mod:`slimlstm.ops.weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods.low_bit import GROUP
from slimlstm.methods.storages import storage_called, to_int8
from slimlstm.onnx.builder import SCALE, GraphBuilder, onnx_type, value_info
from slimlstm.ops.weights import Direction, Matrix, columns, parts_of, rows

_INTEGER = "int8 as integers"
"""The name of the storage of int8 weights that a Scan multiplies as integers."""


class End(NamedTuple):
    """The names of one direction's outputs: y [T, B, P], and the last states h [B, P] and c [B, H]."""

    y: str
    h: str
    c: str


def add_scans(
    builder: GraphBuilder,
    directions: Sequence[Direction],
    x: str,
    states: tuple[str, str],
    lengths: str,
    backward: Sequence[bool],
    is_integer: bool = True,
) -> list[End]:
    """Add a Scan for every direction.

    Args:
        builder: takes the nodes and constants.
        directions: the weights.
        x: the input [T, B, I].
        states: the first states h0 [D, B, P] and c0 [D, B, H]; "" for zeros.
        lengths: the lengths of the sequences, int32 [B]; "" where all have T steps.
        backward: whether each direction runs backward.
        is_integer: whether weights stored in int8 are multiplied as integers, by inputs that are rounded in every step;
            otherwise they are widened when the file is loaded.

    Returns:
        The names of the outputs of every direction.

    Raises:
        SlimLSTMError: the weights are neither float32 nor float64.
    """
    if is_integer:
        directions = [_as_integers(weights) for weights in directions]
    hidden, outputs, dtype = rows(directions[0].hh) // 4, columns(directions[0].hh), dtype_of(directions)
    given = [
        name or _zeros(builder, x, len(directions), size, dtype)
        for name, size in zip(states, (outputs, hidden), strict=True)
    ]
    is_active = _add_is_active(builder, x, lengths) if lengths else ""
    ends: list[End] = []
    for index, weights in enumerate(directions):
        number = builder.constant(torch.tensor(index))
        first = [builder.add("Gather", name, number, axis=0) for name in given]
        ends.append(_add_scan(builder, weights, x, first, is_active, backward[index]))
    return ends


def _as_integers(weights: Direction) -> Direction:
    ih, hh = (_INTEGER if storage == "int8" else storage for storage in (weights.ih_storage, weights.hh_storage))
    return weights._replace(ih_storage=ih, hh_storage=hh)


def dtype_of(directions: Sequence[Direction]) -> torch.dtype:
    """Return the dtype of a layer's weights; see :func:`check_dtype` for the errors."""
    check_dtype(directions)
    return parts_of(directions[0].hh)[0].dtype


def check_dtype(directions: Sequence[Direction]) -> None:
    """Raise :class:`SlimLSTMError` if a layer's weights are neither float32 nor float64."""
    dtype = parts_of(directions[0].hh)[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise SlimLSTMError(f"layers are written to ONNX in float32 or float64, not {dtype}; convert the model first")


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


def _add_scan(builder: GraphBuilder, weights: Direction, x: str, states: list[str], is_active: str, reverse: bool) -> End:
    """Add one direction from states h0 [B, P] and c0 [B, H]; return the names of y [T, B, P], h and c.

    Where ``is_active`` [T, B, 1] is false, states stay, so that the backward direction starts at the end of each sequence.
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
    return End(y, last_h, last_c)


def _scan_body(builder: GraphBuilder, weights: Direction, has_lengths: bool) -> Any:
    """Return the graph of one step, from h [B, P], c [B, H], the gates of x [B, 4H] and whether sequences are active."""
    from onnx import TensorProto, helper

    step, dtype = GraphBuilder(f"{builder.names(1)[0]}_step", builder), dtype_of([weights])
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
    limits = (torch.tensor(limit, dtype=dtype_of([weights])) for limit in (-bound, bound))
    return builder.add("Clip", x, *(builder.constant(limit) for limit in limits))


def _add_product(builder: GraphBuilder, x: str, matrix: Matrix, storage: str) -> str:
    """Add x Wᵀ, or x Vᵀ Uᵀ, over the last axis."""
    for weight in reversed(parts_of(matrix)):
        if storage == _INTEGER:
            x = _add_integer_product(builder, x, weight)
        else:
            x = _add_wide_product(builder, x, weight, storage)
    return x


def _add_wide_product(builder: GraphBuilder, x: str, weight: Tensor, storage: str) -> str:
    value = add_widened(builder, weight, storage)
    # ONNX Runtime packs the body's own constants only; folding this Transpose makes the weight one.
    return builder.add("MatMul", x, builder.add("Transpose", value, perm=[1, 0]))


def add_widened(builder: GraphBuilder, weight: Tensor, storage: str, outer: tuple[int, ...] = ()) -> str:
    """Add a weight [outer, m, n] as codes that are cast and scaled, which runtimes do once, when they load the file.

    A DequantizeLinear would not do: ONNX Runtime runs it at every call.
    """
    row, shape = storage_called(storage), (*outer, *weight.shape)
    if row.kernel_format == "float32":
        return builder.constant(weight.reshape(shape))
    encoded = row.encode(weight.detach())
    codes = encoded.codes.reshape(shape)
    value = builder.cast(builder.int4(codes) if row.scales == "group" else builder.constant(codes))
    if encoded.scale is None:
        return value
    if row.scales == "group":
        scales = builder.cast(builder.constant(encoded.scale.reshape(*outer, *encoded.scale.shape), SCALE))
        return builder.add("Mul", value, builder.add("Gather", scales, builder.constant(groups_of(weight)), axis=-1))
    return builder.add("Mul", value, builder.constant(encoded.scale.reshape(*outer, -1, 1), SCALE))


def groups_of(weight: Tensor) -> Tensor:
    """Return [n], the number of the group that each column of a weight [m, n] is in."""
    return torch.arange(weight.shape[-1]) // GROUP


def _add_integer_product(builder: GraphBuilder, x: str, weight: Tensor) -> str:
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
    codes = builder.add("Transpose", builder.once(weight, "codes", lambda: _unsigned(to_int8(weight).codes)), perm=[1, 0])
    scales = builder.shared(weight, "scales", lambda: builder.constant(_scales(weight), SCALE))
    total = builder.cast(builder.add("MatMulInteger", quantized, codes, zero, zero))
    # ONNX Runtime would mistake a product of both scales for its own pattern, which has one scale for all inputs.
    return builder.add("Mul", builder.add("Mul", total, scale), scales)


def _unsigned(integers: Tensor) -> Tensor:
    """Return int8 as uint8 with the zero point 128."""
    return (integers.short() + 128).to(torch.uint8)


def _scales(weight: Tensor) -> Tensor:
    scale = to_int8(weight).scale
    assert scale is not None  # noqa: S101 (int8 always has scales)
    return scale
