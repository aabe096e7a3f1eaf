"""One LSTM layer through slimlstm's kernel and through every engine that a user could have instead.

    python benchmarks/engines.py --json engines.json

Each candidate's output is checked against PyTorch's float64 result for the same weights before anything is timed; one that
fails is reported and left out. Then all take turns, and only ratios of medians within a run are told. A turn is a call
that is not timed and one that is: what a model costs that runs again and again, not one whose caches others have used.
Rivals that are not installed, or refuse, are listed with what they said.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimlstm.nn import LowRankLSTM
from slimlstm.ops import cpu
from slimlstm.provenance import provenance

# Relative to the norm of the exact output.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 5e-2}


class Candidate(NamedTuple):
    """An engine: whether it is ours, its precision, the rank of the model, and a call that returns the output."""

    ours: bool
    precision: str
    rank: int | None
    call: Callable[[], Any]


def factored(hidden: int, rank: int) -> LowRankLSTM:
    """A layer whose two matrices have the rank."""
    return LowRankLSTM(hidden, hidden, ranks={"weight_ih_l0": rank, "weight_hh_l0": rank}, backend="fused").eval()


def ours(model: LowRankLSTM, x: Tensor, rank: int | None) -> Iterator[tuple[str, Candidate]]:
    """The kernel, in every storage."""
    for storage in ("float32", "bfloat16", "int8"):
        stored = deepcopy(model)
        for name in stored.matrix_shapes:
            stored.store(name, storage)
        name = f"slimlstm {storage}" + (f" rank {rank}" if rank else " dense")
        yield name, Candidate(True, storage, rank, lambda stored=stored: stored(x)[0])


def pytorch(lstm: nn.LSTM, x: Tensor, refused: dict[str, str]) -> Iterator[tuple[str, Candidate]]:
    """nn.LSTM with and without oneDNN, and quantize_dynamic."""

    def call(enabled: bool) -> Tensor:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(enabled)
        try:
            return lstm(x)[0]
        finally:
            torch._C._set_mkldnn_enabled(before)

    yield "PyTorch oneDNN", Candidate(False, "float32", None, lambda: call(True))
    yield "PyTorch native", Candidate(False, "float32", None, lambda: call(False))
    try:
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(lstm), {nn.LSTM}, torch.qint8)
        yield "PyTorch quantize_dynamic", Candidate(False, "int8", None, lambda: quantized(x)[0])
    except (AttributeError, RuntimeError) as error:
        refused["PyTorch quantize_dynamic"] = str(error)


def onnx_engines(
    model: Any, name: str, rank: int | None, x: Tensor, threads: int, refused: dict[str, str]
) -> Iterator[tuple[str, Candidate]]:
    """ONNX Runtime in float32 and int8, and OpenVINO in float32, on an ONNX model."""
    try:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        refused["ONNX Runtime"] = str(error)
        return
    shape, array = (*x.shape[:2], -1), x.numpy()

    def session(path: str) -> Callable[[], Tensor]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
        runtime = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: torch.from_numpy(runtime.run(None, {"x": array})[0]).view(shape)

    with tempfile.TemporaryDirectory() as folder:
        path, small = str(Path(folder) / "model.onnx"), str(Path(folder) / "int8.onnx")
        Path(path).write_bytes(model.SerializeToString())
        yield f"ONNX Runtime {name}", Candidate(False, "float32", rank, session(path))
        try:
            quantize_dynamic(path, small, weight_type=QuantType.QInt8, extra_options={"EnableSubgraph": True})
            yield f"ONNX Runtime int8 {name}", Candidate(False, "int8", rank, session(small))
        except Exception as error:
            refused[f"ONNX Runtime int8 {name}"] = str(error)
        try:
            import openvino

            settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            core = openvino.Core()
            network = core.read_model(path)
            network.reshape(list(x.shape))
            compiled = core.compile_model(network, "CPU", settings | {"INFERENCE_PRECISION_HINT": "f32"})
            request = compiled.create_infer_request()
            output = lambda: torch.from_numpy(request.infer([array], share_inputs=True)[0]).view(shape)  # noqa: E731
            yield f"OpenVINO {name}", Candidate(False, "float32", rank, output)
        except Exception as error:
            refused[f"OpenVINO {name}"] = str(error)


def candidates(
    hidden: int, steps: int, batch: int, ranks: list[int], threads: int
) -> tuple[dict[str, Candidate], dict[int | None, Tensor], dict[str, str]]:
    """All engines, the exact output for every rank (None: dense), and what was refused."""
    torch.manual_seed(0)
    x, lstm = torch.randn(steps, batch, hidden), nn.LSTM(hidden, hidden).eval()
    found: dict[str, Candidate] = {}
    refused: dict[str, str] = {}
    dense = LowRankLSTM.from_dense(deepcopy(lstm))
    dense.backend = "fused"
    models: dict[int | None, LowRankLSTM] = {None: dense} | {rank: factored(hidden, rank) for rank in ranks}
    found.update(pytorch(lstm, x, refused))
    try:
        from onnx_models import lstm_model, scan_model
    except ImportError as error:
        refused["onnx"] = str(error)
    else:
        found.update(onnx_engines(lstm_model(lstm), "LSTM", None, x, threads, refused))
        for rank in ranks:
            weights = models[rank].direction("_l0")
            scan = scan_model(weights)
            found.update(onnx_engines(scan, f"Scan rank {rank}", rank, x, threads, refused))
    exact = {}
    for rank, model in models.items():
        found.update(ours(model, x, rank))
        copy = deepcopy(model).double()
        copy.backend = "reference"
        exact[rank] = copy(x.double())[0]
    return found, exact, refused


def seconds_by_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """The time of every call, as often."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(repeats):
            for name, call in calls.items():
                call()
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    return seconds


def measure(hidden: int, steps: int, batch: int, divisors: list[int], threads: int, repeats: int) -> dict[str, Any]:
    """One row of the result: medians and quartiles in microseconds, errors, and ratios to the best rival."""
    torch.set_num_threads(threads)
    ranks = [hidden // divisor for divisor in divisors]
    with torch.no_grad():
        found, exact, refused = candidates(hidden, steps, batch, ranks, threads)
        errors = {
            name: float((one.call() - exact[one.rank]).norm() / exact[one.rank].norm()) for name, one in found.items()
        }
    for name, one in list(found.items()):
        if not errors[name] <= TOLERANCE[one.precision]:
            refused[name] = f"wrong by {errors[name]:.2g} of the output's norm"
            del found[name]
    seconds = seconds_by_turns({name: one.call for name, one in found.items()}, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}

    def best(precision: str, rank: int | None) -> str | None:
        rivals = [name for name, one in found.items() if (one.ours, one.precision, one.rank) == (False, precision, rank)]
        return min(rivals, key=medians.__getitem__, default=None)

    rows = {}
    for name, one in found.items():
        rows[name] = {"microseconds": 1e6 * medians[name], "error": errors[name]}
        rows[name]["quartiles"] = [1e6 * value for value in statistics.quantiles(seconds[name], n=4)[::2]]
        if one.ours:
            # bfloat16 has no rivals of its own here.
            precision = "int8" if one.precision == "int8" else "float32"
            rivals = {"dense": best(precision, None), "same rank": best(precision, one.rank) if one.rank else None}
            rows[name]["faster"] = {
                what: {"than": rival, "ratio": medians[rival] / medians[name]} for what, rival in rivals.items() if rival
            }
    setting = {"hidden": hidden, "steps": steps, "batch": batch, "threads": threads}
    return setting | {"candidates": rows, "refused": refused}


def table(row: dict[str, Any]) -> str:
    """A row as lines of text."""
    lines = ["H {hidden}, T {steps}, B {batch}, {threads} threads".format(**row)]
    for name, one in row["candidates"].items():
        ratios = [f"{ratio['ratio']:.2f}x {ratio['than']}" for ratio in one.get("faster", {}).values()]
        lines.append(f"  {name:34} {one['microseconds']:10.1f} us  error {one['error']:.1e}  {', '.join(ratios)}")
    return "\n".join(lines + [f"  {name}: {reason[:120]}" for name, reason in row["refused"].items()])


def main() -> None:
    """Measures every combination of the settings and writes them with where they come from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = {
        "hidden": [64, 128, 256, 512, 1024, 1150],
        "steps": [1, 35],
        "batch": [1, 4, 16, 64],
        "threads": [1, 2],
        "divisors": [4, 8, 16],
    }
    for name, default in settings.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    origin = provenance() | {"instruction_set": cpu.instruction_set(), "repeats": arguments.repeats}
    rows = []
    combinations = itertools.product(arguments.threads, arguments.hidden, arguments.steps, arguments.batch)
    for threads, hidden, steps, batch in combinations:
        rows.append(measure(hidden, steps, batch, arguments.divisors, threads, arguments.repeats))
        print(table(rows[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"provenance": origin, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
