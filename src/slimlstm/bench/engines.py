"""Run one LSTM layer in the engines that a user could choose instead: PyTorch, ONNX Runtime and OpenVINO.

Engines that are not installed, or refuse the layer, are listed with the reason. Shapes as in :mod:`slimlstm.ops.weights`.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
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
    yield from onnx_rivals(
        lambda: layer_model(LowRankLSTM.from_dense(lstm).layers()[0], "lstm"), "LSTM", "dense", x, threads, refused
    )


def low_rank_rivals(layer: LowRankLSTM, model: str, x: Tensor, threads: int, refused: dict[str, str]) -> NamedCandidates:
    """Yield every rival that runs the layer with factors, as an ONNX Scan with float32 weights."""
    exact = [weights._replace(ih_storage="float32", hh_storage="float32") for weights in layer.layers()[0]]
    yield from onnx_rivals(lambda: layer_model(exact, "scan"), f"Scan {model}", model, x, threads, refused)


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
    build: Callable[[], Any], name: str, model: str, x: Tensor, threads: int, refused: dict[str, str]
) -> NamedCandidates:
    """Yield ONNX Runtime in float32 and int8, and OpenVINO in float32, on the ONNX model that ``build`` returns."""
    try:
        content: bytes = build().SerializeToString()
    except (ImportError, SlimLSTMError) as error:
        reason = _refusal(error)
        refused.update({f"{engine} {name}": reason for engine in ("ONNX Runtime", "OpenVINO")})
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        for engine, precision, start in (
            ("ONNX Runtime", "float32", _onnx_runtime),
            ("ONNX Runtime int8", "int8", _onnx_runtime_int8),
            ("OpenVINO", "float32", _openvino),
        ):
            try:
                call = start(path, x, threads)
            except Exception as error:  # each library raises classes of its own
                refused[f"{engine} {name}"] = _refusal(error)
            else:
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


def _onnx_runtime_int8(path: Path, x: Tensor, threads: int) -> Callable[[], Tensor]:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore

    small, logger = path.with_name("int8.onnx"), logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # the quantiser advises preparations that these models do not need
    try:
        quantize_dynamic(str(path), str(small), weight_type=QuantType.QInt8, extra_options={"EnableSubgraph": True})
    finally:
        logger.setLevel(level)
    return _onnx_runtime(small, x, threads)


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
