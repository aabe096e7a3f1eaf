"""Write models with dense and compressed LSTMs as plain ONNX files, without operators of our own."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]  # the public name is of newer versions

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.files import check_file_name, path_of, replacing
from slimlstm.methods import storage_called
from slimlstm.modules.host import Host
from slimlstm.modules.hosts import find_hosts
from slimlstm.modules.modes import evaluation_mode, plain_defaults, plain_mode
from slimlstm.modules.state import KeptState, kept_state
from slimlstm.onnx.builder import INT4_OPSET, GraphBuilder
from slimlstm.onnx.forms import Form, check_form
from slimlstm.onnx.layers import Ports, add_layer
from slimlstm.onnx.opsets import check_opset, converted, opset_of, traced_opset
from slimlstm.onnx.trace import DOMAIN, PLACEHOLDER, Traced, trace
from slimlstm.onnx.verify import INT8_TOLERANCE, TOLERANCE, Bound, Comparison, compare, is_known_to_numpy, start

_LARGEST = 2**31 - 1
"""Bytes that one ONNX file can hold."""


@dataclass(frozen=True)
class Exported:
    """Description of a file that :func:`export_onnx` wrote.

    Attributes:
        inputs: the shapes of the inputs by name; open sizes are names.
        outputs: the shapes of the outputs by name.
        bytes: the bytes of the file.
        checked: the sizes of open axes, by name, at which the file's outputs were compared with the model's.
        difference: the largest difference of an output, relative to its norm.
        engine: the engine that ran the file: ONNX Runtime, or the slow reference of onnx where ONNX Runtime is not
            installed.
        opset: the version of ONNX's operators.
        forms: the form of every layer in the order of the model, ``"lstm"`` or ``"scan"``, and the reason; see
            :func:`slimlstm.onnx.forms.choose_form`.
        notes: the sizes at which the file is not valid, because the model's code depends on them.
    """

    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    bytes: int
    checked: list[dict[str, int]]
    difference: float
    engine: str
    opset: int
    forms: list[str]
    notes: list[str] = field(default_factory=list[str])


@plain_mode()
def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    tolerance: float | None = None,
    form: str = "auto",
) -> Exported:
    """Write a model as an ONNX file for any runtime, after comparing the file's outputs with the model's.

    The model runs in evaluation mode and does not change. Every tensor that it takes or returns becomes an input or output
    of the file, also states in tuples, lists or mappings. Factors stay factors, and weights stored in int8 or bfloat16 keep
    this storage in the file.

    Args:
        model: any module that PyTorch can export; its LSTMs may be dense, factored, masked or quantised.
        example_inputs: a tensor, a tuple of the model's arguments, or a mapping of named arguments. An axis of size 2 or
            more stays open if the model allows other sizes; PyTorch may close an axis of size 1.
        path: the file to write. A missing folder is made, and an existing file is replaced at the very end.
        input_names: a name for every input tensor; by default the names of the model's arguments.
        output_names: a name for every output tensor; by default PyTorch's.
        dynamic_shapes: as for ``torch.export.export``, to leave only certain axes open.
        opset: the version of ONNX's operators, from 13 on. By default it is PyTorch's choice; for weights of 3 or 4 bits it
            is 21, the first opset with integers of 4 bits. Older runtimes need older opsets, in which such weights take a
            byte each.
        tolerance: the largest difference accepted. For each number, the difference is relative to the largest magnitude in
            its output or to 1, and the default is 1e-4. Where weights are int8, the difference of a whole output is
            relative to its norm, and the default is 0.05.
        form: how layers are written. ``"lstm"`` takes the LSTM operator, for which a runtime multiplies factors and widens
            integers once, when it loads the file; it then runs as fast as the dense layer. ``"scan"`` takes a Scan over
            time, whose steps multiply by the factors, and by int8 weights as integers. ``"auto"`` takes the form that ONNX
            Runtime is predicted to run faster, layer by layer.

    Returns:
        A description of the file: its inputs, outputs, size and forms, and how it was checked.

    Raises:
        SlimLSTMError: PyTorch is older than 2.8, ``path`` is a folder, the model cannot be exported, names do not fit, an
            axis that ``dynamic_shapes`` names cannot stay open, the opset lacks an operator, ``form="lstm"`` cannot compute
            a layer, outputs differ by more than the tolerance or cannot be compared at other sizes than the example's, or
            the file would exceed 2 GiB.
        ImportError: onnx or onnxscript is not installed.

    Examples:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "small.onnx"
        >>> found = export_onnx(nn.LSTM(3, 4), torch.randn(5, 2, 3), path, input_names=["x"], output_names=["y", "h", "c"])
        >>> found.inputs["x"][2], list(found.outputs), path.exists()
        (3, ['y', 'h', 'c'], True)
    """
    path = _checked_path(path, opset, form)
    arguments, named = _arguments(example_inputs)
    _check_example([value for value in pytree.tree_leaves((arguments, named)) if isinstance(value, Tensor)], input_names)
    hosts = _hosts(model)
    if opset is None and any(_is_int4(host.lstm) for host in hosts):
        opset = INT4_OPSET
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]), _kept_state(model) as state:
        traced = trace(
            model,
            hosts,
            arguments,
            named,
            opset=traced_opset(opset),
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
        )
        state.restore()
        _check_outputs(traced.program.model.graph, output_names)
        with plain_defaults():
            proto, forms = _complete(traced, opset, form)
            inputs = _shapes(proto.graph.input)
            _check_open(inputs, dynamic_shapes)
            content: bytes = proto.SerializeToString()
            checked, engine = _compared(model, (arguments, named), traced, content, tolerance, state)
    with replacing(path) as draft:
        draft.write_bytes(content)
    return Exported(
        inputs=inputs,
        outputs=_shapes(proto.graph.output),
        bytes=len(content),
        checked=checked.sizes,
        difference=checked.difference,
        engine=engine,
        opset=opset_of(proto),
        forms=[*map(str, forms)],
        notes=_notes(traced.limits),
    )


def _checked_path(path: str | os.PathLike[str], opset: int | None, form: str) -> Path:
    """Return the path of a call, or raise :class:`SlimLSTMError` if an argument cannot be used or PyTorch is too old."""
    if not hasattr(torch.onnx, "ops"):
        raise SlimLSTMError(f"export needs PyTorch 2.8 or newer, and this is {torch.__version__}")
    path = path_of(path, "path", "name the file to write; call export_onnx(model, example_inputs, path)")
    check_file_name(path)
    check_opset(opset)
    check_form(form)
    return path


def _compared(
    model: nn.Module, inputs: Any, traced: Traced, content: bytes, tolerance: float | None, state: KeptState
) -> tuple[Comparison, str]:
    """Return how the file's outputs compare with the model's, and the engine that ran the file."""
    run, engine = start(content)
    bound = _bound(traced, tolerance)
    checked = compare(model, inputs, run, traced.shapes, traced.limits, bound)
    if state.changed():
        # Tensors that a model only shows, such as attention weights, do not matter to a second call.
        compare(model, inputs, run, traced.shapes, {}, bound)
    return checked, engine


@contextmanager
def _kept_state(model: nn.Module) -> Generator[KeptState]:
    """Restore the model's state after the block; an error of the block then names a tensor that had changed."""
    with kept_state(model) as state:
        try:
            yield state
        except SlimLSTMError as error:
            name = state.changed()
            if not name:
                raise
            raise SlimLSTMError(
                f"the model keeps {name} from call to call, and an ONNX file keeps nothing; take it as an argument and "
                f"return its new value, so that it becomes an input and an output. The export ended with: {error}"
            ) from error


def _hosts(model: nn.Module) -> list[Host]:
    """Return a model's LSTMs; the model itself may be one.

    Raises:
        SlimLSTMError: an LSTM cannot be written.
    """
    hosts = find_hosts(nn.ModuleDict({"model": model}) if isinstance(model, nn.LSTM | nn.LSTMCell) else model)
    problem = next((host.problem for host in hosts if host.problem is not None), None)
    if problem is not None:
        raise SlimLSTMError(problem)
    return hosts


def _notes(limits: Mapping[Any, tuple[int, int]]) -> list[str]:
    """Return, in words, the sizes at which the file is not valid."""
    bounds = [(symbol, f"below {low}") for symbol, (low, _) in limits.items() if low > 1]
    bounds += [(symbol, f"above {high}") for symbol, (_, high) in limits.items() if high < 2**31 - 1]
    return [
        f"the model's code takes another branch where {symbol} is {bound}; the file holds the example's branch only"
        for symbol, bound in bounds
    ]


def _is_int4(lstm: nn.Module) -> bool:
    """Return whether any matrix of a module has codes of at most 4 bits."""
    storages: Iterable[str] = getattr(lstm, "storages", {}).values()
    return any((storage_called(storage).bits or 8) <= 4 for storage in storages)


def _bound(traced: Traced, tolerance: float | None) -> Bound:
    storages = {storage for layer in traced.layers for one in layer for storage in (one.ih_storage, one.hh_storage)}
    is_int8 = any(storage_called(storage).kernel_format == "int8" for storage in storages)
    default = INT8_TOLERANCE if is_int8 else TOLERANCE
    return Bound(default if tolerance is None else tolerance, is_int8)


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments by position and by name, without gradients, which PyTorch's exporter cannot trace."""
    example_inputs = pytree.tree_map_only(Tensor, Tensor.detach, example_inputs)
    if isinstance(example_inputs, Mapping):
        return (), dict(cast(Mapping[str, Any], example_inputs))
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def _check_example(tensors: Sequence[Tensor], input_names: Sequence[str] | None) -> None:
    unknown = next((tensor.dtype for tensor in tensors if not is_known_to_numpy(tensor.dtype)), None)
    if unknown is not None:
        raise SlimLSTMError(
            f"an example input is of {unknown}, which NumPy lacks, so the file could not be run and checked; give float32, "
            "and cast it to this dtype within the model"
        )
    empty = next((list(tensor.shape) for tensor in tensors if tensor.numel() == 0), None)
    if empty is not None:
        raise SlimLSTMError(
            f"an example input has the shape {empty}, which holds no numbers; give at least one step and one sequence"
        )
    if input_names is not None:
        _check_names("input", input_names, len(tensors))


def _check_names(kind: str, names: Sequence[str], count: int) -> None:
    if len(names) != count or len(set(names)) != count or isinstance(names, str):
        raise SlimLSTMError(
            f"{kind}_names are {list(names)}, but the model has {count} {kind} tensors, which need one distinct name each"
        )


def _check_outputs(graph: Any, names: Sequence[str] | None) -> None:
    inputs, outputs = ([value.name for value in values] for values in (graph.inputs, graph.outputs))
    if names is not None:
        _check_names("output", names, len(outputs))
    both = [name for name in outputs if name in inputs]
    if both:
        raise SlimLSTMError(
            f"{both[0]!r} names an input and an output, which ONNX forbids; rename one by input_names= or output_names="
        )


def _check_open(shapes: Mapping[str, Sequence[int | str]], dynamic_shapes: Any) -> None:
    """Raise :class:`SlimLSTMError` if PyTorch's exporter has silently closed an axis that the caller named."""
    asked = {axis.__name__ for axis in _named_axes(dynamic_shapes)}
    closed = sorted(asked - {str(size) for shape in shapes.values() for size in shape})
    if closed:
        raise SlimLSTMError(
            f"the axis {closed[0]} cannot stay open, because the model's code depends on its size; the inputs are "
            f"{shapes}. Leave it out of dynamic_shapes=, or make the model independent of that size"
        )


def _named_axes(shapes: Any) -> list[Any]:
    """Return every named ``torch.export.Dim`` in dynamic shapes."""
    parts: list[Any] = []
    if isinstance(shapes, Mapping):
        parts = list(cast(Mapping[Any, Any], shapes).values())
    elif isinstance(shapes, list | tuple):
        parts = list(cast(Sequence[Any], shapes))
    own = [shapes] if type(shapes) is torch.export.Dim else []
    return own + [axis for part in parts for axis in _named_axes(part)]


def _complete(traced: Traced, opset: int | None, form: str) -> tuple[Any, list[Form]]:
    """Return the model with a recurrence for every placeholder, and the forms of the layers."""
    from onnx import checker, helper

    proto = traced.program.model_proto
    _close_axes(proto.graph, traced.closed)
    proto = converted(proto, opset)
    graph, nodes = proto.graph, list(proto.graph.node)
    builder = GraphBuilder(_unused_prefix(graph), opset=opset_of(proto))
    complete, forms = list[Any](), dict[int, Form]()
    for node in nodes:
        if (node.domain, node.op_type) == (DOMAIN, PLACEHOLDER):
            builder.nodes.clear()
            number: int = helper.get_node_attr_value(node, "number")
            forms[number] = add_layer(builder, traced.layers[number], Ports(*node.input, *node.output), form=form)
            complete += builder.nodes
        else:
            complete.append(node)
    del graph.node[:]
    graph.node.extend(complete)
    graph.initializer.extend(builder.constants)
    opsets = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
    if proto.ByteSize() > _LARGEST:
        raise SlimLSTMError(
            f"the file would take {proto.ByteSize():,} bytes, and one ONNX file can hold {_LARGEST:,}; compress the model"
        )
    try:
        checker.check_model(proto)
    except checker.ValidationError as error:
        if opset is None:
            raise
        raise SlimLSTMError(f"the model does not fit opset {opset} ({reason_of(error)}); give a newer opset=") from error
    return proto, [forms[number] for number in sorted(forms)]


def _close_axes(graph: Any, closed: Mapping[str, int]) -> None:
    """Replace the names of sizes that have only one possible value by this value."""
    for entry in (*graph.input, *graph.output, *graph.value_info):
        for axis in entry.type.tensor_type.shape.dim:
            if axis.dim_param in closed:
                axis.dim_value = closed[axis.dim_param]


def _unused_prefix(graph: Any) -> str:
    """Return a prefix that no name of the graph begins with."""
    names = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    names |= {entry.name for entry in (*graph.input, *graph.output, *graph.initializer)}
    prefix = "lstm"
    while any(name.startswith(prefix) for name in names):
        prefix += "_"
    return prefix


def _shapes(entries: Any) -> dict[str, list[int | str]]:
    return {
        entry.name: [axis.dim_param or int(axis.dim_value) for axis in entry.type.tensor_type.shape.dim]
        for entry in entries
    }
