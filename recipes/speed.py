"""Measure how much faster a trained AWD-LSTM is with hh as factors, in the fused kernel and in plain PyTorch.

    python recipes/speed.py --model ptb --output results/ptb_speed.json
    python recipes/speed.py --model ptb --training --steps 70 --batch 20 \\
        --output results/ptb_training_speed.json

It times the LSTM layers ("layers"), and with them the embedding and the softmax ("model"), on one thread. Every output is
first checked against float64 with the same weights. Calls are interleaved, and results are ratios of medians to the best
dense ``nn.LSTM``, with oneDNN or without. Plain PyTorch is the loop over time with thin factors or ``nn.LSTM`` on U V,
whichever is faster. With ``--training``, it times the layers' forward and backward passes instead, in float32 and bfloat16,
through ``nn.LSTM`` and on factors in the backend that training gets. If the output exists, nothing is done.
"""

import argparse
import copy
import itertools
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

import slimlstm as sl
from paper.runs import exit_if_done
from paper.stored_models import load_language_model, model_folder
from slimlstm.bench.candidates import Candidate, check_and_time
from slimlstm.bench.timing import SECONDS
from slimlstm.files import write_json
from slimlstm.ops import native
from slimlstm.provenance import provenance

PLAIN = ("reference", "dense")
# Tolerances: gradients accumulate the rounding errors of all steps.
GRADIENT_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=model_folder, required=True, help="folder of an AWD-LSTM, or name of a stored one")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--ranks", nargs="+", type=int, default=[10, 400])
parser.add_argument("--steps", nargs="+", type=int, default=[35, 70, 1], help="time steps of a call")
parser.add_argument("--batch", nargs="+", type=int, default=[1, 20])
parser.add_argument("--training", action="store_true", help="time forward and backward passes of the layers")
parser.add_argument("--seconds", type=float, default=SECONDS, help="about how long each candidate is timed")
arguments = parser.parse_args()
exit_if_done(arguments.output)
# Switching oneDNN off and on warns about GPUs, which are not used.
warnings.filterwarnings("ignore", "TF32 acceleration")


class Layers(nn.Module):
    """Map token ids [T, B] to the outputs of the last LSTM layer [T, B, E]; the embedding costs next to nothing."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.features(tokens)


SCOPES = {"layers": Layers, "model": lambda model: model}


def with_backend(model, backend):
    """Return a copy whose low-rank layers all run in one backend."""
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if isinstance(layer, sl.LowRankLSTM):
            layer.backend = backend
    return copied


def in_double(model, tokens):
    with torch.no_grad():
        return with_backend(model, "reference").double()(tokens)[0]


def call_dense(module, tokens, enabled):
    with torch.backends.mkldnn.flags(enabled=enabled):
        return module(tokens)[0]


def call(module, tokens):
    return module(tokens)[0]


dense = load_language_model(arguments.model)
compressed, parameters = {}, {"dense": sum(parameter.numel() for parameter in dense.parameters())}
for rank in arguments.ranks:
    compressed[f"rank {rank}"] = copy.deepcopy(dense)
    report = sl.compress_(compressed[f"rank {rank}"], sl.LowRank("svd", rank=rank, target="hh"))
    parameters[f"rank {rank}"] = report.model.parameters_after


def measured(scope, steps, batch):
    """Return one row of the result."""
    whole = SCOPES[scope]
    tokens = torch.randint(dense.config.vocab_size, (steps, batch), generator=torch.Generator().manual_seed(0))
    exact = {name: in_double(whole(model), tokens) for name, model in {"dense": dense, **compressed}.items()}
    found = {
        name: Candidate(False, "float32", "dense", partial(call_dense, whole(dense), tokens, enabled))
        for name, enabled in (("PyTorch oneDNN", True), ("PyTorch native", False))
    }
    for (name, model), backend in itertools.product(compressed.items(), ("fused", *PLAIN)):
        run = partial(call, whole(with_backend(model, backend)), tokens)
        # All of them are compared with the best dense rival, although the plain backends are PyTorch's operators alone.
        found[f"{backend} {name}"] = Candidate(True, "float32", name, run)
    result = check_and_time(found, exact, {}, threads=1, seconds=arguments.seconds)
    if result["refused"]:
        sys.exit(f"{scope}, T = {steps}, B = {batch}: outputs are wrong, so nothing was timed: {result['refused']}")
    ratios = {name: one["faster"]["dense"]["ratio"] for name, one in result["candidates"].items() if one["ours"]}
    faster = {
        name: {"fused": ratios[f"fused {name}"], "plain PyTorch": max(ratios[f"{backend} {name}"] for backend in PLAIN)}
        for name in compressed
    }
    return {"scope": scope, "steps": steps, "batch": batch, "faster": faster, **result}


def gradients(module, tokens, precision="float32", enabled=True):
    """Compute the gradients of a random sum of the outputs by all weights, and return those by the biases."""
    parameters = [value for name, value in module.named_parameters() if ".lstms." in name]
    factors = torch.randn(*tokens.shape, dense.config.embedding_size, generator=torch.Generator().manual_seed(1))
    with torch.enable_grad(), torch.backends.mkldnn.flags(enabled=enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = module(tokens)[0]
        found = torch.autograd.grad((output * factors.to(output)).sum(), parameters)
    return torch.cat([gradient for gradient in found if gradient.ndim == 1])


def measured_training(precision, steps, batch):
    """Return one row of the result."""
    tokens = torch.randint(dense.config.vocab_size, (steps, batch), generator=torch.Generator().manual_seed(0))
    models = {"dense": dense, **compressed}
    exact = {name: gradients(Layers(with_backend(model, "reference").double()), tokens) for name, model in models.items()}
    found = {
        engine: Candidate(False, precision, "dense", partial(gradients, Layers(dense), tokens, precision, enabled))
        for engine, enabled in (("PyTorch oneDNN", True), ("PyTorch native", False))
    }
    for name, model in compressed.items():
        found[name] = Candidate(True, precision, name, partial(gradients, Layers(model), tokens, precision))
    result = check_and_time(found, exact, {}, threads=1, seconds=arguments.seconds, tolerance=GRADIENT_TOLERANCE)
    if result["refused"]:
        sys.exit(f"{precision}, T = {steps}, B = {batch}: gradients are wrong, so nothing was timed: {result['refused']}")
    medians = {name: one["microseconds"] for name, one in result["candidates"].items()}
    best = min(medians["PyTorch oneDNN"], medians["PyTorch native"])
    faster = {name: {"training": best / medians[name]} for name in compressed}
    return {"scope": precision, "steps": steps, "batch": batch, "faster": faster, **result}


scopes, row_of = (GRADIENT_TOLERANCE, measured_training) if arguments.training else (SCOPES, measured)
settings = list(itertools.product(scopes, arguments.steps, arguments.batch))
result = {
    "rows": [row_of(*setting) for setting in track(settings, "speed")],
    "parameters": parameters,
    "config": {"model": arguments.model.name, "seconds": arguments.seconds, "threads": 1},
    "provenance": provenance() | {"instruction_set": native.instruction_set()},
}
write_json(arguments.output, result)
for row in result["rows"]:
    for name, ratios in row["faster"].items():
        text = ", ".join(f"{engine} {ratio:.2f}x" for engine, ratio in ratios.items())
        print("{scope}, T = {steps}, B = {batch}".format(**row) + f", {name}: {text}")
