"""LSTM layers as ONNX: the LSTM operator where everything is dense, a Scan over time elsewhere.

Shapes as in :mod:`slimlstm.ops.weights`. ONNX orders gates i, o, f, c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods.storages import to_int8
from slimlstm.ops.gates import ONNX, reordered
from slimlstm.ops.weights import Direction, Matrix, columns, is_clipped, rows

OPSET = 18
_TYPES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.bfloat16: "BFLOAT16",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int64: "INT64",
}


class Ports(NamedTuple):
    """The names of what goes into a layer, x [T, B, I], h0 [D, B, P] and c0 [D, B, H], and of what comes out of it,
    y [T, B, D P], h [D, B, P] and c [D, B, H].

    Without names for both, the first states are zeros. ``lengths``, int32 [B], are those of the sequences where they
    differ, as ONNX's LSTM has them: y is zero from a sequence's end on, and the backward direction starts there.
    """

    x: str
    h0: str
    c0: str
    y: str
    h: str
    c: str
    lengths: str = ""


class Graph:
    """Nodes in the order they were added, and constants, each of which is kept once; names begin with ``prefix``.

    The graph of a step keeps its constants in that of its ``parent``, where all steps see them.
    """

    def __init__(self, prefix: str, parent: Graph | None = None) -> None:
        self.prefix, self.nodes, self._named = prefix, list[Any](), 0
        self.constants: list[Any] = [] if parent is None else parent.constants
        self._known: dict[tuple[int, str], tuple[object, str]] = {} if parent is None else parent._known

    def add(self, operator: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        """A node with one output, which is called ``to`` or has a new name; returns the name."""
        return self.add_many(operator, inputs, [to or self._name()], **attributes)[0]

    def add_many(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Sequence[str]:
        """A node with these outputs."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, outputs, name=self._name(), **attributes))
        return outputs

    def constant(self, value: Tensor) -> str:
        """An initializer with a new name, which is returned."""
        from onnx import TensorProto, helper

        name, value = self._name(), value.detach().cpu()
        content = value.flatten().contiguous().view(torch.uint8).numpy().tobytes()
        kind: int = getattr(TensorProto, _TYPES[value.dtype])
        self.constants.append(helper.make_tensor(name, kind, value.shape, content, raw=True))
        return name

    def once(self, owner: object, kind: str, make: Callable[[], Tensor]) -> str:
        """The constant of some kind that belongs to an object, made when it is first asked for."""
        key = id(owner), kind
        if key not in self._known:
            self._known[key] = owner, self.constant(make())  # as long as it is kept, no other has its id
        return self._known[key][1]

    def names(self, count: int) -> list[str]:
        """So many new names."""
        return [self._name() for _ in range(count)]

    def _name(self) -> str:
        self._named += 1
        return f"{self.prefix}_{self._named}"


def add_layer(graph: Graph, directions: Sequence[Direction], ports: Ports, reverse: bool = False) -> None:
    """Adds what computes a layer of one or two directions to a graph; sizes of time and batch are left open.

    Of two directions the second runs backward, of one if ``reverse`` says so.

    Weights stored in int8 stay so: inputs are quantised as they come, products are of integers. Those in bfloat16 are
    widened where they are used.

    Raises:
        SlimLSTMError: weights of another dtype than float32 and float64.
        ImportError: onnx is not installed.
    """
    dtype = _dtype(directions)
    backward = [reverse] if len(directions) == 1 else [False, True]
    if all(_is_plain(weights) for weights in directions):
        way = "bidirectional" if len(directions) == 2 else "reverse" if reverse else "forward"
        _add_operator(graph, directions, ports, way)
        return
    if not (ports.h0 and ports.c0):
        ports = ports._replace(h0=_zeros(graph, directions, ports.x, 0), c0=_zeros(graph, directions, ports.x, 1))
    going = _add_going(graph, ports.x, ports.lengths) if ports.lengths else ""
    ends: list[tuple[str, str, str]] = []
    for index, weights in enumerate(directions):
        number = graph.constant(torch.tensor(index))
        states = [graph.add("Gather", name, number, axis=0) for name in (ports.h0, ports.c0)]
        ends.append(_add_scan(graph, weights, ports.x, states, going, dtype, backward[index]))
    graph.add("Concat", *(y for y, _, _ in ends), to=ports.y, axis=2)
    axis = graph.constant(torch.tensor([0]))
    for which, name in ((1, ports.h), (2, ports.c)):
        parts = [graph.add("Unsqueeze", end[which], axis) for end in ends]
        graph.add("Concat", *parts, to=name, axis=0)


def layer_model(directions: Sequence[Direction]) -> Any:
    """A model of a layer alone, x [T, B, I] to y [T, B, D P], from zero states.

    Raises:
        SlimLSTMError, ImportError: as :func:`add_layer`.
    """
    import onnx
    from onnx import helper

    graph, dtype, first = Graph("layer"), _dtype(directions), directions[0]
    h, c = graph.names(2)
    add_layer(graph, directions, Ports("x", "", "", "y", h, c))
    made = helper.make_graph(
        graph.nodes,
        "layer",
        [_info("x", dtype, [None, None, columns(first.ih)])],
        [_info("y", dtype, [None, None, len(directions) * columns(first.hh)])],
        graph.constants,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _is_plain(weights: Direction) -> bool:
    """Whether ONNX's LSTM can compute it from weights as they are kept: it knows no factors or projections, and clips only
    gates.

    ONNX Runtime has it for float32 only.
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


def _zeros(graph: Graph, directions: Sequence[Direction], x: str, which: int) -> str:
    """The first h (0) or c (1) where none is given."""
    from onnx import TensorProto, helper

    hh = directions[0].hh
    size = (columns(hh), rows(hh) // 4)[which]
    batch = graph.add("Shape", x, start=1, end=2)
    count, width = (graph.constant(torch.tensor([value])) for value in (len(directions), size))
    zero = helper.make_tensor("", getattr(TensorProto, _TYPES[_dtype(directions)]), [1], [0.0])
    return graph.add("ConstantOfShape", graph.add("Concat", count, batch, width, axis=0), value=zero)


def _add_going(graph: Graph, x: str, lengths: str) -> str:
    """bool [T, B, 1]: whether a sequence has not ended."""
    first, one, two = (graph.constant(torch.tensor([number])) for number in (0, 1, 2))
    steps = graph.add("Squeeze", graph.add("Shape", x, start=0, end=1))
    start, stride = (graph.constant(torch.tensor(number)) for number in (0, 1))
    at = graph.add("Unsqueeze", graph.add("Range", start, steps, stride), one)
    until = graph.add("Unsqueeze", _cast(graph, lengths, torch.int64), first)
    return graph.add("Unsqueeze", graph.add("Less", at, until), two)


def _add_operator(graph: Graph, directions: Sequence[Direction], ports: Ports, direction: str) -> None:
    hidden = rows(directions[0].hh) // 4
    weights = [
        graph.once(directions, kind, lambda which=which: torch.stack([_in_onnx_order(one[which]) for one in directions]))
        for which, kind in enumerate(("W", "R"))
    ]
    bias = ""
    if directions[0].bias_ih is not None:
        biases = [(one.bias_ih, one.bias_hh) for one in directions]
        bias = graph.once(
            directions, "B", lambda: torch.stack([torch.cat([*map(_in_onnx_order, pair)]) for pair in biases])
        )
    (y,) = graph.names(1)
    inputs = [ports.x, *weights, bias, ports.lengths, ports.h0, ports.c0]
    graph.add_many("LSTM", inputs, [y, ports.h, ports.c], hidden_size=hidden, direction=direction)
    # [T, D, B, H]
    together = graph.add("Transpose", y, perm=[0, 2, 1, 3])
    graph.add("Reshape", together, graph.constant(torch.tensor([0, 0, -1])), to=ports.y)


def _add_clip(graph: Graph, x: str, bound: float | None, dtype: torch.dtype) -> str:
    if bound is None:
        return x
    return graph.add("Clip", x, *(graph.constant(torch.tensor(limit, dtype=dtype)) for limit in (-bound, bound)))


def _add_scan(
    graph: Graph, weights: Direction, x: str, states: list[str], going: str, dtype: torch.dtype, reverse: bool
) -> tuple[str, str, str]:
    """One direction from states h0 [B, P] and c0 [B, H]; the names of y [T, B, P], h and c.

    Where a sequence is not ``going`` on, [T, B, 1], its states stay; so the backward direction starts at its end.
    """
    from onnx import TensorProto, helper

    hidden, outputs = rows(weights.hh) // 4, columns(weights.hh)
    gates_of_x = _add_product(graph, x, weights.ih, weights.ih_storage)
    biases = [bias for bias in (weights.bias_ih, weights.bias_hh) if bias is not None]
    if biases:
        gates_of_x = graph.add("Add", gates_of_x, graph.once(weights, "bias", lambda: torch.stack(biases).sum(0)))
    step = Graph(f"{graph.names(1)[0]}_step", graph)
    h, c, at, h_next, c_next, y = step.names(6)
    gates = step.add("Add", at, _add_product(step, h, weights.hh, weights.hh_storage))
    parts = step.constant(torch.full((4,), hidden))
    i, f, g, o = step.add_many("Split", [gates, parts], step.names(4), axis=1)
    kept = step.add("Mul", step.add("Sigmoid", f), c)
    new = step.add("Mul", step.add("Sigmoid", i), step.add("Tanh", g))
    new_c = _add_clip(step, step.add("Add", kept, new), weights.cell_clip, dtype)
    out = step.add("Mul", step.add("Sigmoid", o), step.add("Tanh", new_c))
    if weights.hr is not None:
        out = _add_clip(step, _add_product(step, out, weights.hr, weights.hh_storage), weights.proj_clip, dtype)
    entries = [_info(name, dtype, [None, size]) for name, size in ((h, outputs), (c, hidden), (at, 4 * hidden))]
    if going:
        (goes,) = step.names(1)
        entries.append(helper.make_tensor_value_info(goes, TensorProto.BOOL, [None, 1]))
        step.add("Where", goes, out, h, to=h_next)
        step.add("Where", goes, new_c, c, to=c_next)
        step.add("Where", goes, out, step.constant(torch.zeros((), dtype=dtype)), to=y)
    else:
        step.add("Identity", out, to=h_next)
        step.add("Identity", new_c, to=c_next)
        step.add("Identity", out, to=y)
    body = helper.make_graph(
        step.nodes,
        step.prefix,
        entries,
        [_info(name, dtype, [None, size]) for name, size in ((h_next, outputs), (c_next, hidden), (y, outputs))],
    )
    scanned = [gates_of_x, going] if going else [gates_of_x]
    last_h, last_c, all_h = graph.add_many(
        "Scan",
        [*states, *scanned],
        graph.names(3),
        body=body,
        num_scan_inputs=len(scanned),
        scan_input_directions=[int(reverse)] * len(scanned),
        scan_output_directions=[int(reverse)],
    )
    return all_h, last_h, last_c


def _add_product(graph: Graph, x: str, matrix: Matrix, storage: str) -> str:
    """x Wᵀ, or x Vᵀ Uᵀ, of the last axis."""
    for weight in (matrix,) if isinstance(matrix, Tensor) else reversed(matrix):
        x = _add_thin_product(graph, x, weight, storage)
    return x


def _add_thin_product(graph: Graph, x: str, weight: Tensor, storage: str) -> str:
    if storage == "int8":
        # A scale for every row of inputs, as in the fused kernel; DynamicQuantizeLinear has one for all time and batch.
        largest = graph.add("ReduceMax", graph.add("Abs", x), graph.constant(torch.tensor([-1])))
        least = graph.constant(torch.tensor(torch.finfo(torch.float32).tiny))
        scale = graph.add("Max", graph.add("Mul", largest, graph.constant(torch.tensor(1 / 127))), least)
        signed = graph.add("Round", graph.add("Div", x, scale))
        # Both sides unsigned, which ONNX Runtime computes fast and exactly on every CPU. With signed weights it saturates
        # sums of two products at 16 bits on x86 without VNNI; with signed inputs it takes a slow path.
        quantized = _cast(graph, graph.add("Add", signed, graph.constant(torch.tensor(128.0))), torch.uint8)
        zero = graph.constant(torch.tensor(128, dtype=torch.uint8))
        integers = graph.once(weight, "integers", lambda: _unsigned(to_int8(weight).codes.T))
        scales = graph.once(weight, "scales", lambda: to_int8(weight).scale)
        total = graph.add("MatMulInteger", quantized, integers, zero, zero)
        # Both scales multiplied first would be a pattern that ONNX Runtime takes for one with a single scale of inputs.
        return graph.add("Mul", graph.add("Mul", _cast(graph, total), scale), scales)
    if storage == "bfloat16":
        return graph.add("MatMul", x, _cast(graph, graph.once(weight, storage, weight.T.bfloat16)))
    return graph.add("MatMul", x, graph.once(weight, storage, lambda: weight.T))


def _unsigned(integers: Tensor) -> Tensor:
    """Return int8 as uint8 with the zero point 128."""
    return (integers.short() + 128).to(torch.uint8)


def _cast(graph: Graph, name: str, dtype: torch.dtype = torch.float32) -> str:
    from onnx import TensorProto

    (result,) = graph.names(1)
    graph.add_many("Cast", [name], [result], to=getattr(TensorProto, _TYPES[dtype]))
    return result


def _in_onnx_order(weight: Any) -> Tensor:
    return reordered(weight.detach(), ONNX)


def _info(name: str, dtype: torch.dtype, shape: Sequence[int | None]) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, getattr(TensorProto, _TYPES[dtype]), shape)
