"""Measure how much faster the kernel is with a second thread, in a process that runs nothing else.

    python benchmarks/threads.py --json results/threads.json

Other engines are left out, because their threads spin for a while after each call and occupy the processors that the
kernel's threads need.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

import torch
from common import stored_layer

from slimlstm.bench import interleaved_seconds
from slimlstm.files import write_json
from slimlstm.provenance import provenance


def speedup(hidden: int, steps: int, batch: int, rank: int | None, storage: str) -> float:
    """Return the median time with one thread over the median time with two; blocks of calls take turns."""
    layer, x = stored_layer(hidden, rank, storage), torch.randn(steps, batch, hidden)
    times: dict[int, list[float]] = {1: [], 2: []}
    for _, threads in itertools.product(range(3), times):
        times[threads] += interleaved_seconds({"layer": lambda: layer(x)}, seconds=0.1, threads=threads)["layer"]
    return statistics.median(times[1]) / statistics.median(times[2])


def main() -> None:
    """Print a line for every setting, and write all results as JSON if ``--json`` is given."""
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
        write_json(arguments.json, {"rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
