"""Time compressed layers as users call them, beside ``nn.LSTM``: evaluation mode with gradients on, or a training step.

    python benchmarks/calls.py evaluation --json results/calls/evaluation.json
    python benchmarks/calls.py training --json results/calls/training.json
    python benchmarks/calls.py training --precision bfloat16 --json results/calls/bfloat16.json

In evaluation mode only the forward pass is timed, without ``torch.no_grad()``. A training step is the forward and the
backward pass, with the gradients of the input and of all weights; bfloat16 is autocast. Outputs and gradients are first
checked against float64 with the same weights. Calls interleave. Ratios are of lower quartiles, since other programs slow
calls down, and to the faster of ``nn.LSTM`` with oneDNN and without. Factors take a quarter of the dense matrices' numbers.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm import LowRankLSTM
from slimlstm.bench.candidates import TOLERANCE, Candidate, check_and_time
from slimlstm.bench.timing import using_threads
from slimlstm.files import write_json
from slimlstm.ops import native
from slimlstm.provenance import provenance

KEEP = 0.25
FORMS = {
    "evaluation": {
        "dense": (False, "float32"),
        "factors": (True, "float32"),
        "int8": (False, "int8"),
        "int8 factors": (True, "int8"),
    },
    # Training computes in float32 or bfloat16, whatever the weights are stored in.
    "training": {"dense": (False, "float32"), "factors": (True, "float32")},
}
RIVALS = {"nn.LSTM, oneDNN": True, "nn.LSTM, no oneDNN": False}
# Without oneDNN, nn.LSTM is far slower in bfloat16.
RIVALS_OF = {"float32": RIVALS, "bfloat16": {"nn.LSTM, oneDNN": True}}
# Settings with more multiply-adds in hh than this are left out; they would take minutes.
LARGEST = {"evaluation": 2**30, "training": 2**28}
# Gradients accumulate the rounding errors of all steps.
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}


def compressed(lstm: nn.LSTM, is_factored: bool, storage: str) -> LowRankLSTM:
    """Return a layer as large as ``lstm``: with its weights, or with random factors of a quarter of their bytes."""
    module = LowRankLSTM.from_dense(copy.deepcopy(lstm))
    for name, (m, n) in module.matrix_shapes.items() if is_factored else ():
        rank = max(1, int(KEEP * m * n / (m + n)))
        module.set_factors(name, torch.randn(m, rank) / m**0.5, torch.randn(rank, n) / rank**0.5)
    for name in module.matrix_shapes:
        module.store(name, storage)
    return module


def forward(module: nn.Module, x: Tensor, with_onednn: bool = True) -> Tensor:
    """Run a module while gradients are on, and return its outputs."""
    with torch.enable_grad(), torch.backends.mkldnn.flags(enabled=with_onednn):
        return module(x)[0]


def step(module: nn.Module, x: Tensor, factors: Tensor, precision: str = "float32", with_onednn: bool = True) -> Tensor:
    """Run a module forward and backward, and return the gradients of x and the biases."""
    x = x.detach().requires_grad_()
    parameters = dict(module.named_parameters())
    with torch.enable_grad(), torch.backends.mkldnn.flags(enabled=with_onednn):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = module(x)[0]
        found = torch.autograd.grad(output, [x, *parameters.values()], factors.to(output))
    biases = [gradient for name, gradient in zip(parameters, found[1:], strict=True) if "bias" in name]
    return torch.cat([part.flatten().float() for part in (found[0], *biases)])


def in_double(module: nn.Module) -> nn.Module:
    """Return a copy in float64 that PyTorch's operators run."""
    copied = copy.deepcopy(module).double()
    if isinstance(copied, LowRankLSTM):
        copied.backend = "dense"
    return copied


def measured(mode: str, precision: str, sizes: tuple[int, int, int, int], seconds: float) -> dict[str, Any]:
    """Return one row of the result, for a layer with H inputs; ``sizes`` are H, T, B and the directions."""
    hidden, steps, batch, directions = sizes
    torch.manual_seed(0)
    lstm = nn.LSTM(hidden, hidden, bidirectional=directions == 2).train(mode == "training")
    x, factors = torch.randn(steps, batch, hidden), torch.randn(steps, batch, directions * hidden)
    modules = {name: compressed(lstm, *form) for name, form in FORMS[mode].items()}
    if mode == "evaluation":
        call: Any = partial(forward, x=x)
        truth = {
            name: forward(in_double(module), x.double()).float() for name, module in {"nn.LSTM": lstm, **modules}.items()
        }
    else:
        call = partial(step, x=x, factors=factors, precision=precision)
        doubles = {name: in_double(module) for name, module in {"nn.LSTM": lstm, **modules}.items()}
        truth = {name: step(double, x.double(), factors.double()) for name, double in doubles.items()}
    candidates = {
        name: Candidate(False, precision, "nn.LSTM", partial(call, lstm, with_onednn=is_on))
        for name, is_on in RIVALS_OF[precision].items()
    }
    for name, module in modules.items():
        kind = "int8" if FORMS[mode][name][1] == "int8" else precision
        candidates[name] = Candidate(True, kind, name, partial(call, module))
    tolerance = TOLERANCE if mode == "evaluation" else GRADIENT_TOLERANCE
    with using_threads(1):
        result = check_and_time(candidates, truth, {}, threads=1, seconds=seconds, tolerance=tolerance)
    if any(name in result["refused"] for name in modules):
        sys.exit(f"H {hidden}, T {steps}, B {batch}: outputs are wrong, so nothing was timed: {result['refused']}")
    times = {name: one["quartiles"][0] for name, one in result["candidates"].items()}
    rival = min(times[name] for name in RIVALS_OF[precision] if name in times)
    return {
        **{"hidden": hidden, "steps": steps, "batch": batch, "directions": directions},
        "faster": {name: rival / times[name] for name in modules},
        "microseconds": times,
        "errors": {name: one["error"] for name, one in result["candidates"].items()},
        "refused": result["refused"],
    }


def main() -> None:
    """Print a line for every setting, and write all results as JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=list(FORMS))
    parser.add_argument("--precision", choices=list(GRADIENT_TOLERANCE), default="float32", help="of training steps")
    sizes = {"hidden": [16, 64, 256, 512, 1024], "steps": [1, 35, 119], "batch": [1, 8, 32], "directions": [1]}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--seconds", type=float, default=0.3, help="how long each module is timed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # Switching oneDNN off and on warns about GPUs, which are not used.
    warnings.filterwarnings("ignore", "TF32 acceleration")
    rows: list[dict[str, Any]] = []
    for setting in itertools.product(*(getattr(arguments, name) for name in sizes)):
        if setting[0] ** 2 * setting[1] * setting[2] > LARGEST[arguments.mode]:
            continue
        row = measured(arguments.mode, arguments.precision, setting, arguments.seconds)
        rows.append(row)
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["faster"].items())
        print("H {hidden}, T {steps}, B {batch}, D {directions}: ".format(**row) + ratios, flush=True)
    if arguments.json:
        config = {"mode": arguments.mode, "precision": arguments.precision, "keep": KEEP, "seconds": arguments.seconds}
        made_by = provenance() | {"instruction_set": native.instruction_set()}
        write_json(arguments.json, {"rows": rows, "config": config, "provenance": made_by})


if __name__ == "__main__":
    main()
