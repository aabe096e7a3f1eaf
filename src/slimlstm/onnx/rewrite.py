"""Put replacements into an ONNX graph, and remove nodes and constants that are no longer used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import Replacement, storage_called
from slimlstm.onnx.as_scan import add_operator_as_scans, directions_of, form_of
from slimlstm.onnx.builder import INT4_IR_VERSION, GraphBuilder, int4_tensor, onnx_type
from slimlstm.onnx.forms import LSTM, Form
from slimlstm.onnx.graph import OnnxLSTM, Scope, WeightLocation, attribute_of, graphs_of, inner_graphs
from slimlstm.onnx.integers import make_plain
from slimlstm.onnx.opsets import opset_of
from slimlstm.onnx.runtime import insert
from slimlstm.onnx.scan import groups_of
from slimlstm.onnx.separate import separate
from slimlstm.ops.gates import reordered
from slimlstm.ops.weights import Matrix, parts_of


class Rewriter:
    """Puts replacements into a model, which changes in place.

    Args:
        model: an ``onnx.ModelProto``.
        form: the form of LSTM operators afterwards; see :func:`slimlstm.onnx.forms.choose_form`.

    Attributes:
        forms: the form of every operator with new weights, by name.
        scans: the beginning of the names of an operator's Scans, by the operator's name.
        roots: the constants of the file that replaced weights were computed from.
    """

    def __init__(self, model: Any, form: str = "auto") -> None:
        self._model, self._graph, self._form = model, model.graph, form
        self._taken = {name for graph in graphs_of(model.graph) for name in _names(graph)}
        self._nodes: list[Any] = []
        self._opset = opset_of(model)
        self._builder = GraphBuilder(self._free_prefix("slimlstm"), opset=self._opset)
        self.forms: dict[str, Form] = {}
        self.scans: dict[str, str] = {}
        self.roots: set[str] = set()

    def replace(self, groups: list[list[OnnxLSTM]], replacements: Mapping[str, Replacement]) -> None:
        """Put replacements into all layers of every group.

        Args:
            groups: groups of layers that share their weights; keys begin with the name of a group's first layer.
            replacements: the replacements by key, ``"<layer>.<weight>"``.

        Raises:
            SlimLSTMError: LSTMs with different weights read a product that would change.
        """
        _check_products(groups, replacements)
        released: list[str] = []
        for group in groups:
            prefix = group[0].name
            names = (location.name for location in group[0].locations)
            new = {name: replacements[f"{prefix}.{name}"] for name in names if f"{prefix}.{name}" in replacements}
            shared: dict[Hashable, Any] = {}
            for layer in group if new else ():
                found = separate(layer, self._model, self._free, shared)
                if layer.is_operator:
                    found += self._replace_operator(layer, new, prefix, shared)
                else:
                    for location in layer.locations:
                        if location.name in new:
                            found += self._replace_product(location, prefix, new[location.name], shared)
                self.roots |= _roots(found, layer.scope)
                released += found
        nodes = [*self._nodes, *self._graph.node]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        self._graph.initializer.extend(self._builder.constants)
        _remove_unused(self._graph, released)
        # Before version 4 of the format, weights had to be listed among the inputs.
        self._model.ir_version = max(self._model.ir_version, 4)

    def _replace_operator(
        self, layer: OnnxLSTM, new: Mapping[str, Replacement], prefix: str, shared: dict[Hashable, Any]
    ) -> list[str]:
        """Give an LSTM operator new weights, or make it a Scan; return the names of the old ones."""
        storages = {
            location.name: new[location.name].storage if location.name in new else _exact_storage(location)
            for location in layer.locations
        }
        directions = directions_of(layer, new, storages)
        self.forms[layer.name] = form_of(layer, directions, self._opset, self._form)
        if self.forms[layer.name].name == LSTM:
            return self._replace_operands(layer, new, prefix, shared)
        builder = GraphBuilder(self._free_prefix(f"{layer.name}/scan"), parent=self._builder)
        self.scans[layer.name] = builder.prefix
        add_operator_as_scans(builder, layer, directions, self.forms[layer.name].is_integer)
        graph, released = layer.scope.graph, list(layer.node.input[1:4])
        at = next(index for index, node in enumerate(graph.node) if node is layer.node or node.output == layer.node.output)
        del graph.node[at]
        for node in reversed(builder.nodes):
            graph.node.insert(at, node)
        return released

    def _replace_operands(
        self, layer: OnnxLSTM, new: Mapping[str, Replacement], prefix: str, shared: dict[Hashable, Any]
    ) -> list[str]:
        """Give an LSTM operator new weights W and R, with both directions; return the names of the old ones."""
        released: list[str] = []
        for position in (1, 2):
            locations = [location for location in layer.locations if location.index == position]
            if not any(location.name in new for location in locations):
                continue
            if position not in shared:
                parts = [self._operand(one, f"{prefix}.{one.name}", new.get(one.name)) for one in locations]
                name = parts[0]
                if len(parts) > 1:
                    name = self._add("Concat", parts, f"{prefix}.{locations[0].name}.both", axis=0)
                shared[position] = name
            released.append(layer.node.input[position])
            layer.node.input[position] = shared[position]
        return released

    def _operand(self, location: WeightLocation, key: str, new: Replacement | None) -> str:
        """Add the value [1, 4H, n] of one direction, and return its name."""
        storage = _exact_storage(location) if new is None else new.storage
        matrix = location.matrix if new is None else new.effective(location.matrix)
        if isinstance(matrix, Tensor):
            return self._weight(key, reordered(matrix, location.gates), storage, lambda weight: weight[None])
        u = self._weight(f"{key}_u", reordered(matrix[0], location.gates), storage, lambda weight: weight[None])
        v = self._weight(f"{key}_v", matrix[1], storage, lambda weight: weight[None])
        return self._add("MatMul", [u, v], f"{key}.product")

    def _replace_product(
        self, location: WeightLocation, prefix: str, new: Replacement, shared: dict[Hashable, Any]
    ) -> Iterable[str]:
        """Multiply by one new matrix, or by V and then U; yield the names of the old constants.

        Exporters merge the equal products of several steps, so cells of one group may share a node, which changes once.
        """
        product = "product", _place(location)
        if product in shared:
            return
        shared[product] = True
        is_transposed = bool(attribute_of(location.node, "transB", 0))
        place = location.name, is_transposed
        if place not in shared:
            shared[place] = self._product_weights(location, f"{prefix}.{location.name}", new, is_transposed)
        names: list[str] = shared[place]
        yield from make_plain(location)
        yield location.node.input[1]
        location.node.input[1] = names[0]
        if len(names) == 2:
            if location.source is not None:
                yield location.source.input[1]
                location.source.input[1] = names[1]
                return
            thin = self._node("MatMul", [location.node.input[0], names[1]], f"{location.node.output[0]}_thin")
            insert(location.scope.graph, thin, before=location.node)
            location.node.input[0] = thin.output[0]

    def _product_weights(self, location: WeightLocation, key: str, new: Replacement, is_transposed: bool) -> list[str]:
        """Add the constants of a written-out product, W or U and V, and return their names."""

        def turned(weight: Tensor) -> Tensor:
            return weight if is_transposed else weight.mT

        matrix: Matrix = new.effective(location.matrix)
        if isinstance(matrix, Tensor):
            return [self._weight(key, reordered(matrix, location.gates), new.storage, turned)]
        return [
            self._weight(f"{key}_u", reordered(matrix[0], location.gates), new.storage, turned),
            self._weight(f"{key}_v", matrix[1], new.storage, lambda weight: weight.mT),
        ]

    def _weight(self, key: str, weight: Tensor, storage: str | None, laid_out: Callable[[Tensor], Tensor]) -> str:
        """Add a constant [m, n], as codes and scales where it has a storage; return the name of its value."""
        if storage in (None, "float32"):
            return self._constant(key, laid_out(weight))
        row = storage_called(storage)
        encoded = row.encode(weight.detach())
        codes = laid_out(encoded.codes)
        value = self._cast(self._int4(key, codes) if row.bits == 4 else self._constant(key, codes), weight.dtype)
        if encoded.scale is None:
            return value
        if row.scales == "group":
            stored = self._cast(self._constant(f"{key}.scale", laid_out(encoded.scale)), weight.dtype)
            columns_at = [1, 2].index(laid_out(torch.empty(1, 2)).shape[-1]) - 2
            numbers = self._builder.constant(groups_of(weight))
            spread = self._add("Gather", [stored, numbers], f"{key}.scales", axis=columns_at)
            return self._add("Mul", [value, spread], f"{key}.value")
        scales = self._constant(f"{key}.scale", laid_out(encoded.scale[:, None]))
        return self._add("Mul", [value, scales], f"{key}.value")

    def _constant(self, name: str, value: Tensor) -> str:
        from onnx import helper

        name, value = self._free(name), value.detach()
        content = value.flatten().contiguous().view(torch.uint8).numpy().tobytes()
        self._graph.initializer.append(helper.make_tensor(name, onnx_type(value.dtype), value.shape, content, raw=True))
        return name

    def _int4(self, name: str, value: Tensor) -> str:
        tensor = int4_tensor(self._free(name), value)
        self._graph.initializer.append(tensor)
        self._model.ir_version = max(self._model.ir_version, INT4_IR_VERSION)
        return tensor.name

    def _cast(self, name: str, dtype: torch.dtype) -> str:
        return self._add("Cast", [name], f"{name}.cast", to=onnx_type(dtype))

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        node = self._node(operator, inputs, output, **attributes)
        self._nodes.append(node)
        return node.output[0]

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        from onnx import helper

        output = self._free(output)
        return helper.make_node(operator, inputs, [output], name=output, **attributes)

    def _free_prefix(self, prefix: str) -> str:
        """Return a prefix that no name begins with."""
        while any(name.startswith(prefix) for name in self._taken):
            prefix += "_"
        self._taken.add(prefix)
        return prefix

    def _free(self, name: str) -> str:
        free, count = name, 1
        while free in self._taken:
            count += 1
            free = f"{name}.{count}"
        self._taken.add(free)
        return free


def _place(location: WeightLocation) -> Hashable:
    """Return an identity of a product that is written out; the two columns of one product differ."""
    return id(location.scope), location.node.output[0], location.columns


def _check_products(groups: list[list[OnnxLSTM]], replacements: Mapping[str, Replacement]) -> None:
    """Raise :class:`SlimLSTMError` if a product that would change is part of LSTMs of several groups."""
    keys: dict[Hashable, dict[str, str]] = {}
    for group in groups:
        for layer in group:
            for location in layer.locations if not layer.is_operator else ():
                keys.setdefault(_place(location), {})[f"{group[0].name}.{location.name}"] = location.node.output[0]
    for found in keys.values():
        if len(found) > 1 and any(key in replacements for key in found):
            raise SlimLSTMError(
                f"{' and '.join(found)} are one product in the file, {next(iter(found.values()))}, of LSTMs that differ in "
                "their other matrices, so it cannot change for one of them alone; leave these out with filter="
            )


def _roots(names: Iterable[str], scope: Scope) -> set[str]:
    """Return the stored constants from which the constants among these values are computed."""
    roots, seen, pending = set[str](), set[str](), list(names)
    while pending:
        name = pending.pop()
        if name in seen or name not in scope.constants:
            continue
        seen.add(name)
        node = scope.producers.get(name)
        if node is None:
            roots.add(name)
        else:
            pending += node.input
    return roots


def _exact_storage(location: WeightLocation) -> str | None:
    """Return a location's storage if it can hold the matrix exactly, else None: other tools scale integers differently."""
    own = location.storage
    is_exact = own is not None and all(
        storage_called(own).encode(part.float()).decoded().equal(part.float()) for part in parts_of(location.matrix)
    )
    return own if is_exact else None


def _names(graph: Any) -> Iterable[str]:
    """Yield every name that a graph gives to a value or a node."""
    yield from (tensor.name for tensor in graph.initializer)
    yield from (value.name for value in graph.input)
    for node in graph.node:
        yield from (node.name, *node.output)


def _remove_unused(graph: Any, released: list[str]) -> None:
    """Remove the nodes and constants that only ``released`` values needed."""
    uses: dict[str, int] = {}
    graphs = list(graphs_of(graph))
    for one in graphs:
        for name in [*(name for node in one.node for name in node.input), *(output.name for output in one.output)]:
            uses[name] = uses.get(name, 0) + 1
    pending, dead = list(dict.fromkeys(released)), set[str]()
    while pending:
        name = pending.pop()
        if uses.get(name) or name in dead or not name:
            continue
        dead.add(name)
        for one in graphs:
            for node in [node for node in one.node if name in node.output]:
                if any(uses.get(output) for output in node.output) or any(True for _ in inner_graphs(node)):
                    continue
                one.node.remove(node)
                for used in node.input:
                    uses[used] -= 1
                pending += node.input
    for one in graphs:
        for kept in (one.initializer, one.input, one.value_info):
            for value in [value for value in kept if value.name in dead]:
                kept.remove(value)
