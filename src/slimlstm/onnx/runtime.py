"""Run ONNX graphs in ONNX Runtime, also graphs with LSTMs in forms that it does not support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.onnx.graph import OnnxLSTM, attribute_of, graphs_of
from slimlstm.ops.weights import parts_of

RunInputs = Mapping[str, NDArray[Any]]
"""The inputs of one run, by name."""

_STATES, _WEIGHTS = (5, 6), (1, 2, 3, 7)
"""The positions of h0 and c0, and of W, R, B and P, among the inputs of an LSTM operator."""


def inference_session(model: str | bytes, threads: int | None = None) -> Any:
    """Return ONNX Runtime's session for a model, on the CPU and without warnings.

    Args:
        model: the path or the bytes of a file.
        threads: the number of threads; None for ONNX Runtime's own default.

    Raises:
        ImportError: ONNX Runtime is not installed. A model that it cannot load raises one of its own classes.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def arrays_of(inputs: RunInputs) -> dict[str, Any]:
    """Return the inputs of a run with arrays without axes in the place of NumPy's scalars, which ONNX Runtime refuses.

    Examples:
        >>> arrays_of({"rate": np.ones(2)[0]})
        {'rate': array(1.)}
    """
    return {name: np.asarray(value) if isinstance(value, np.generic) else value for name, value in inputs.items()}


class Session:
    """A model in ONNX Runtime, on the CPU, with as many threads as PyTorch uses.

    Args:
        model: an ``onnx.ModelProto``.

    Raises:
        SlimLSTMError: ONNX Runtime is not installed, or cannot load the model.
    """

    def __init__(self, model: Any) -> None:
        try:
            self._session = inference_session(model.SerializeToString(), torch.get_num_threads())
        except ImportError as error:
            raise SlimLSTMError("ONNX Runtime, which runs the file, is not installed: pip install onnxruntime") from error
        except Exception as error:  # ONNX Runtime's classes share no base
            raise SlimLSTMError(f"ONNX Runtime cannot load the model: {reason_of(error)}") from error

    def run(self, names: Sequence[str], inputs: RunInputs, number: int = 0) -> list[NDArray[Any]]:
        """Return the outputs with these names.

        Args:
            names: the names of outputs.
            inputs: arrays by the names of inputs.
            number: the number of the batch, for errors.

        Raises:
            SlimLSTMError: the model cannot run on these inputs.
        """
        try:
            return self._session.run(list(names), arrays_of(inputs))
        except Exception as error:  # ONNX Runtime's classes share no base
            raise SlimLSTMError(
                f"ONNX Runtime cannot run the model on batch {number}: {reason_of(error)}; give the inputs that it takes"
            ) from error


class Names:
    """Makes names that a model does not use yet."""

    def __init__(self, model: Any, prefix: str) -> None:
        self._prefix, self._count = prefix, 0
        graphs = list(graphs_of(model.graph))
        self._taken = {name for graph in graphs for node in graph.node for name in (*node.output, *node.input)}
        self._taken |= {entry.name for graph in graphs for entry in (*graph.initializer, *graph.input, *graph.output)}

    def new(self) -> str:
        """Return a new name."""
        while True:
            self._count += 1
            name = f"{self._prefix}_{self._count}"
            if name not in self._taken:
                return name


def make_runnable(lstms: Sequence[OnnxLSTM], names: Names) -> None:
    """Rewrite LSTM operators that ONNX Runtime lacks, so that all are time-major and in float32.

    Operators with ``layout=1`` get transposes around them, operators of other dtypes casts. The graph's inputs and outputs
    stay.
    """
    for lstm in lstms:
        if lstm.node.op_type == "LSTM" and lstm.locations:
            if attribute_of(lstm.node, "layout", 0):
                _make_time_major(lstm, names)
            if parts_of(lstm.locations[0].matrix)[0].dtype != torch.float32:
                _make_float32(lstm, names)


def _make_time_major(lstm: OnnxLSTM, names: Names) -> None:
    kept = [attribute for attribute in lstm.node.attribute if attribute.name != "layout"]
    del lstm.node.attribute[:]
    lstm.node.attribute.extend(kept)
    for position in (0, *_STATES):
        _convert_input(lstm, position, names, "Transpose", perm=[1, 0, 2])
    for position, order in enumerate(([2, 0, 1, 3], [1, 0, 2], [1, 0, 2])):
        _convert_output(lstm, position, names, "Transpose", perm=order)


def _make_float32(lstm: OnnxLSTM, names: Names) -> None:
    from onnx import TensorProto, helper

    for position in (0, *_WEIGHTS, *_STATES):
        _convert_input(lstm, position, names, "Cast", to=TensorProto.FLOAT)
    dtype = parts_of(lstm.locations[0].matrix)[0].dtype
    kind = TensorProto.BFLOAT16 if dtype == torch.bfloat16 else None
    if kind is None:
        kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
    for position in range(3):
        _convert_output(lstm, position, names, "Cast", to=kind)


def _convert_input(lstm: OnnxLSTM, position: int, names: Names, operator: str, **attributes: Any) -> None:
    """Put an operator before an input of the LSTM's node, if the node has that input."""
    from onnx import helper

    node = lstm.node
    if position < len(node.input) and node.input[position]:
        new = helper.make_node(operator, [node.input[position]], [names.new()], **attributes)
        insert(lstm.scope.graph, new, before=node)
        node.input[position] = new.output[0]


def _convert_output(lstm: OnnxLSTM, position: int, names: Names, operator: str, **attributes: Any) -> None:
    """Put an operator after an output of the LSTM's node, if the node has that output."""
    from onnx import helper

    node = lstm.node
    if position < len(node.output) and node.output[position]:
        new = helper.make_node(operator, [names.new()], [node.output[position]], **attributes)
        node.output[position] = new.input[0]
        insert(lstm.scope.graph, new, before=node, offset=1)


def insert(graph: Any, new: Any, before: Any, offset: int = 0) -> None:
    """Insert a node into a graph right before another one, or ``offset`` places after that."""
    at = next(index for index, node in enumerate(graph.node) if node is before or node.output == before.output)
    graph.node.insert(at + offset, new)
