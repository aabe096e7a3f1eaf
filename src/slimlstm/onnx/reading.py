"""Read ONNX files, with the weights that they store in other files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slimlstm.errors import SlimLSTMError, refusing
from slimlstm.files import check_file_name, check_holds_model, check_memory, check_not_input, check_regular, memory_limit_of
from slimlstm.onnx.graph import graphs_of, inner_nodes

# LSTM operators, and the operator that every LSTM written out in single operators contains.
_LSTM_PARTS = {"LSTM", "DynamicQuantizeLSTM", "Split"}
LARGEST_FILE = 2**31 - 1
"""Bytes that one ONNX file can hold."""


def read_model(path: Path) -> Any:
    """Return the ONNX model in a file, with the weights that it stores in other files.

    Raises:
        SlimLSTMError: onnx is not installed, or the file is missing or damaged.
    """
    model = _without_outside(path)
    import onnx

    with refusing(f"{path} is no intact ONNX file"):
        for file in _outside_files(model, path):
            check_regular(file)
        _check_largest(model.ByteSize() + sum(_outside_bytes(tensor, path) for tensor in outside_tensors(model)), path)
        onnx.load_external_data_for_model(model, str(path.parent))
        return _with_lstms_inlined(model)


def check_onnx_output(path: Path, output: Path) -> None:
    """Refuse to write an ONNX file over a folder, over the file that is read or its weights, or without an ending.

    Raises:
        SlimLSTMError: ``output`` is one of these; or see :func:`read_model`.
    """
    if not output.suffix:
        raise SlimLSTMError(f"{output} is no name of a file; name one that ends in .onnx")
    check_file_name(output)
    check_not_input(path, output)
    if not output.exists():
        return
    for file in files_of(path)[1:]:
        if file.exists() and output.samefile(file):
            raise SlimLSTMError(f"{output} holds weights of the input {path}, which would be lost; name another output")


def files_of(path: Path) -> list[Path]:
    """Return an ONNX file and the files that hold its other weights.

    Raises:
        SlimLSTMError: see :func:`read_model`.
    """
    return [path, *_outside_files(_without_outside(path), path)]


def bytes_on_disk(path: Path) -> int:
    """Return the bytes of an ONNX file and of the files that hold its other weights.

    Raises:
        SlimLSTMError: see :func:`read_model`.
    """
    files = files_of(path)
    for file in files:
        check_regular(file)
    return sum(file.stat().st_size for file in {file.resolve() for file in files})


def _without_outside(path: Path) -> Any:
    """Return the ONNX model in a file, without the weights that it stores in other files."""
    try:
        import onnx
    except ImportError as error:
        raise SlimLSTMError("onnx, which reads ONNX files, is not installed: pip install 'slimlstm[onnx]'") from error
    check_holds_model(path)
    _check_largest(path.stat().st_size, path)
    with refusing(f"{path} is no intact ONNX file"):
        model = onnx.load(path, load_external_data=False)
        _check_text(model)
    return model


def _check_largest(size: int, path: Path) -> None:
    """Raise :class:`SlimLSTMError` if a model with its outside weights takes more bytes than one file can hold."""
    if size > LARGEST_FILE:
        raise SlimLSTMError(
            f"{path} with its weights in other files takes {size:,} bytes, more than the {LARGEST_FILE:,} that one ONNX "
            "file can hold and slimlstm reads; divide the model, or compress its weights before the export"
        )


def _outside_bytes(tensor: Any, path: Path) -> int:
    """Return the bytes that a tensor has in another file: a given length, or the rest of the file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if "length" in entries:
        return int(entries["length"])
    return (path.parent / entries.get("location", "")).stat().st_size - int(entries.get("offset", 0))


def _outside_files(model: Any, path: Path) -> list[Path]:
    """Return the files that hold weights of the model in ``path``, each once."""
    places = [
        next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        for tensor in outside_tensors(model)
    ]
    return [path.parent / place for place in dict.fromkeys(places)]


def _check_text(message: Any) -> None:
    """Raise :class:`ValueError` if a name in a protobuf message is not UTF-8; protobuf returns such names as bytes."""
    for entry, value in message.ListFields():
        values = [value] if isinstance(value, (str, bytes)) or hasattr(value, "ListFields") else value
        if entry.type == entry.TYPE_MESSAGE:
            for inner in values:
                _check_text(inner)
        elif entry.type == entry.TYPE_STRING:
            for text in values:
                if not isinstance(text, str):
                    raise ValueError(f"{entry.name} is no UTF-8 text: {text!r:.80}")


def outside_tensors(model: Any) -> Iterator[Any]:
    """Yield the tensors whose numbers are in other files."""
    from onnx import TensorProto

    for graph in graphs_of(model.graph):
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        tensors = [*graph.initializer, *(attribute.t for attribute in attributes if attribute.HasField("t"))]
        yield from (tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL)


def _with_lstms_inlined(model: Any) -> Any:
    """Return the model with the calls of local functions that may hold LSTMs replaced by the functions' bodies."""
    holding: set[tuple[str, str]] = set()
    found = True
    while found:
        found = False
        for function in model.functions:
            key = function.domain, function.name
            nodes = [node for top in function.node for node in (top, *inner_nodes(top))]
            is_holding = any(node.op_type in _LSTM_PARTS or (node.domain, node.op_type) in holding for node in nodes)
            if is_holding and key not in holding:
                holding.add(key)
                found = True
    if not holding:
        return model
    from onnx import inliner

    bodies = {(function.domain, function.name): function for function in model.functions}
    nodes = (node for graph in graphs_of(model.graph) for node in graph.node)
    needed = _inlined_bytes(nodes, {key: bodies[key] for key in holding})
    limit = memory_limit_of(model.ByteSize())
    check_memory(needed, limit, "the bodies of the file's functions, put in the place of their calls,")
    return inliner.inline_selected_functions(model, sorted(holding))


def _inlined_bytes(nodes: Iterable[Any], bodies: Mapping[tuple[str, str], Any]) -> int:
    """Return the bytes of the bodies that replace the calls among some nodes, calls in these bodies included."""
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], callers: frozenset[tuple[str, str]]) -> int:
        if key in callers:
            raise SlimLSTMError(f"the function {key[1]} of the file calls itself; the file is damaged")
        if key not in sizes:
            inside = [node for top in bodies[key].node for node in (top, *inner_nodes(top))]
            sizes[key] = bodies[key].ByteSize() + sum(size(call, callers | {key}) for call in calls(inside))
        return sizes[key]

    def calls(nodes: Iterable[Any]) -> Iterator[tuple[str, str]]:
        return (key for node in nodes if (key := (node.domain, node.op_type)) in bodies)

    return sum(size(key, frozenset()) for key in calls(nodes))
