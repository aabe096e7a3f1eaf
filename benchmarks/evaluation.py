"""Time compressed layers in evaluation mode with gradients on, as models are often called, beside ``nn.LSTM``.

    python benchmarks/evaluation.py --json results/evaluation.json

Only the forward pass is timed. The kernel runs it, and would recompute the layer for a backward pass.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from common import stored_layer
from torch import nn

from slimlstm.bench import interleaved_seconds, median_ratios
from slimlstm.files import write_json
from slimlstm.ops import native
from slimlstm.provenance import provenance


def measured(hidden: int, steps: int, batch: int, divisor: int, seconds: float) -> dict[str, Any]:
    """Return how many times faster than ``nn.LSTM`` a layer with H inputs is: dense, factored and in int8."""
    forms = {"dense": (None, "float32"), "factored": (hidden // divisor, "float32"), "int8": (None, "int8")}
    x, modules = torch.randn(steps, batch, hidden), {"nn.LSTM": nn.LSTM(hidden, hidden).eval()}
    for name, (rank, storage) in forms.items():
        modules[name] = stored_layer(hidden, rank, storage)

    def call(module: nn.Module) -> None:
        with torch.enable_grad():
            module(x)

    calls = {name: lambda module=module: call(module) for name, module in modules.items()}
    faster = median_ratios(interleaved_seconds(calls, seconds=seconds, threads=1), "nn.LSTM")
    return {"hidden": hidden, "steps": steps, "batch": batch, "faster": {name: faster[name] for name in forms}}


def main() -> None:
    """Print a line for every setting, and write all results as JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"hidden": [16, 64, 256, 1024], "steps": [1, 35], "batch": [1, 16]}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--divisor", type=int, default=4, help="the rank is H over this")
    parser.add_argument("--seconds", type=float, default=0.3, help="how long each module is timed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for hidden, steps, batch in itertools.product(arguments.hidden, arguments.steps, arguments.batch):
        rows.append(measured(hidden, steps, batch, arguments.divisor, arguments.seconds))
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in rows[-1]["faster"].items())
        print(f"H {hidden}, T {steps}, B {batch}: {ratios}", flush=True)
    if arguments.json:
        made_by = provenance() | {"instruction_set": native.instruction_set(), "divisor": arguments.divisor}
        write_json(arguments.json, {"rows": rows, "provenance": made_by})


if __name__ == "__main__":
    main()
