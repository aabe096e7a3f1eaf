"""Time one LSTM layer in slimlstm's kernel and in every engine that a user could choose instead.

    python benchmarks/engines.py --json results/engines/engines.json --plot docs/engines.png

Each output is first checked against the float64 result for the same weights; engines that fail are reported and left out.
Calls of all engines interleave, and only ratios of medians within a run are reported. A stopped run can be resumed:
settings in the JSON file are not measured again if the same versions wrote it on the same machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Iterator
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paper import plots
from slimlstm.bench.candidates import Candidate, check_and_time
from slimlstm.bench.engines import dense_rivals, exact_output, low_rank_rivals
from slimlstm.bench.timing import MIN_TURNS, SECONDS, using_threads
from slimlstm.files import write_json
from slimlstm.methods import KERNEL_FORMATS
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.ops import native
from slimlstm.provenance import provenance

SETTINGS = {
    "threads": [1, 2],
    "hidden": [64, 128, 256, 512, 1024, 1150],
    "steps": [1, 35],
    "batch": [1, 4, 16, 64],
}
Setting = dict[str, int]


def ours(layer: LowRankLSTM, model: str, x: Tensor) -> Iterator[tuple[str, Candidate]]:
    """Yield the kernel in every storage."""
    for storage in KERNEL_FORMATS:
        stored = deepcopy(layer)
        for name in stored.matrix_shapes:
            stored.store(name, storage)
        yield f"slimlstm {storage} {model}", Candidate(True, storage, model, lambda stored=stored: stored(x)[0])


def measured(setting: Setting, divisors: list[int]) -> dict[str, Any]:
    """Return one row of the result, for a layer with as many inputs as hidden units."""
    hidden, threads = setting["hidden"], setting["threads"]
    torch.manual_seed(0)
    x, lstm = torch.randn(setting["steps"], setting["batch"], hidden), nn.LSTM(hidden, hidden).eval()
    layers = {"dense": LowRankLSTM.from_dense(deepcopy(lstm)).eval()}
    for rank in (hidden // divisor for divisor in divisors):
        ranks = {"weight_ih_l0": rank, "weight_hh_l0": rank}
        layers[f"rank {rank}"] = LowRankLSTM(hidden, hidden, ranks=ranks).eval()
    refused: dict[str, str] = {}
    with using_threads(threads), torch.no_grad():
        found = dict(dense_rivals(lstm, x, threads, refused))
        for model, layer in layers.items():
            layer.backend = "fused"
            if layer.ranks:
                found.update(low_rank_rivals(layer, model, x, threads, refused))
            found.update(ours(layer, model, x))
    exact = {model: exact_output(layer, x) for model, layer in layers.items()}
    return setting | check_and_time(found, exact, refused, threads=threads)


def expected_seconds(setting: Setting, divisors: list[int]) -> float:
    """Estimate the seconds that a setting takes, at 20 billion operations a second."""
    call = 16 * setting["hidden"] ** 2 * setting["steps"] * setting["batch"] / 20e9
    candidates = 9 + 6 * len(divisors)
    return 3.0 + candidates * 2 * max(SECONDS, MIN_TURNS * call)


def table(row: dict[str, Any]) -> str:
    """Return a row as lines of text."""
    lines = ["H {hidden}, T {steps}, B {batch}, {threads} threads".format(**row)]
    for name, one in row["candidates"].items():
        ratios = [f"{ratio['ratio']:.2f}x {ratio['than']}" for ratio in one.get("faster", {}).values()]
        lines.append(f"  {name:34} {one['microseconds']:10.1f} us  error {one['error']:.1e}  {', '.join(ratios)}")
    return "\n".join(lines + [f"  {name}: {reason[:120]}" for name, reason in row["refused"].items()])


def origin() -> dict[str, Any]:
    """Return the provenance of the rows, with the versions of the rivals."""
    found = provenance() | {"instruction_set": native.instruction_set(), "seconds": SECONDS}
    for package in ("onnx", "onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def rows_before(path: Path | None, made_by: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that the same versions have already measured on the same machine.

    Raises:
        SystemExit: other versions or another machine wrote the file.
    """
    if path is None or not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    may_differ = {"time", "threads"}
    other = sorted(key for key in made_by if key not in may_differ and before["provenance"].get(key) != made_by[key])
    if other:
        raise SystemExit(f"{path} was written with a different {', '.join(other)}; name another file, or remove it")
    return before["rows"]


def main() -> None:
    """Measure every combination of the settings, and write the rows with their provenance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--divisors", type=int, nargs="+", default=[4, 8, 16], help="ranks, as divisors of H")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="file for a plot of the ratios (PNG or PDF)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    made_by = origin()
    rows = rows_before(arguments.json, made_by)
    wanted = [
        dict(zip(SETTINGS, values, strict=True))
        for values in itertools.product(*(getattr(arguments, name) for name in SETTINGS))
    ]
    left = [setting for setting in wanted if not any(setting.items() <= row.items() for row in rows)]
    guesses = [expected_seconds(setting, arguments.divisors) for setting in left]
    print(f"{len(left)} of {len(wanted)} settings to measure, about {sum(guesses) / 60:.0f} minutes", flush=True)
    began = time.monotonic()
    for index, setting in enumerate(left):
        rows.append(measured(setting, arguments.divisors))
        spent = time.monotonic() - began
        rest = spent / sum(guesses[: index + 1]) * sum(guesses[index + 1 :])
        print(f"{table(rows[-1])}\n  {spent / 60:.0f} minutes spent, about {rest / 60:.0f} left", flush=True)
        if arguments.json:
            write_json(arguments.json, {"provenance": made_by, "rows": rows})
    if arguments.plot:
        plots.speed_ratios(rows, arguments.plot)


if __name__ == "__main__":
    main()
