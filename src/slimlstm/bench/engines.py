"""One LSTM layer in every engine that a user could have: PyTorch, ONNX Runtime, OpenVINO, and ours; checked, then timed.

Optional engines that are not installed, or refuse, are told of with what they said. Shapes as in
:mod:`slimlstm.ops.weights`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.onnx.layers import layer_model

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 5e-2}
"""How far an output may be from that in float64, relative to its norm."""

SECONDS, FEWEST, MOST = 0.3, 5, 200
"""How long every candidate is timed, and in how many turns at least and at most."""


class Candidate(NamedTuple):
    """An engine: whether it is ours, its precision, the model that it computes, and a call that returns the output."""

    ours: bool
    precision: str
    model: str
    call: Callable[[], Tensor]


Found = Iterator[tuple[str, Candidate]]


def pytorch(lstm: nn.LSTM, x: Tensor, refused: dict[str, str]) -> Found:
    """``nn.LSTM`` with and without oneDNN, and ``quantize_dynamic``."""

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

    except Exception as error:  # what PyTorch's quantisation raises differs from version to version
        refused["PyTorch quantize_dynamic"] = _reason(error)
    else:
        yield "PyTorch quantize_dynamic", Candidate(False, "int8", "dense", call_quantized)


def onnx_engines(
    build: Callable[[], Any], name: str, model: str, x: Tensor, threads: int, refused: dict[str, str]
) -> Found:
    """ONNX Runtime in float32 and int8, and OpenVINO in float32, on the ONNX model that ``build`` returns."""
    try:
        content: bytes = build().SerializeToString()
    except (ImportError, SlimLSTMError) as error:
        reason = _reason(error)
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
                refused[f"{engine} {name}"] = _reason(error)
            else:
                yield f"{engine} {name}", Candidate(False, precision, model, call)


def dense_rivals(lstm: nn.LSTM, x: Tensor, threads: int, refused: dict[str, str]) -> Found:
    """Every rival that computes a dense layer."""
    yield from pytorch(lstm, x, refused)
    yield from onnx_engines(
        lambda: layer_model(LowRankLSTM.from_dense(lstm).layers()[0]), "LSTM", "dense", x, threads, refused
    )


def low_rank_rivals(layer: LowRankLSTM, model: str, x: Tensor, threads: int, refused: dict[str, str]) -> Found:
    """Every rival that computes a layer with factors, written out as an ONNX Scan; engines round by themselves."""
    exact = [weights._replace(ih_storage="float32", hh_storage="float32") for weights in layer.layers()[0]]
    yield from onnx_engines(lambda: layer_model(exact), f"Scan {model}", model, x, threads, refused)


def exact_output(layer: LowRankLSTM, x: Tensor) -> Tensor:
    """The layer's output in float64, by the reference recurrence."""
    copy = deepcopy(layer).double()
    copy.backend = "reference"
    with torch.no_grad():
        return copy(x.double())[0]


def measure(
    candidates: dict[str, Candidate],
    exact: Mapping[str, Tensor],
    refused: dict[str, str],
    *,
    threads: int = 1,
    seconds: float = SECONDS,
    tolerance: Mapping[str, float] = TOLERANCE,
) -> dict[str, Any]:
    """Checks every candidate's output against the exact one of its model, and times those that are right, by turns.

    Right is what is within the ``tolerance`` of its precision.

    Returns:
        ``candidates``: for each its median ``microseconds``, ``quartiles``, ``error``, ``turns``, and if it is ours, under
        ``faster``, how many times faster it is than the best rival of each model and precision that it can stand in for.
        ``refused``: the others, with the reason.
    """
    candidates, refused = dict(candidates), dict(refused)
    errors: dict[str, float] = {}
    with only_threads(threads), torch.no_grad():
        for name, one in list(candidates.items()):
            truth = exact[one.model]
            try:
                output = one.call()
            except Exception as error:  # each library raises classes of its own
                if one.ours:
                    raise
                refused[name] = _reason(error)
                del candidates[name]
                continue
            errors[name] = float((output.reshape(truth.shape) - truth).norm() / truth.norm())
            if not errors[name] <= tolerance[one.precision]:
                refused[name] = f"wrong by {errors[name]:.2g} of the output's norm"
                del candidates[name]
        times = seconds_by_turns({name: one.call for name, one in candidates.items()}, seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows: dict[str, Any] = {}
    for name, one in candidates.items():
        quartiles = [1e6 * value for value in statistics.quantiles(times[name], n=4)[::2]]
        rows[name] = {"ours": one.ours, "precision": one.precision, "model": one.model, "error": errors[name]}
        rows[name] |= {"microseconds": 1e6 * medians[name], "quartiles": quartiles, "turns": len(times[name])}
        if one.ours:
            rows[name]["faster"] = _against_rivals(name, one, candidates, medians)
    return {"candidates": rows, "refused": refused}


def seconds_by_turns(calls: Mapping[str, Callable[[], object]], seconds: float = SECONDS) -> dict[str, list[float]]:
    """Wall-clock seconds of every call, taking turns that are spread evenly over the run.

    A turn is a call that is not timed and one that is: what a model costs that runs again and again, not one whose caches
    others have used. Every call gets about as long in all, in ``FEWEST`` to ``MOST`` turns.
    """
    turns: dict[str, int] = {}
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        turns[name] = min(max(round(seconds / (time.perf_counter() - began)), FEWEST), MOST)
    found: dict[str, list[float]] = {name: [] for name in calls}
    rounds = max(turns.values(), default=0)
    for index in range(rounds):
        for name, call in calls.items():
            if (index + 1) * turns[name] // rounds > index * turns[name] // rounds:
                call()
                began = time.perf_counter()
                call()
                found[name].append(time.perf_counter() - began)
    return found


def _against_rivals(
    name: str, one: Candidate, candidates: Mapping[str, Candidate], medians: Mapping[str, float]
) -> dict[str, Any]:
    """By how much one of ours is faster than the best rival of its precision: of the dense model, and of its own."""
    # bfloat16 has no rivals of its own here.
    precision = "int8" if one.precision == "int8" else "float32"
    found: dict[str, Any] = {}
    for what, model in {"dense": "dense", "same model": one.model}.items():
        rivals = [
            other
            for other, rival in candidates.items()
            if (rival.ours, rival.precision, rival.model) == (False, precision, model)
        ]
        if rivals and (what == "dense" or model != "dense"):
            best = min(rivals, key=medians.__getitem__)
            found[what] = {"than": best, "ratio": medians[best] / medians[name]}
    return found


def _onnx_runtime(path: Path, x: Tensor, threads: int) -> Callable[[], Tensor]:
    import onnxruntime  # pyright: ignore

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    array = x.numpy()
    return lambda: torch.from_numpy(session.run(None, {"x": array})[0])


def _onnx_runtime_int8(path: Path, x: Tensor, threads: int) -> Callable[[], Tensor]:
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore

    small, logger = path.with_name("int8.onnx"), logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises on preparations that these models do not need
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


def _reason(error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), type(error).__name__)
    return f"not installed: {first_line}" if isinstance(error, ImportError) else first_line


@contextmanager
def only_threads(count: int) -> Generator[None]:
    """PyTorch may use so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
