"""Models with dense and compressed LSTMs as plain ONNX files, which need no operators of ours.

While PyTorch's exporter follows a model, every recurrence is one node that stands for it, so that time and batch stay
open; afterwards :mod:`slimlstm.onnx.layers` puts ONNX's LSTM or a Scan in the node's place.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]  # the public name is of newer versions

from slimlstm.calibration.observe import build_like, forwards_replaced
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.hosts import Host, find_hosts
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.modes import evaluation_mode
from slimlstm.modules.shapes import LSTMState
from slimlstm.onnx.layers import Graph, Ports, add_layer
from slimlstm.ops.weights import Direction

TOLERANCE = 1e-4
"""How far outputs may be from PyTorch's, absolutely and relative to their size."""
INT8_TOLERANCE = 0.05
"""The same relative to an output's norm, where weights are int8 and inputs are rounded as they come: by that alone cell
states of trained models are 2% away from exact ones, and a number that is rounded the other way moves all that follow."""

_DOMAIN, _NODE = "slimlstm", "Recurrence"
_LARGEST = 2**31 - 1

Shape = tuple[Any, ...]
"""Sizes: integers, or what is known of them while they are open."""
Call = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        inputs, outputs: shapes by name; sizes that are left open have names.
        bytes: of the file.
        checked: the sizes of open axes, by name, at which the file's outputs were compared with the model's.
        difference: the largest found, relative to the outputs' norm.
        engine: what ran the file: ONNX Runtime, or the slow reference of the onnx package where that is not installed.
    """

    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    bytes: int
    checked: list[dict[str, int]]
    difference: float
    engine: str


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
) -> Exported:
    """Writes a model as an ONNX file that any runtime reads, and compares its outputs with the model's before.

    The model runs in evaluation mode and does not change. States that go in and come out, in tuples, lists or mappings too,
    become inputs and outputs, one a tensor. Weights stored in int8 or bfloat16 stay so in the file.

    Args:
        model: any module that PyTorch can export; its LSTMs dense, factored, masked or quantised.
        example_inputs: a tensor, a tuple of the model's arguments, or a mapping of named ones. Each axis that can vary
            stays open if it has a size of 2 or more here: an axis of size 1 is taken to be always so.
        path: the file, whose folder is made where it is missing; replaced in one step, after everything was checked.
        input_names, output_names: one a tensor; by default those of the model's arguments, and PyTorch's for outputs.
        dynamic_shapes: as of ``torch.export.export``, where only certain axes are to stay open.

    Raises:
        SlimLSTMError: PyTorch is older than 2.8, the model cannot be exported, names do not fit or an axis that
            ``dynamic_shapes`` names cannot stay open, outputs differ from the file's by more than ``TOLERANCE`` or cannot
            be compared at other sizes than the example's, or the file would be larger than the 2 GiB that it can have.
        ImportError: onnx or onnxscript is not installed.
    """
    if not hasattr(torch.onnx, "ops"):
        raise SlimLSTMError(f"export takes PyTorch 2.8 or newer, and this is {torch.__version__}")
    arguments, named = _arguments(example_inputs)
    _check_example([value for value in pytree.tree_leaves((arguments, named)) if isinstance(value, Tensor)], input_names)
    # A model that is an LSTM itself has no place to be replaced in, but need not be replaced.
    hosts = find_hosts(nn.ModuleDict({"model": model}) if isinstance(model, nn.LSTM | nn.LSTMCell) else model)
    problem = next((host.problem for host in hosts if host.problem is not None), None)
    if problem is not None:
        raise SlimLSTMError(problem)
    layers = list[Sequence[Direction]]()
    modules = [(host.lstm, _written(host, layers)) for host in hosts]
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        with forwards_replaced(modules), _quiet():
            program = _followed(model, arguments, named, input_names, output_names, dynamic_shapes)
        shapes, sizes, closed = _axes(program)
        proto = _complete(program, layers, closed)
        _check_open(_shapes(proto.graph.input), dynamic_shapes)
        content: bytes = proto.SerializeToString()
        run, engine = _runner(content)
        is_rounded = any("int8" in (one.ih_storage, one.hh_storage) for layer in layers for one in layer)
        checked, difference = _check(model, arguments, named, run, shapes, sizes, is_rounded)
    _write(Path(path), content)
    return Exported(_shapes(proto.graph.input), _shapes(proto.graph.output), len(content), checked, difference, engine)


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(file.name + ".part")
    try:
        draft.write_bytes(content)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


class _WrittenLSTM(LowRankLSTM):
    numbers: list[int]

    def _run(self, x: Tensor, batch_sizes: Tensor | None, hx: LSTMState | None) -> tuple[Tensor, LSTMState]:
        if batch_sizes is not None:
            raise SlimLSTMError("packed sequences cannot be written to ONNX; export the model for padded ones")
        count = self._directions
        if hx is None:
            shape = self.num_layers * count, x.shape[1]
            hx = x.new_zeros(*shape, self.proj_size or self.hidden_size), x.new_zeros(*shape, self.hidden_size)
        last: list[LSTMState] = []
        for layer, number in enumerate(self.numbers):
            part = slice(layer * count, (layer + 1) * count)
            x, h, c = _node(x, hx[0][part], hx[1][part], number)
            last.append((h, c))
        return x, (torch.cat([h for h, _ in last]), torch.cat([c for _, c in last]))


class _WrittenCell(LowRankLSTMCell):
    numbers: list[int]

    def _step(self, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Direction]) -> LSTMState:
        _, h, c = _node(x[None], h[None], c[None], self.numbers[0])
        return h[0], c[0]


def _node(x: Tensor, h0: Tensor, c0: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The node that stands for a recurrence: y [T, B, D P], h and c."""
    steps, batch, _ = x.shape
    y, h, c = torch.onnx.ops.symbolic_multi_out(
        f"{_DOMAIN}::{_NODE}",
        (x, h0, c0),
        {"number": number},
        dtypes=(x.dtype, h0.dtype, c0.dtype),
        shapes=((steps, batch, h0.shape[0] * h0.shape[2]), h0.shape, c0.shape),
        version=1,
    )
    return y, h, c


def _written(host: Host, layers: list[Sequence[Direction]]) -> nn.Module:
    """What takes the place of the host while it is followed; its layers get the next numbers in ``layers``."""
    module = build_like(host, _WrittenLSTM, _WrittenCell, host.weight)
    module.storages = dict(getattr(host.lstm, "storages", {}))
    own = module.layers()
    module.numbers = list(range(len(layers), len(layers) + len(own)))
    layers += own
    return module


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(cast(Mapping[str, Any], example_inputs))
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def _check_example(tensors: Sequence[Tensor], input_names: Sequence[str] | None) -> None:
    empty = next((list(tensor.shape) for tensor in tensors if tensor.numel() == 0), None)
    if empty is not None:
        raise SlimLSTMError(
            f"an example input of shape {empty} holds nothing; give one with at least one step and sequence"
        )
    if input_names is not None:
        _check_names("input", input_names, len(tensors))


def _check_names(kind: str, names: Sequence[str], count: int) -> None:
    if len(names) != count or len(set(names)) != count or isinstance(names, str):
        raise SlimLSTMError(
            f"{kind}_names are {list(names)}; the model has {count} {kind} tensors, each takes a name of its own"
        )


def _check_outputs(graph: Any, names: Sequence[str] | None) -> None:
    inputs, outputs = ([value.name for value in values] for values in (graph.inputs, graph.outputs))
    if names is not None:
        _check_names("output", names, len(outputs))
    both = [name for name in outputs if name in inputs]
    if both:
        raise SlimLSTMError(f"{both[0]!r} is the name of an input and of an output, which ONNX cannot have; rename one")


def _check_open(shapes: Mapping[str, Sequence[int | str]], dynamic_shapes: Any) -> None:
    """PyTorch's exporter closes axes that were to stay open where the model wants it, and says nothing."""
    asked = {axis.__name__ for axis in _named_axes(dynamic_shapes)}
    closed = sorted(asked - {str(size) for shape in shapes.values() for size in shape})
    if closed:
        raise SlimLSTMError(
            f"the axis {closed[0]} was to stay open, but the model runs at the example's size only; inputs are {shapes}"
        )


def _named_axes(shapes: Any) -> list[Any]:
    """The ``torch.export.Dim`` with names of their own in what was given as dynamic shapes."""
    parts: list[Any] = []
    if isinstance(shapes, Mapping):
        parts = list(cast(Mapping[Any, Any], shapes).values())
    elif isinstance(shapes, list | tuple):
        parts = list(cast(Sequence[Any], shapes))
    own = [shapes] if type(shapes) is torch.export.Dim else []
    return own + [axis for part in parts for axis in _named_axes(part)]


def _followed(
    model: nn.Module,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    dynamic_shapes: Any,
) -> Any:
    if dynamic_shapes is None:
        dynamic_shapes = pytree.tree_map(_all_open, named or arguments)
    try:
        program = torch.onnx.export(
            model,
            arguments,
            kwargs=named,
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            verbose=False,
        )
    except (ImportError, SlimLSTMError):
        raise
    except Exception as error:  # what PyTorch's exporter raises is as varied as the models
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(cast(Exception, causes[-1].__cause__))
        ours = next((cause for cause in causes if isinstance(cause, SlimLSTMError)), None)
        lines = [line.strip() for line in str(causes[-1]).splitlines() if line.strip()]
        reason = str(ours) if ours is not None else f"{type(causes[-1]).__name__}: {lines[0] if lines else ''}"
        raise SlimLSTMError(f"PyTorch cannot follow the model: {reason}") from error
    if program is None:
        raise SlimLSTMError("PyTorch's exporter gave nothing back")
    _check_outputs(program.model.graph, output_names)
    return program


def _all_open(value: Any) -> Any:
    return dict.fromkeys(range(value.ndim), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None


def _complete(program: Any, layers: Sequence[Sequence[Direction]], closed: Mapping[str, int]) -> Any:
    """The model with a recurrence in the place of every node that stands for one; ``closed`` are sizes by name."""
    import onnx

    proto = program.model_proto
    graph, nodes = proto.graph, list(proto.graph.node)
    for entry in (*graph.input, *graph.output, *graph.value_info):
        for axis in entry.type.tensor_type.shape.dim:
            if axis.dim_param in closed:
                axis.dim_value = closed[axis.dim_param]
    names = {name for node in nodes for name in (node.name, *node.input, *node.output)}
    names |= {entry.name for entry in (*graph.input, *graph.output, *graph.initializer)}
    prefix = "lstm"
    while any(name.startswith(prefix) for name in names):
        prefix += "_"
    known = Graph(prefix)
    del graph.node[:]
    for node in nodes:
        if (node.domain, node.op_type) == (_DOMAIN, _NODE):
            known.nodes.clear()
            add_layer(known, layers[onnx.helper.get_node_attr_value(node, "number")], Ports(*node.input, *node.output))
            graph.node.extend(known.nodes)
        else:
            graph.node.append(node)
    graph.initializer.extend(known.constants)
    opsets = [entry for entry in proto.opset_import if entry.domain != _DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
    if proto.ByteSize() > _LARGEST:
        raise SlimLSTMError(f"the model takes {proto.ByteSize():,} bytes, and one ONNX file can have {_LARGEST:,} at most")
    onnx.checker.check_model(proto)
    return proto


def _axes(program: Any) -> tuple[list[Shape], dict[Any, tuple[int, int]], dict[str, int]]:
    """The shape of every input, sizes that are open as symbols; least and most of each; what is closed, by name."""
    exported = program.exported_program
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    ranges = exported.range_constraints
    # An axis that has to have size 1 is given as one of 1 or 2.
    closed = {symbol: int(limits.lower) for symbol, limits in ranges.items() if limits.upper - limits.lower <= 1}

    def known(size: Any) -> Any:
        size = size.node.expr if isinstance(size, torch.SymInt) else size
        return closed.get(size, size)

    shapes = [
        tuple(known(size) for size in values[name].shape)
        for name in exported.graph_signature.user_inputs
        if isinstance(values.get(name), Tensor)
    ]
    symbols = {symbol for shape in shapes for size in shape for symbol in getattr(size, "free_symbols", ())}
    limits = {
        symbol: (max(1, int(ranges[symbol].lower)), int(min(ranges[symbol].upper, _LARGEST)))
        for symbol in sorted(symbols, key=str)
        if symbol in ranges
    }
    return shapes, limits, {str(symbol): size for symbol, size in closed.items()}


def _runner(content: bytes) -> tuple[Call, str]:
    """What runs a model on its inputs in their order, and what it is called."""
    try:
        import onnxruntime
    except ImportError:
        import onnx
        from onnx.reference import ReferenceEvaluator

        model = onnx.load_from_string(content)
        names, engine = [entry.name for entry in model.graph.input], "onnx reference"
        start = ReferenceEvaluator(model).run
    else:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names, engine, start = [entry.name for entry in session.get_inputs()], "ONNX Runtime", session.run

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = {name: tensor.cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
        try:
            outputs = cast(Any, start)(None, given)
        except Exception as error:  # each engine raises classes of its own
            shapes = {name: list(array.shape) for name, array in given.items()}
            raise SlimLSTMError(f"{engine} cannot run the file at {shapes}: {error}; nothing was written") from error
        return [torch.as_tensor(output) for output in outputs]

    return run, engine


def _check(
    model: nn.Module,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    run: Call,
    shapes: list[Shape],
    limits: dict[Any, tuple[int, int]],
    is_rounded: bool,
) -> tuple[list[dict[str, int]], float]:
    """Compares outputs at the example's sizes, at others, and with all open axes at their least."""
    flat, spec = pytree.tree_flatten((arguments, named))
    places = [index for index, value in enumerate(flat) if isinstance(value, Tensor)]
    example = _sizes_of([flat[index] for index in places], shapes)
    larger = {symbol: min(example[symbol] + 2 + number, limits[symbol][1]) for number, symbol in enumerate(limits)}
    least = {symbol: low for symbol, (low, _) in limits.items()}
    checked, largest = list[dict[str, int]](), 0.0
    for sizes in (example, larger, least) if limits else (example,):
        values = list(flat)
        for index, shape in zip(places, shapes, strict=True):
            values[index] = (
                _like(flat[index], [_size(size, sizes) for size in shape]) if sizes is not example else flat[index]
            )
        args, kwargs = pytree.tree_unflatten(values, spec)
        try:
            expected = [value for value in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(value, Tensor)]
        except Exception:  # a convolution, say, needs more than one step
            if sizes is example:
                raise
            continue
        found = run([values[index] for index in places])
        largest = max(largest, _compare(expected, found, sizes, is_rounded))
        checked.append({str(symbol): size for symbol, size in sizes.items()})
    if limits and len(checked) == 1:
        raise SlimLSTMError(
            f"the model runs at the example's sizes {checked[0]}, but neither at larger ones nor at the least, so that the "
            "file could not be checked; give dynamic_shapes for what may vary"
        )
    return checked, largest


def _sizes_of(tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for tensor, shape in zip(tensors, shapes, strict=True):
        found.update({size: actual for size, actual in zip(shape, tensor.shape, strict=True) if not isinstance(size, int)})
    return {symbol: size for symbol, size in found.items() if getattr(symbol, "is_symbol", False)}


def _size(size: Any, sizes: Mapping[Any, int]) -> int:
    return size if isinstance(size, int) else int(size.subs(sizes))


def _like(example: Tensor, shape: Sequence[int]) -> Tensor:
    """Numbers such as the example has, in another shape; random ones for an example of equal numbers."""
    if example.is_floating_point() and bool((example == example.flatten()[0]).all()):
        return torch.randn(shape, dtype=example.dtype, device=example.device)
    return example.flatten()[torch.randint(example.numel(), tuple(shape))]


def _compare(expected: Sequence[Tensor], found: Sequence[Tensor], sizes: Mapping[Any, int], is_rounded: bool) -> float:
    """The largest difference relative to an output's norm.

    Raises:
        SlimLSTMError: it is too large, or shapes differ.
    """
    at = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
    if [list(one.shape) for one in expected] != [list(one.shape) for one in found]:
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (expected, found)]
        raise SlimLSTMError(
            f"at {at} the model's outputs are of shapes {shapes[0]}, the file's {shapes[1]}; nothing written"
        )
    largest = 0.0
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        if not one.is_floating_point():
            if not is_rounded and not bool((one.cpu() == other).all()):
                raise SlimLSTMError(f"output {index} differs from the model's at {at}; nothing was written")
            continue
        exact, written = one.detach().cpu().double(), other.double()
        relative = float((exact - written).norm() / exact.norm().clamp_min(1e-30))
        is_near = relative <= INT8_TOLERANCE if is_rounded else written.allclose(exact, TOLERANCE, TOLERANCE, True)
        if not is_near:
            raise SlimLSTMError(
                f"output {index} differs from the model's by {relative:.2g} of its norm at {at}; nothing was written"
            )
        largest = max(largest, relative)
    return largest


def _shapes(entries: Any) -> dict[str, list[int | str]]:
    return {
        entry.name: [axis.dim_param or int(axis.dim_value) for axis in entry.type.tensor_type.shape.dim]
        for entry in entries
    }


@contextmanager
def _quiet() -> Generator[None]:
    """Without the exporter's advice on packages and classes that are not the user's."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
