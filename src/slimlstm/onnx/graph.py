"""Read ONNX graphs: nested graphs, constants that nodes compute, and the locations of LSTM weights."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimlstm.files import check_memory, memory_limit_of
from slimlstm.ops.weights import Matrix

# Exporters transpose, cut, join and quantise PyTorch's weights by these operators.
_FOLDED = {
    "Cast",
    "Concat",
    "Constant",
    "DequantizeLinear",
    "Gather",
    "Identity",
    "MatMul",
    "Mul",
    "QuantizeLinear",
    "Reshape",
    "Slice",
    "Squeeze",
    "Sub",
    "Transpose",
    "Unsqueeze",
}
_WIDEST = 8
"""Bytes of the widest number that an operator makes."""
# The evaluator knows DequantizeLinear from this opset on only; the operator did not change.
_DEQUANTIZES = 19


@dataclass
class Scope:
    """The values that the nodes of a graph can read, from the graphs around it too.

    Attributes:
        graph: the graph.
        constants: the arrays of constants, by name.
        producers: the node that computes each value, by the value's name.
        outer: the surrounding scope, for a nested graph.
        holder: the node that holds a nested graph.
        computed: a limit on the bytes of all constants that the file's nodes compute, and their bytes so far.
    """

    graph: Any
    constants: ChainMap[str, Any]
    producers: ChainMap[str, Any]
    outer: Scope | None = None
    holder: Any = None
    computed: list[int] = field(default_factory=lambda: [0, 0])

    def states(self) -> set[str]:
        """Return the inputs of a Loop's or Scan's body that carry a state from one iteration to the next."""
        names = [entry.name for entry in self.graph.input]
        kind = getattr(self.holder, "op_type", "")
        if kind == "Scan":
            return set(names[: len(names) - attribute_of(self.holder, "num_scan_inputs", 0)])
        return set(names[2:]) if kind == "Loop" else set()

    def scanned(self, name: str) -> str:
        """Return the outer value whose slices a Scan's body reads as ``name``, one at every step; "" if it reads none."""
        names = [entry.name for entry in self.graph.input]
        if getattr(self.holder, "op_type", "") != "Scan" or name not in names or name in self.states():
            return ""
        return self.holder.input[names.index(name)]


@dataclass
class WeightLocation:
    """One matrix of one LSTM, and where in the graph it is.

    Attributes:
        name: the name of the weight in ``nn.LSTM``, such as ``"weight_hh_l0"``.
        matrix: the matrix [4H, n], or its factors, with gates in PyTorch's order.
        gates: the order of the gates in the file, such as ``"iofg"``.
        scope: the graph that ``node`` is in.
        node: the LSTM, MatMul or Gemm that reads the matrix.
        index: the position of the matrix among the node's inputs.
        direction: the position of the matrix's direction in that input, for an LSTM operator.
        source: the node that multiplies by the right factor, for an LSTM of single operators that is low-rank already.
        storage: ``"int8"``, ``"int4"`` or ``"bfloat16"`` where the file holds such numbers and widens them; otherwise None.
        stored_itemsize: the bytes of each number that the file holds, where it holds another floating-point dtype.
        columns: first and end of the matrix's columns in [W R], where ``node`` multiplies a Concat of x and h by [W R].
        rounded: the value that a product of integers rounds, in slimlstm's own Scans; ``node`` then scales that product.
    """

    name: str
    matrix: Matrix
    gates: str
    scope: Scope
    node: Any
    index: int
    direction: int = 0
    source: Any = None
    storage: str | None = None
    stored_itemsize: int | None = None
    columns: tuple[int, int] | None = None
    rounded: str = ""

    @property
    def input(self) -> str:
        """The name of the value that is multiplied by the matrix, for an LSTM of single operators."""
        if self.rounded:
            return self.rounded
        name = (self.source or self.node).input[0]
        return name if self.columns is None else self.scope.producers[name].input[int(self.columns[0] > 0)]


@dataclass
class OnnxLSTM:
    """One LSTM of a graph.

    Attributes:
        name: a name that is unique in the model.
        node: the LSTM operator, or the Split that makes the gates of an LSTM of single operators.
        scope: the graph that ``node`` is in.
        locations: the matrices; none where ``problem`` says why they cannot be read.
        biases: the biases by PyTorch's names, such as ``"bias_ih_l0"``.
        problem: why the LSTM has no locations, in words.
        gates: the order of the gates that the Split makes, for an LSTM of single operators.
        cell: the name of the previous step's cell state, for an LSTM of single operators.
        has_computed_bias: whether an operator reads a bias that is no constant; ``biases`` then lacks it.
    """

    name: str
    node: Any
    scope: Scope
    locations: list[WeightLocation] = field(default_factory=list[WeightLocation])
    biases: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    problem: str | None = None
    gates: str = ""
    cell: str = ""
    has_computed_bias: bool = False

    @property
    def is_operator(self) -> bool:
        """Whether the LSTM is one operator, rather than written out in single operators."""
        return self.node.op_type != "Split"


def inner_nodes(node: Any) -> Iterator[Any]:
    """Yield the nodes of all graphs that are nested in a node."""
    for inner in inner_graphs(node):
        for graph in graphs_of(inner):
            yield from graph.node


def graphs_of(graph: Any) -> Iterator[Any]:
    """Yield a graph and all graphs nested in its nodes."""
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from graphs_of(inner)


def inner_graphs(node: Any) -> Iterator[Any]:
    """Yield the graphs that a node holds as attributes."""
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.HasField("g") else attribute.graphs


def attribute_of(node: Any, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute, or ``default`` where the node has none of that name."""
    from onnx import helper

    return next((helper.get_attribute_value(found) for found in node.attribute if found.name == name), default)


def open_scope(graph: Any, outer: Scope | None, opsets: Mapping[str, int], holder: Any = None) -> Scope:
    """Return the scope of a graph, with all constants that its nodes compute from constants.

    Args:
        graph: the graph.
        outer: the surrounding scope, or None for the whole model.
        opsets: versions by domain.
        holder: the node that holds the graph.

    Raises:
        Exception: a file is damaged; the class depends on the damage.
    """
    from onnx import numpy_helper

    scope = Scope(
        graph,
        outer.constants.new_child() if outer else ChainMap[str, Any](),
        outer.producers.new_child() if outer else ChainMap[str, Any](),
        outer,
        holder,
    )
    scope.computed = outer.computed if outer else [memory_limit_of(graph.ByteSize()), 0]
    scope.constants.update((tensor.name, numpy_helper.to_array(tensor)) for tensor in graph.initializer)
    for node in graph.node:
        scope.producers.update(dict.fromkeys(node.output, node))
        if node.op_type in _FOLDED and all(name in scope.constants for name in node.input if name):
            scope.computed[1] += _result_bytes(node, [scope.constants[name] for name in node.input if name])
            check_memory(scope.computed[1], scope.computed[0], "the constants that the file's nodes compute")
            scope.constants.update(_evaluated(node, scope.constants, opsets))
    return scope


def constant(name: str, scope: Scope) -> Tensor | None:
    """Return a constant value as a tensor, or None where the value is no constant or is absent ("")."""
    array = scope.constants.get(name) if name else None
    if array is None:
        return None
    if array.dtype.name == "bfloat16":  # which NumPy does not know
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    if array.dtype.name == "int4":
        array = array.astype("int8")
    return torch.from_numpy(array.copy())


def storage_of(name: str, scope: Scope, direction: int = 0) -> str | None:
    """Return the storage of a constant that nodes widen: ``"int8"`` (also for uint8), ``"int4"``, ``"bfloat16"`` or None.

    Args:
        name: the widened value.
        scope: the graph that reads it.
        direction: the part to follow where a Concat joins two directions.
    """
    stored = _stored(name, scope, direction)
    kind = "" if stored is None else stored.dtype.name
    return {"int8": "int8", "uint8": "int8", "int4": "int4", "bfloat16": "bfloat16"}.get(kind)


def stored_itemsize(name: str, scope: Scope, direction: int = 0) -> int | None:
    """Return the bytes of each number of a floating-point constant that nodes cast, or None; see :func:`storage_of`."""
    stored = _stored(name, scope, direction)
    return None if stored is None or stored.dtype.kind != "f" else stored.dtype.itemsize


def _stored(name: str, scope: Scope, direction: int) -> Any:
    """Return the array that nodes widen to a value, or None."""
    while (node := scope.producers.get(name)) is not None:
        if node.op_type in ("Cast", "DequantizeLinear"):
            is_computed = getattr(scope.producers.get(node.input[0]), "op_type", "") == "QuantizeLinear"
            return None if is_computed else scope.constants.get(node.input[0])
        if node.op_type not in ("Concat", "MatMul", "Mul", "Sub", "Reshape", "Squeeze", "Transpose", "Unsqueeze"):
            return None
        name = node.input[direction if node.op_type == "Concat" and direction < len(node.input) else 0]
    return None


def _result_bytes(node: Any, inputs: list[Any]) -> int:
    """Return the most bytes that a node's result can take, from the shapes of its inputs."""
    shapes = [array.shape for array in inputs]
    if node.op_type == "MatMul" and all(len(shape) > 1 for shape in shapes):
        (*outer, rows, _), (*others, _, columns) = shapes
        return math.prod((*np.broadcast_shapes(tuple(outer), tuple(others)), rows, columns)) * _WIDEST
    if node.op_type == "Gather" and len(shapes) == 2 and shapes[0]:
        axis = attribute_of(node, "axis", 0) % len(shapes[0])
        return math.prod((*shapes[0][:axis], *shapes[0][axis + 1 :], *shapes[1])) * _WIDEST
    if node.op_type in ("Mul", "Sub", "QuantizeLinear", "DequantizeLinear", "Cast"):
        largest = max((math.prod(shape) for shape in shapes), default=0)
        is_scale = node.op_type.endswith("Linear")
        return (largest if is_scale else math.prod(np.broadcast_shapes(*shapes))) * _WIDEST
    return sum(array.nbytes for array in inputs)


def _evaluated(node: Any, constants: Mapping[str, Any], opsets: Mapping[str, int]) -> dict[str, Any]:
    """Return the outputs of a node whose inputs are constants; an empty dictionary where it cannot be evaluated."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    inputs = {name: constants[name] for name in node.input if name}
    values = [helper.make_empty_tensor_value_info(name) for name in inputs]
    results = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "node", values, results)
    if node.op_type == "DequantizeLinear":
        opsets = {**opsets, "": max(opsets.get("", 0), _DEQUANTIZES)}
    imports = [helper.make_opsetid(domain, number) for domain, number in opsets.items()]
    try:
        evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=imports))
        return dict(zip(node.output, evaluator.run(None, inputs), strict=True))
    except Exception:  # the evaluator raises whatever NumPy does
        return {}
