"""Compress a trained AWD-LSTM, tune it for some minutes, and measure its perplexity before and after.

    python recipes/tune.py --model ptb --corpus ptb --method svd --keep 0.25 --teacher \\
        --minutes 10 --output results/ptb_tuned/svd-025.json

It learns from training text only; the result has the weights that do best on part of the validation text. After an
interruption, the same command continues the run; if the output exists, nothing is done. ``torchrun --nproc-per-node N``
divides the streams among N processes.
"""

import argparse
import copy
import os
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.functional import cross_entropy

import slimlstm as sl
from paper.stored_models import load_language_model, model_folder
from paper.texts import EVALUATION_STREAMS, side_by_side
from slimlstm.calibration.moments import Calibration
from slimlstm.demo.corpora import CORPORA, Vocabulary, read_words
from slimlstm.evaluate import perplexity
from slimlstm.files import write_json
from slimlstm.methods import METHODS
from slimlstm.pipeline.config import configuration
from slimlstm.provenance import provenance
from slimlstm.tuning import divergence

BPTT = 70
VALIDATION_TOKENS = 10_000

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=model_folder, required=True, help="folder of an AWD-LSTM, or name of a stored one")
parser.add_argument("--corpus", choices=CORPORA, required=True)
parser.add_argument("--method", default="svd", choices=METHODS)
parser.add_argument("--calibration", type=Path, help="for methods that need it: a file that recipes/quality.py wrote")
parser.add_argument("--keep", type=float, default=0.25, help="fraction of every matrix's parameters that stays")
parser.add_argument("--minutes", type=float, default=10.0)
parser.add_argument("--teacher", action="store_true", help="learn the dense model's predictions instead of the next words")
parser.add_argument("--lr", type=float, help="learning rate; default: 1e-3 with --teacher, 3e-4 without")
parser.add_argument("--dropout", type=float, default=0.0, help="factor of the published dropout rates")
parser.add_argument("--streams", type=int, default=20, help="text streams side by side (the batch size)")
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="precision of the computation")
parser.add_argument("--output", type=Path, required=True, help="JSON file; the checkpoint is beside it meanwhile")
arguments = parser.parse_args()
arguments.lr = arguments.lr or (1e-3 if arguments.teacher else 3e-4)
processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
console = Console(quiet=rank > 0)
if arguments.output.exists():
    console.print(f"{arguments.output} already exists")
    sys.exit()

words = Vocabulary.read(arguments.model / "vocab.txt")
tokens = {split: words.encode(read_words(arguments.corpus, split)) for split in ("train", "valid", "test")}
streams = side_by_side(tokens["train"], arguments.streams)
dense = load_language_model(arguments.model).to(arguments.device)
model = copy.deepcopy(dense)
model.config = model.config.scaled(arguments.dropout)


class NextWords:
    """Loss that carries every model's state from piece to piece of the text."""

    def __init__(self):
        self.states = {}

    def __call__(self, model, batch):
        start, piece = batch
        piece = piece.to(arguments.device)
        logits = self.read(model, "model", start, piece[:-1])
        if not arguments.teacher:
            return cross_entropy(logits.flatten(0, 1).float(), piece[1:].flatten())
        with torch.no_grad():
            expected = self.read(dense, "teacher", start, piece[:-1])
        return divergence(logits, expected)

    def read(self, model, name, start, piece):
        logits, state = model(piece, self.states[name] if start else None)
        self.states[name] = [(h.detach(), c.detach()) for h, c in state]
        return logits

    def state_dict(self):
        return self.states

    def load_state_dict(self, states):
        self.states = {
            name: [(h.to(arguments.device), c.to(arguments.device)) for h, c in state] for name, state in states.items()
        }


def pieces(epoch):
    """Yield pieces (index in the epoch, tokens [BPTT + 1, streams]), which overlap by the token that is only predicted.

    Every process gets its own streams, always the same ones.
    """
    offset = int(torch.randint(BPTT, ()))
    for index, start in enumerate(range(offset, len(streams) - BPTT, BPTT)):
        for part in streams[start : start + BPTT + 1].chunk(processes, 1):
            yield index, part


def measured(model, split, count=None):
    return perplexity(model, tokens[split][:count].to(arguments.device), streams=EVALUATION_STREAMS, steps=350)


began = time.monotonic()
calibration = Calibration.load(arguments.calibration) if arguments.calibration else None
report = sl.compress_(model, configuration(arguments.method, keep=arguments.keep), calibration=calibration)
compressed = time.monotonic()
results = {"dense": measured(dense, "test"), "before": measured(model, "test")}
arguments.output.parent.mkdir(parents=True, exist_ok=True)
checkpoint = arguments.output.with_suffix(".checkpoint")
with Progress(console=console, transient=True) as bar:
    task = bar.add_task("tuning", total=1.0)
    history = sl.finetune(
        model,
        pieces,
        NextWords(),
        minutes=arguments.minutes,
        lr=arguments.lr,
        validate=lambda model: measured(model, "valid", VALIDATION_TOKENS).loss,
        dtype=torch.bfloat16 if arguments.dtype == "bfloat16" else None,
        checkpoint=checkpoint,
        progress=lambda text, fraction: bar.update(task, description=text, completed=fraction),
    )
results["after"] = measured(model, "test")
result = {
    "perplexity": {name: found.perplexity for name, found in results.items()},
    "loss": {name: found.loss for name, found in results.items()},
    "parameters": report.model.parameters_after,
    "history": {name: value for name, value in history.to_dict().items() if name != "losses"},
    "seconds": {"compress": round(compressed - began, 2), "tune": round(history.seconds, 2)},
    "config": {
        **{name: value for name, value in vars(arguments).items() if name not in ("model", "output", "calibration")},
        "model": arguments.model.name,
        "processes": processes,
        "sha256": {split: CORPORA[arguments.corpus].splits[split].sha256 for split in tokens},
    },
    "provenance": provenance(),
}
if rank == 0:
    write_json(arguments.output, result)
    checkpoint.unlink()
console.print(result["perplexity"])
