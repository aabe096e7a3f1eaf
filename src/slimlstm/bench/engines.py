"""Run one LSTM layer in the engines that a user could choose instead: PyTorch, ONNX Runtime and OpenVINO.

Engines that are not installed, or refuse the layer, are listed with the reason. Shapes as in :mod:`slimlstm.ops.weights`.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm.bench.candidates import Candidate
from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.onnx.layers import layer_model
from slimlstm.onnx.runtime import inference_session

NamedCandidates = Iterator[tuple[str, Candidate]]


def dense_rivals(lstm: nn.LSTM, x: Tensor, threads: int, refused: dict[str, str]) -> NamedCandidates:
    """Yield every rival that runs the dense layer; add the others to ``refused``, with the reason."""
    yield from pytorch_rivals(lstm, x, refused)
    operator = partial(layer_model, LowRankLSTM.from_dense(lstm).layers()[0], "lstm")
    yield from onnx_rivals(operator, lambda: _quantized(operator()), "LSTM", "dense", x, threads, refused)


def low_rank_rivals(layer: LowRankLSTM, model: str, x: Tensor, threads: int, refused: dict[str, str]) -> NamedCandidates:
    """Yield every rival that runs the layer with factors, as ONNX Scans that multiply by floats or by int8 integers."""

    def build(storage: str) -> Any:
        return layer_model([one._replace(ih_storage=storage, hh_storage=storage) for one in layer.layers()[0]], "scan")

    yield from onnx_rivals(partial(build, "float32"), partial(build, "int8"), f"Scan {model}", model, x, threads, refused)


def pytorch_rivals(lstm: nn.LSTM, x: Tensor, refused: dict[str, str]) -> NamedCandidates:
    """Yield ``nn.LSTM`` with and without oneDNN, and PyTorch's dynamic quantisation."""

    def call(enabled: bool) -> Tensor:
        before: bool = torch._C._get_mkldnn_enabled()  # pyright: ignore
        torch._C._set_mkldnn_enabled(enabled)  # pyright: ignore
        try:
            return lstm(x)[0]
        finally:
            torch._C._set_mkldnn_enabled(before)  # pyright: ignore

    yield "PyTorch oneDNN", Candidate(False, "float32", "dense", lambda: call(True))
    yield "PyTorch native", Candidate(False, "float32", "dense", lambda: call(False))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized: Any = torch.ao.quantization.quantize_dynamic(nn.Sequential(lstm), {nn.LSTM}, torch.qint8)  # pyright: ignore
            quantized(x)

        def call_quantized() -> Tensor:
            return quantized(x)[0]

    except Exception as error:  # the classes that PyTorch's quantisation raises vary from version to version
        refused["PyTorch quantize_dynamic"] = _refusal(error)
    else:
        yield "PyTorch quantize_dynamic", Candidate(False, "int8", "dense", call_quantized)


def onnx_rivals(
    build: Callable[[], Any],
    build_int8: Callable[[], Any],
    name: str,
    model: str,
    x: Tensor,
    threads: int,
    refused: dict[str, str],
) -> NamedCandidates:
    """Yield ONNX Runtime in float32 and int8, and OpenVINO in float32, on the ONNX models that the functions return."""
    for engine, precision, make, start in (
        ("ONNX Runtime", "float32", build, _onnx_runtime),
        ("ONNX Runtime int8", "int8", build_int8, _onnx_runtime),
        ("OpenVINO", "float32", build, _openvino),
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                path.write_bytes(make().SerializeToString())
                call = start(path, x, threads)
            except Exception as error:  # each library raises classes of its own
                refused[f"{engine} {name}"] = _refusal(error)
                continue
            yield f"{engine} {name}", Candidate(False, precision, model, call)


def exact_output(layer: LowRankLSTM, x: Tensor) -> Tensor:
    """Return the layer's output in float64, by the reference recurrence."""
    copy = deepcopy(layer).double()
    copy.backend = "reference"
    with torch.no_grad():
        return copy(x.double())[0]


def _onnx_runtime(path: Path, x: Tensor, threads: int) -> Callable[[], Tensor]:
    session = inference_session(str(path), threads)
    array = x.numpy()
    return lambda: torch.from_numpy(session.run(None, {"x": array})[0])


def _quantized(model: Any) -> Any:
    """Return an ONNX model whose weights ONNX Runtime's dynamic quantisation has changed to int8.

    Raises:
        SlimLSTMError: it has changed none.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # the quantiser advises preparations that these models do not need
    try:
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / "int8.onnx"
            quantize_dynamic(model, str(small), weight_type=QuantType.QInt8)
            found = onnx.load(small)
    finally:
        logger.setLevel(level)
    if not any(constant.data_type == onnx.TensorProto.INT8 for constant in found.graph.initializer):
        raise SlimLSTMError("ONNX Runtime's quantiser changed no weight")
    return found


def _openvino(path: Path, x: Tensor, threads: int) -> Callable[[], Tensor]:
    import openvino  # pyright: ignore

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    core: Any = openvino.Core()
    network = core.read_model(str(path))
    network.reshape(list(x.shape))
    request, array = core.compile_model(network, "CPU", settings).create_infer_request(), x.numpy()
    return lambda: torch.from_numpy(request.infer([array], share_inputs=True)[0])


def _refusal(error: Exception) -> str:
    return f"not installed: {reason_of(error)}" if isinstance(error, ImportError) else reason_of(error)
