"""Time layers stored in int4 beside the same layers in int8, on one thread, for every instruction set of the machine.

    python benchmarks/four_bits.py --json results/four_bits.json

Outputs are first compared with the reference's. Where four bits would be slower, the kernel reads such a layer as int8, so
that its ratio is about one; ``bytes`` is the size of the packed weights.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from common import stored_layer
from torch import Tensor

from slimlstm.bench import interleaved_seconds, median_ratios
from slimlstm.files import write_json
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.ops import native, packing
from slimlstm.provenance import provenance

TOLERANCE = 0.05


def check(layer: LowRankLSTM, x: Tensor) -> None:
    """Raise an error if the kernel's outputs differ from the reference's by more than rounded inputs explain."""
    found = layer(x)[0]
    layer.backend = "reference"
    difference = float((found - layer(x)[0]).norm() / found.norm())
    layer.backend = "fused"
    if not difference <= TOLERANCE:
        raise SystemExit(f"the outputs differ from the reference's by {difference:.3f} of their norm")


def measured(layers: dict[str, LowRankLSTM], steps: int, batch: int, seconds: float) -> dict[str, Any]:
    """Return how many times faster int4 is than int8, by medians and by minima."""
    hidden = layers["int8"].hidden_size
    x = torch.randn(steps, batch, hidden)
    with torch.inference_mode():
        for layer in layers.values():
            check(layer, x)
    calls = {name: lambda layer=layer: layer(x) for name, layer in layers.items()}
    times = interleaved_seconds(calls, seconds=seconds, threads=1)
    least = min(times["int8"]) / min(times["int4"])
    return {"steps": steps, "batch": batch, "faster": median_ratios(times, "int8")["int4"], "faster_by_minima": least}


def main() -> None:
    """Print a line for every setting, and write all results as JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"hidden": [256, 512, 1024, 2048], "steps": [1, 35], "batch": [1, 2, 4, 8]}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--isa", nargs="+", default=[isa for isa in native.instruction_sets() if isa != "portable"])
    parser.add_argument("--divisor", type=int, default=4, help="the rank is H over this")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each layer is timed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for hidden, rank_of in itertools.product(arguments.hidden, (None, arguments.divisor)):
        rank = hidden // rank_of if rank_of else None
        layers = {storage: stored_layer(hidden, rank, storage) for storage in ("int8", "int4")}
        for isa, steps, batch in itertools.product(arguments.isa, arguments.steps, arguments.batch):
            os.environ["SLIMLSTM_ISA"] = isa
            packing.forget()
            found = measured(layers, steps, batch, arguments.seconds)
            packed = {name: packing.packed_layer(layer.layers()[0]).layer.bytes() for name, layer in layers.items()}
            rows.append({"isa": isa, "hidden": hidden, "rank": rank, **found, "bytes": packed})
            form = f"rank {rank}" if rank else "dense"
            print(f"{isa}, H {hidden}, {form}, T {steps}, B {batch}: {found['faster']:.2f}x", flush=True)
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "provenance": provenance() | {"divisor": arguments.divisor}})


if __name__ == "__main__":
    main()
