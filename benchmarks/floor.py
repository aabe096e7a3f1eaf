"""Compare the kernel's time with a lower bound for this machine and one thread.

    python benchmarks/floor.py --hidden 1024 --steps 35 --json results/floor.json

The bound, or floor, is the larger of two times: the multiply-adds at the machine's peak speed in that precision, and
reading the weights (hh at every step, ih once) at the bandwidth of memory of that size. ``floor.cpp`` measures both speeds
first, which takes a C++17 compiler.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch
from common import stored_layer

from slimlstm.bench import interleaved_seconds
from slimlstm.files import write_json
from slimlstm.methods import KERNEL_FORMATS
from slimlstm.provenance import provenance

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def speeds(sizes: list[int]) -> tuple[dict[str, float], dict[int, float]]:
    """Return multiply-adds a second by precision, and bytes a second by the size of the memory that is read."""
    source = Path(__file__).with_name("floor.cpp")
    headers = source.parents[1] / "src/slimlstm/csrc"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "floor"
        command = ["c++", "-std=c++17", "-O3", "-march=native", f"-I{headers}", source, "-o", program]
        subprocess.run(command, check=True)
        lines = subprocess.run([program, *map(str, sizes)], check=True, capture_output=True, text=True).stdout.splitlines()
    values = dict(line.split() for line in lines)
    return {name: float(values[name]) for name in BYTES}, {size: float(values[str(size)]) for size in sizes}


def elements(hidden: int, rank: int | None) -> int:
    """Return the number of weights in a matrix [4H, H], or in its factors."""
    return 5 * hidden * rank if rank else 4 * hidden * hidden


def measured(hidden: int, steps: int, batch: int, rank: int | None, storage: str, seconds: float = 0.5) -> float:
    """Return the kernel's median time in seconds."""
    layer, x = stored_layer(hidden, rank, storage), torch.randn(steps, batch, hidden)
    return statistics.median(interleaved_seconds({"layer": lambda: layer(x)}, seconds=seconds)["layer"])


def main() -> None:
    """Print a line for every combination of the settings, and write all results as JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"hidden": [1024], "steps": [35], "batch": [1, 16], "divisors": [8]}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dense: list[tuple[int, int | None]] = [(hidden, None) for hidden in arguments.hidden]
    models = dense + [(hidden, hidden // divisor) for hidden in arguments.hidden for divisor in arguments.divisors]
    sizes = {elements(*model) * width for model in models for width in BYTES.values()}
    peak, bandwidth = speeds(sorted(sizes))
    print("multiply-adds a second:", ", ".join(f"{name} {value / 1e9:.0f}e9" for name, value in peak.items()))
    rows: list[dict[str, float | str | None]] = []
    for (hidden, rank), steps, batch in itertools.product(models, arguments.steps, arguments.batch):
        for storage in KERNEL_FORMATS:
            size = elements(hidden, rank) * BYTES[storage]
            reading = (1 + steps) * size / bandwidth[size]
            computing = 2 * elements(hidden, rank) * steps * batch / peak[storage]
            floor, took = max(reading, computing), measured(hidden, steps, batch, rank, storage)
            setting = {"hidden": hidden, "rank": rank, "steps": steps, "batch": batch, "storage": storage}
            rows.append({**setting, "reading": reading, "computing": computing, "took": took, "floors": took / floor})
            print(
                f"H {hidden}, T {steps}, B {batch}, {f'rank {rank}' if rank else 'dense'}, {storage}: reading "
                f"{1e6 * reading:.0f} us at {bandwidth[size] / 1e9:.0f} GB/s, multiplying {1e6 * computing:.0f} us, "
                f"took {1e6 * took:.0f} us, {took / floor:.2f} times the floor"
            )
    if arguments.json:
        content = {"peak": peak, "rows": rows, "provenance": provenance()}
        write_json(arguments.json, content)


if __name__ == "__main__":
    main()
