"""The LSTMs in an ONNX graph, nested graphs included: LSTM operators, and ones that are written out in single operators.

Written out, the sum of x·W and h·R is split into four gates. Matrices and gate order are PyTorch's; ONNX's order i, o, f, c
is converted here.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.ops.weights import Matrix, shape_of

FROM_ONNX = (0, 2, 3, 1)
"""Where PyTorch's gates i, f, g, o are among ONNX's i, o, f, c."""
TO_ONNX = (0, 3, 1, 2)
ENDINGS = {"forward": [""], "reverse": ["_reverse"], "bidirectional": ["", "_reverse"]}
_SHAPING = {
    "Cast",
    "Concat",
    "Constant",
    "Identity",
    "MatMul",
    "Mul",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
# Far above any weight; nodes that multiply what a damaged or hostile file holds are not followed.
_LARGEST = 1 << 30


@dataclass
class Scope:
    """What the nodes of a graph can see: constant arrays, the nodes that make values, and how often each is used."""

    graph: Any
    constants: ChainMap[str, Any]
    producers: ChainMap[str, Any]


@dataclass
class WeightLocation:
    """One matrix of one LSTM, and where in the file it is.

    Attributes:
        name: in ``nn.LSTM``, such as ``"weight_hh_l0"``.
        matrix: the matrix [4H, n], or its factors, in PyTorch's order.
        gates: where the file's gates are among PyTorch's.
        node: the LSTM, MatMul or Gemm that it goes into as the input ``index``; of an LSTM as its ``direction``-th part.
        source: the node that multiplies by the right factor, of a written-out LSTM that is low-rank already.
        storage: ``"int8"`` or ``"bfloat16"`` where the file keeps it so.
    """

    name: str
    matrix: Matrix
    gates: tuple[int, ...]
    scope: Scope
    node: Any
    index: int
    direction: int = 0
    source: Any = None
    storage: str | None = None


@dataclass
class OnnxLSTM:
    """One LSTM of the file: its ``name``, its ``locations``, and biases by PyTorch's names.

    ``problem`` says why it has no locations, where it has none.
    """

    name: str
    node: Any
    scope: Scope
    locations: list[WeightLocation] = field(default_factory=list[WeightLocation])
    biases: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    problem: str | None = None


def read_model(path: Path) -> Any:
    """The ONNX model in a file, with what it keeps in other files.

    Raises:
        SlimLSTMError: onnx is not installed, or the file is missing or damaged.
    """
    try:
        import onnx
    except ImportError as error:
        raise SlimLSTMError("reading ONNX files takes onnx: pip install 'slimlstm[onnx]'") from error
    if not path.is_file():
        raise SlimLSTMError(f"there is no file {path}")
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf and onnx raise classes of several libraries
        raise SlimLSTMError(f"{path} is no intact ONNX file: {error}") from error


def read_tensors_of(path: Path) -> dict[str, Tensor]:
    """The weights of every LSTM in an ONNX file, under the names that ``nn.LSTM`` and slimlstm's modules give them.

    Raises:
        SlimLSTMError: as :func:`read_model`.
    """
    model = read_model(path)
    tensors: dict[str, Tensor] = {}
    for layer in find_lstms(model, path):
        for location in layer.locations:
            key = f"{layer.name}.{location.name}"
            if isinstance(location.matrix, Tensor):
                tensors[key] = location.matrix
            else:
                tensors[f"{key}_u"], tensors[f"{key}_v"] = location.matrix
        tensors.update({f"{layer.name}.{name}": bias for name, bias in layer.biases.items()})
    return tensors


def find_lstms(model: Any, path: Path) -> list[OnnxLSTM]:
    """Every LSTM of a model, each under a name of its own.

    Raises:
        SlimLSTMError: the model is not what the format allows.
    """
    layers: list[OnnxLSTM] = []
    taken: set[str] = set()
    try:
        for layer in _layers(model.graph, None, {entry.domain: entry.version for entry in model.opset_import}):
            # The branches of an If may use one name twice.
            name, again = layer.name, itertools.count(2)
            while layer.name in taken:
                layer.name = f"{name}_{next(again)}"
            taken.add(layer.name)
            layers.append(layer)
    except SlimLSTMError:
        raise
    except Exception as error:  # a damaged file may hold anything that protocol buffers can say
        raise SlimLSTMError(f"{path} is no intact ONNX file: {error}") from error
    return layers


def graphs_of(graph: Any) -> Iterator[Any]:
    """A graph and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from graphs_of(inner)


def inner_graphs(node: Any) -> Iterator[Any]:
    """The graphs that a node holds."""
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.HasField("g") else attribute.graphs


def attribute_of(node: Any, name: str, default: Any = None) -> Any:
    """The value of an attribute of a node."""
    from onnx import helper

    return next((helper.get_attribute_value(found) for found in node.attribute if found.name == name), default)


def _layers(graph: Any, outer: Scope | None, opsets: Mapping[str, int]) -> Iterator[OnnxLSTM]:
    """Exporters cut and reorder PyTorch's weights by nodes; what these make of constants is worked out here."""
    from onnx import numpy_helper

    constants = outer.constants.new_child() if outer else ChainMap[str, Any]()
    scope = Scope(graph, constants, outer.producers.new_child() if outer else ChainMap[str, Any]())
    constants.update((tensor.name, numpy_helper.to_array(tensor)) for tensor in graph.initializer)
    users: dict[str, int] = {}
    for node in graph.node:
        scope.producers.update(dict.fromkeys(node.output, node))
        for name in node.input:
            users[name] = users.get(name, 0) + 1
    for node in graph.node:
        if node.op_type in _SHAPING and all(name in constants for name in node.input if name):
            constants.update(_results(node, constants, opsets))
        layer = None
        if node.op_type == "LSTM" and node.domain in ("", "ai.onnx"):
            layer = _operator(node, scope)
        elif node.op_type == "Split" and len(node.output) == 4:
            layer = _written_out(node, scope, users)
        if layer is not None:
            yield layer
        for inner in inner_graphs(node):
            yield from _layers(inner, scope, opsets)


def _operator(node: Any, scope: Scope) -> OnnxLSTM:
    weights = [_value(name, scope) for name in node.input[1:4]]
    w, r, b = [*weights, *[None] * (3 - len(weights))]
    name = node.name or next(output for output in node.output if output)
    if w is None or r is None:
        return OnnxLSTM(name, node, scope, problem=f"{name}: its weights are no constants of the file; it stays as it is")
    direction = attribute_of(node, "direction", b"forward").decode()
    if direction not in ENDINGS:
        raise SlimLSTMError(f"the LSTM {name} has the direction {direction!r}, which ONNX has not")
    endings = ENDINGS[direction]
    hidden = attribute_of(node, "hidden_size", r.shape[-1])
    _check_shapes(name, w, r, b, len(endings), hidden)
    layer = OnnxLSTM(name, node, scope)
    for index, ending in enumerate(endings):
        for kind, position, whole in (("weight_ih", 1, w), ("weight_hh", 2, r)):
            parts = _factors(node.input[position], scope, index, len(endings))
            matrix: Matrix = whole[index] if parts is None else parts
            matrix = _ordered(matrix, FROM_ONNX)
            storage = _storage(node.input[position], scope, index)
            location = WeightLocation(f"{kind}_l0{ending}", matrix, TO_ONNX, scope, node, position, index, storage=storage)
            layer.locations.append(location)
        if b is not None:
            for kind, bias in zip(("bias_ih", "bias_hh"), b[index].chunk(2), strict=True):
                layer.biases[f"{kind}_l0{ending}"] = reordered(bias, FROM_ONNX)
    return layer


def _check_shapes(name: str, w: Tensor, r: Tensor, b: Tensor | None, directions: int, hidden: int) -> None:
    fits = w.ndim == r.ndim == 3 and w.shape[:2] == r.shape[:2] == (directions, 4 * hidden) and r.shape[2] == hidden
    if not fits or hidden < 1 or w.shape[2] < 1 or (b is not None and b.shape != (directions, 8 * hidden)):
        found = ", ".join(str(list(part.shape)) for part in (w, r, b) if part is not None)
        raise SlimLSTMError(
            f"the weights of the LSTM {name} are {found}, not [D, 4H, I], [D, 4H, H] and [D, 8H] with D = {directions} and "
            f"H = {hidden}; the file is damaged"
        )


def _factors(name: str, scope: Scope, index: int, directions: int) -> tuple[Tensor, Tensor] | None:
    """U [m, r] and V [r, n] where a weight of the LSTM operator is a product of constants."""
    node = scope.producers.get(name)
    if node is not None and node.op_type == "Concat" and len(node.input) == directions > 1:
        node = scope.producers.get(node.input[index])
    elif directions > 1:
        return None
    if node is None or node.op_type != "MatMul":
        return None
    u, v = (_value(part, scope) for part in node.input)
    return None if u is None or v is None or u.ndim != 3 or v.ndim != 3 else (u[0], v[0])


def _storage(name: str, scope: Scope, index: int = 0) -> str | None:
    """What a constant is kept in before it is widened, where that is less."""
    while (node := scope.producers.get(name)) is not None:
        if node.op_type == "Cast":
            kept = scope.constants.get(node.input[0])
            kind = "" if kept is None else kept.dtype.name
            return kind if kind in ("int8", "bfloat16") else None
        if node.op_type not in ("Concat", "MatMul", "Mul"):
            return None
        name = node.input[index if node.op_type == "Concat" and index < len(node.input) else 0]
    return None


def _written_out(node: Any, scope: Scope, users: Mapping[str, int]) -> OnnxLSTM | None:
    """The LSTM whose gates a Split makes, or None where it makes something else."""
    gates, cell = _gates(node, scope)
    if gates is None:
        return None
    found = list(_products(node.input[0], scope, users))
    parts = sorted(found, key=lambda location: location.scope.graph is scope.graph)
    shapes = [shape_of(location.matrix) or (0, 0) for location in parts]
    rows = {shape[0] for shape in shapes}
    if len(parts) != 2 or len(rows) != 1 or min(rows) % 4 or not min(rows):
        return None
    hidden = min(rows) // 4
    recurrent = [location for location, shape in zip(parts, shapes, strict=True) if shape[1] == hidden]
    if not recurrent:
        return None
    # Where both have H columns, h comes from where c comes from, and x from further away.
    roots = _roots(cell, scope)
    hh = min(recurrent, key=lambda location: len(_roots(_entry(location), scope) ^ roots))
    ih = next(location for location in parts if location is not hh)
    names = [location.node.name or location.node.output[0] for location in (ih, hh)]
    prefix = _common_path(*names) or node.name or node.output[0]
    layer = OnnxLSTM(prefix, node, scope)
    for location, kind in ((ih, "weight_ih_l0"), (hh, "weight_hh_l0")):
        to_file = tuple(gates.index(gate) for gate in range(4))
        location.name, location.gates = kind, to_file
        location.matrix = _ordered(location.matrix, gates)
        layer.locations.append(location)
    return layer


def _common_path(first: str, second: str) -> str:
    """What two dotted or slashed names begin with alike, without the last separator."""
    count = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[: max(first.rfind("/", 0, count), first.rfind(".", 0, count), 0)]


def _entry(location: WeightLocation) -> str:
    return (location.source or location.node).input[0]


def _gates(split: Any, scope: Scope) -> tuple[tuple[int, ...] | None, str]:
    """Which outputs of a Split are i, f, g and o, and the name of c of the step before; None where they are no gates.

    c' = σ(f) c + σ(i) tanh(g) and h' = σ(o) tanh(c').
    """
    used: dict[str, list[Any]] = {}
    for node in scope.graph.node:
        for name in node.input:
            used.setdefault(name, []).append(node)

    def after(name: str, kind: str) -> list[Any]:
        return [node for node in used.get(name, []) if node.op_type == kind]

    squashed: dict[str, int] = {}
    tanh: list[str] = []
    for index, output in enumerate(split.output):
        for node in after(output, "Sigmoid") + after(output, "Tanh"):
            squashed[node.output[0]] = index
            tanh += [node.output[0]] if node.op_type == "Tanh" else []
    if len(squashed) != 4 or len(tanh) != 1:
        return None, ""
    for new in after(tanh[0], "Mul"):
        i = next((name for name in new.input if name in squashed and name != tanh[0]), None)
        for total in after(new.output[0], "Add"):
            other = next((name for name in total.input if name != new.output[0]), "")
            kept = scope.producers.get(other)
            if i is None or kept is None or kept.op_type != "Mul":
                continue
            f = next((name for name in kept.input if name in squashed and name not in (i, tanh[0])), None)
            o = next((name for name in squashed if name not in (i, f, tanh[0])), None)
            if f is not None and o is not None:
                cell = next((name for name in kept.input if name != f), "")
                return tuple(squashed[name] for name in (i, f, tanh[0], o)), cell
    return None, ""


def _products(name: str, scope: Scope, users: Mapping[str, int]) -> Iterator[WeightLocation]:
    """The products with constant matrices that are added up to a value."""
    seen, pending = set[str](), [name]
    while pending:
        name = pending.pop()
        node = scope.producers.get(name)
        # What other graphs make, and what has several names in a damaged one, is left alone.
        if name in seen or node is None or name in scope.constants or name not in scope.producers.maps[0]:
            continue
        seen.add(name)
        if node.op_type == "Add":
            pending += node.input
        elif node.op_type in ("MatMul", "Gemm") and len(node.input) >= 2:
            matrix = _value(node.input[1], scope)
            if matrix is None or matrix.ndim != 2 or attribute_of(node, "transA", 0):
                continue
            u = matrix if attribute_of(node, "transB", 0) else matrix.T
            location = WeightLocation("", u, (), scope, node, 1, storage=_storage(node.input[1], scope))
            inner = scope.producers.maps[0].get(node.input[0])
            v = None
            if inner is not None and inner.op_type == "MatMul" and users.get(node.input[0]) == 1:
                v = _value(inner.input[1], scope)
            if (
                v is not None
                and v.ndim == 2
                and v.shape[1] == u.shape[1]
                and v.shape[1] * sum(u.shape) < u.shape[0] * len(v)
            ):
                location.matrix, location.source = (u, v.T), inner
            yield location


def _roots(name: str, scope: Scope) -> set[str]:
    """The inputs of the graph, and values from outside, that a value depends on."""
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


def reordered(tensor: Tensor, gates: Sequence[int]) -> Tensor:
    """The quarters of a tensor's rows in another order."""
    chunks = tensor.chunk(4)
    return torch.cat([chunks[gate] for gate in gates])


def _ordered(matrix: Matrix, gates: Sequence[int]) -> Matrix:
    return reordered(matrix, gates) if isinstance(matrix, Tensor) else (reordered(matrix[0], gates), matrix[1].contiguous())


def _value(name: str, scope: Scope) -> Tensor | None:
    array = scope.constants.get(name) if name else None
    if array is None:
        return None
    if array.dtype.name == "bfloat16":  # which NumPy does not know
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _results(node: Any, constants: Mapping[str, Any], opsets: Mapping[str, int]) -> dict[str, Any]:
    """What a node makes of constants; nothing where it cannot be worked out, and what hangs on it is left out."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    inputs = {name: constants[name] for name in node.input if name}
    if sum(array.nbytes for array in inputs.values()) > _LARGEST:
        return {}
    values = [helper.make_empty_tensor_value_info(name) for name in inputs]
    results = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "node", values, results)
    imports = [helper.make_opsetid(domain, number) for domain, number in opsets.items()]
    try:
        evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=imports))
        return dict(zip(node.output, evaluator.run(None, inputs), strict=True))
    except Exception:  # the evaluator raises whatever NumPy does
        return {}
