"""Find every LSTM of an ONNX model, nested graphs included."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.onnx.graph import OnnxLSTM, Scope, inner_graphs, open_scope
from slimlstm.onnx.operators import OPERATORS, read_operator
from slimlstm.onnx.reading import read_model
from slimlstm.onnx.written_out import read_written_out


def find_lstms(model: Any, path: Path) -> list[OnnxLSTM]:
    """Return every LSTM of a model: LSTM operators, and LSTMs that are written out in single operators.

    Args:
        model: an ``onnx.ModelProto``.
        path: its file, for errors.

    Returns:
        The LSTMs in the order of the graph, each under a unique name.

    Raises:
        SlimLSTMError: the model breaks the rules of the format.
    """
    lstms: list[OnnxLSTM] = []
    taken: set[str] = set()
    try:
        for lstm in _lstms(model.graph, None, {entry.domain: entry.version for entry in model.opset_import}):
            # The branches of an If may use one name twice.
            name, again = lstm.name, itertools.count(2)
            while lstm.name in taken:
                lstm.name = f"{name}_{next(again)}"
            taken.add(lstm.name)
            lstms.append(lstm)
    except SlimLSTMError:
        raise
    except Exception as error:  # a damaged file may hold anything that protocol buffers can express
        raise SlimLSTMError(f"{path} is no intact ONNX file: {reason_of(error)}") from error
    return lstms


def read_tensors_of(path: Path) -> dict[str, Tensor]:
    """Return the weights of every LSTM in an ONNX file, named as in ``nn.LSTM`` and slimlstm's modules.

    Raises:
        SlimLSTMError: onnx is not installed, or the file is missing or damaged.
    """
    model = read_model(path)
    tensors: dict[str, Tensor] = {}
    for lstm in find_lstms(model, path):
        for location in lstm.locations:
            key = f"{lstm.name}.{location.name}"
            if isinstance(location.matrix, Tensor):
                tensors[key] = location.matrix
            else:
                tensors[f"{key}_u"], tensors[f"{key}_v"] = location.matrix
        tensors.update({f"{lstm.name}.{name}": bias for name, bias in lstm.biases.items()})
    return tensors


def _lstms(graph: Any, outer: Scope | None, opsets: Mapping[str, int], holder: Any = None) -> Iterator[OnnxLSTM]:
    scope = open_scope(graph, outer, opsets, holder)
    for node in graph.node:
        if (node.domain, node.op_type) in OPERATORS:
            yield read_operator(node, scope)
        elif node.op_type in ("GRU", "RNN") or "LSTM" in node.op_type:
            name = node.name or next((output for output in node.output if output), node.op_type)
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            yield OnnxLSTM(name, node, scope, problem=f"{name}: {kind} operators cannot be read; it stays as it is")
        elif node.op_type == "Split" and len(node.output) == 4:
            lstm = read_written_out(node, scope)
            if lstm is not None:
                yield lstm
        for inner in inner_graphs(node):
            yield from _lstms(inner, scope, opsets, node)
