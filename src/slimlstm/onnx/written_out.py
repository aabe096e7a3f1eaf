"""Read LSTMs that a graph writes out in single operators, as exporters do with cells.

The gates are one sum of x·W, h·R and biases, which a Split divides; c' = σ(f) c + σ(i) tanh(g) and h' = σ(o) tanh(c').
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from slimlstm.onnx.graph import OnnxLSTM, Scope, WeightLocation, attribute_of, constant, storage_of, stored_itemsize
from slimlstm.onnx.integers import integer_product
from slimlstm.onnx.separate import is_divisible
from slimlstm.ops.gates import PYTORCH, reordered
from slimlstm.ops.weights import Matrix, shape_of


class _Gates(NamedTuple):
    """The order of the gates among a Split's outputs, such as ``"foig"``, and the name of the previous cell state."""

    order: str
    cell: str


def read_written_out(split: Any, scope: Scope) -> OnnxLSTM | None:
    """Return the LSTM whose gates a Split makes, or None where the Split's outputs are no gates of an LSTM.

    Args:
        split: a Split with four outputs.
        scope: the graph that it is in.
    """
    gates = _gates(split, scope)
    if gates is None:
        return None
    found = list(_products(split.input[0], scope, _readers(scope)))
    if len(found) == 1:
        found = _divided(found[0], gates.cell)
    pair = _ih_and_hh(found, gates.cell, scope)
    if pair is None:
        name = split.name or split.output[0]
        problem = (
            f"{name}: its gates are no sum of products of x and of h with one constant each, as with a projection; it "
            "stays as it is"
        )
        return OnnxLSTM(name, split, scope, problem=problem)
    names = [location.node.name or location.node.output[0] for location in pair]
    if pair[0].node is pair[1].node:
        names = [f"{names[0]}/"] * 2
    lstm = OnnxLSTM(_common_path(*names) or split.name or split.output[0], split, scope, gates=gates.order, cell=gates.cell)
    for location, name in zip(pair, ("weight_ih_l0", "weight_hh_l0"), strict=True):
        location.name, location.gates = name, gates.order
        location.matrix = _in_pytorch_order(location.matrix, gates.order)
        lstm.locations.append(location)
    return lstm


def _ih_and_hh(products: list[WeightLocation], cell: str, scope: Scope) -> tuple[WeightLocation, WeightLocation] | None:
    """Return the locations of W and R among the products that are summed, or None where they do not form an LSTM."""
    shapes = [shape_of(location.matrix) or (0, 0) for location in products]
    rows = {shape[0] for shape in shapes}
    if len(products) != 2 or len(rows) != 1 or min(rows) % 4 or not min(rows):
        return None
    hidden = min(rows) // 4
    recurrent = [location for location, shape in zip(products, shapes, strict=True) if shape[1] == hidden]
    if not recurrent:
        return None
    # Where both have H columns, R is the one whose input depends on the same values as the cell state.
    roots = _roots(cell, scope)
    hh = min(recurrent, key=lambda location: _distance(location, roots))
    ih = next(location for location in products if location is not hh)
    return ih, hh


def _distance(location: WeightLocation, roots: set[str]) -> tuple[bool, int]:
    """Return how far a product's input is from the cell state: whether it depends on more than carried states, and the
    number of roots that only one of the two has."""
    own = _roots(location.input, location.scope)
    return not own <= location.scope.states(), len(own ^ roots)


def _divided(location: WeightLocation, cell: str) -> list[WeightLocation]:
    """Return the two locations of [W R], where one product reads a Concat of x and h."""
    if not isinstance(location.matrix, Tensor) or not is_divisible(location.node, location.scope):
        return [location]
    rows, columns = location.matrix.shape
    hidden = rows // 4
    if rows % 4 or not 0 < hidden < columns:
        return [location]
    # h is the part whose roots are nearer to the roots of the cell state.
    roots = _roots(cell, location.scope)
    options = [(0, hidden), (hidden, columns)], [(0, columns - hidden), (columns - hidden, columns)]
    divisions = [
        [
            replace(location, matrix=location.matrix[:, first:end].contiguous(), columns=(first, end))
            for first, end in option
        ]
        for option in options
    ]
    h_first = _distance(divisions[0][0], roots) < _distance(divisions[1][1], roots)
    return divisions[0] if h_first else divisions[1]


def _common_path(first: str, second: str) -> str:
    """Return the common beginning of two dotted or slashed names, without the last separator."""
    count = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[: max(first.rfind("/", 0, count), first.rfind(".", 0, count), 0)]


def _gates(split: Any, scope: Scope) -> _Gates | None:
    """Return the order of the gates that a Split makes, or None where its outputs are no LSTM's gates."""
    readers = _readers(scope)
    sigmoids, tanhs = (
        {node.output[0]: index for index, output in enumerate(split.output) for node in _of_kind(kind, readers.get(output))}
        for kind in ("Sigmoid", "Tanh")
    )
    if len(tanhs) != 1 or sorted([*sigmoids.values(), *tanhs.values()]) != [0, 1, 2, 3]:
        return None
    (tanh,) = tanhs
    for new, carried in _cell_updates(tanh, readers, scope):
        i = next((name for name in new.input if name in sigmoids), None)
        f = next((name for name in carried.input if name in sigmoids and name != i), None)
        if i is not None and f is not None:
            letters = {sigmoids[i]: "i", sigmoids[f]: "f", tanhs[tanh]: "g"}
            order = "".join(letters.get(index, "o") for index in range(4))
            return _Gates(order, next((name for name in carried.input if name != f), ""))
    return None


def _cell_updates(tanh: str, readers: Mapping[str, list[Any]], scope: Scope) -> Iterator[tuple[Any, Any]]:
    """Yield the products σ(i) tanh(g) and σ(f) c of every sum that may be a new cell state."""
    for new in _of_kind("Mul", readers.get(tanh)):
        for total in _of_kind("Add", readers.get(new.output[0])):
            other = next((name for name in total.input if name != new.output[0]), "")
            carried = scope.producers.get(other)
            if carried is not None and carried.op_type == "Mul":
                yield new, carried


def _of_kind(kind: str, nodes: list[Any] | None) -> list[Any]:
    return [node for node in nodes or [] if node.op_type == kind]


def _products(name: str, scope: Scope, readers: Mapping[str, list[Any]]) -> Iterator[WeightLocation]:
    """Yield the products with constant matrices that add up to a value."""
    seen, pending = set[str](), [name]
    while pending:
        name = pending.pop()
        node = scope.producers.get(name)
        if name not in seen and name not in scope.constants and scope.outer is not None and (outer := scope.scanned(name)):
            seen.add(name)
            # Exporters multiply x by W for all steps at once.
            yield from _products(outer, scope.outer, _readers(scope.outer))
            continue
        # Values of other graphs, and values with several names in a damaged one, are left alone.
        if name in seen or node is None or name in scope.constants or name not in scope.producers.maps[0]:
            continue
        seen.add(name)
        if node.op_type == "Add":
            pending += node.input
        elif node.op_type in ("MatMul", "Gemm") and len(node.input) >= 2:
            location = _product(node, scope, readers)
            if location is not None:
                yield location
        elif (location := integer_product(node, scope)) is not None:
            yield location


def _readers(scope: Scope) -> dict[str, list[Any]]:
    """Return the nodes that read each value in a graph; a node that reads a value twice stands twice."""
    readers: dict[str, list[Any]] = {}
    for node in scope.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _product(node: Any, scope: Scope, readers: Mapping[str, list[Any]]) -> WeightLocation | None:
    """Return the location of the constant matrix that a node multiplies by, with gates in the file's order."""
    matrix = constant(node.input[1], scope)
    if matrix is None or matrix.ndim != 2 or attribute_of(node, "transA", 0):
        return None
    u = matrix if attribute_of(node, "transB", 0) else matrix.T
    location = WeightLocation("", u, "", scope, node, 1, storage=storage_of(node.input[1], scope))
    location.stored_itemsize = stored_itemsize(node.input[1], scope)
    inner = scope.producers.maps[0].get(node.input[0])
    if inner is not None and inner.op_type == "MatMul" and len(readers.get(node.input[0], [])) == 1:
        v = constant(inner.input[1], scope)
        if v is not None and v.ndim == 2 and _are_factors(u, v):
            location.matrix, location.source = (u, v.T), inner
    return location


def _are_factors(u: Tensor, v: Tensor) -> bool:
    """Return whether u [m, r] and the transposed right factor v [n, r] hold fewer numbers than their product."""
    return v.shape[1] == u.shape[1] and v.shape[1] * sum(u.shape) < u.shape[0] * len(v)


def _roots(name: str, scope: Scope) -> set[str]:
    """Return the inputs of the graph, and values from outside, that a value depends on."""
    seen, pending, roots = set[str](), [name], set[str]()
    while pending:
        name = pending.pop()
        if name in seen or not name or name in scope.constants:
            continue
        seen.add(name)
        node = scope.producers.maps[0].get(name)
        if node is None:
            roots.add(name)
        else:
            pending += node.input
    return roots


def _in_pytorch_order(matrix: Matrix, source: str) -> Matrix:
    if isinstance(matrix, Tensor):
        return reordered(matrix, PYTORCH, source)
    return reordered(matrix[0], PYTORCH, source), matrix[1].contiguous()
