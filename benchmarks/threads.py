"""What a second thread is worth to the kernel, in a process that runs nothing else.

    python benchmarks/threads.py --json results/threads.json

Other engines' threads spin for a while after their calls, on the processors that ours would use; the kernel then runs by
itself. So this is measured without them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch

from slimlstm.bench.timing import interleaved_seconds
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.provenance import provenance


def speedup(hidden: int, steps: int, batch: int, rank: int | None, storage: str) -> float:
    """The median time of one thread over that of two; blocks of calls take turns."""
    ranks = {"weight_ih_l0": rank, "weight_hh_l0": rank} if rank else None
    layer, x = LowRankLSTM(hidden, hidden, ranks=ranks, backend="fused").eval(), torch.randn(steps, batch, hidden)
    for name in layer.matrix_shapes:
        layer.store(name, storage)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _, threads in itertools.product(range(3), seconds):
        seconds[threads] += interleaved_seconds({"layer": lambda: layer(x)}, repeats=15, threads=threads)["layer"]
    return statistics.median(seconds[1]) / statistics.median(seconds[2])


def main() -> None:
    """Prints a line for every setting and keeps them all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, float | str | None]] = []
    for hidden, steps, batch, divisor, storage in itertools.product(
        arguments.hidden, (1, 35), (1, 16), (None, 8), ("float32", "int8")
    ):
        rank = hidden // divisor if divisor else None
        found = speedup(hidden, steps, batch, rank, storage)
        rows.append({"hidden": hidden, "steps": steps, "batch": batch, "rank": rank, "storage": storage, "speedup": found})
        print(f"H {hidden}, T {steps}, B {batch}, {f'rank {rank}' if rank else 'dense'}, {storage}: {found:.2f}x")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "provenance": provenance()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
