"""Train ELMo's language model (Peters et al. 2018): over characters, forward and backward, with a sampled softmax.

    python recipes/elmo.py --corpus wikitext-2 --output runs/elmo --max-minutes 60
    python recipes/elmo.py --corpus wikitext-2 ptb --size released --device cuda --output runs/elmo_large

It learns from single sentences, each from a state of zeros and between two marks, as tasks present them. The optimizer is
AdamW with one cycle. After a kill or ``--max-minutes``, the same command continues the run and ends with the same files:
``options.json`` and ``weights.hdf5`` in the official format, ``log.jsonl`` with a line an epoch, and ``result.json``.
"""

import argparse
import math
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from paper.elmo_config import ELMoConfig
from paper.elmo_files import save_bilm
from paper.elmo_training import Objective, SentenceEncoder, Training, TrainingOptions, sentences_of
from paper.runs import Pace, exit_if_done, lock_folder, recorded_options, seed, settings_of
from slimlstm.demo.corpora import CORPORA, read_words, words_of
from slimlstm.files import write_json
from slimlstm.provenance import provenance

SIZES = {
    "released": ELMoConfig(),
    "small": ELMoConfig(
        hidden_size=512,
        proj_size=128,
        cell_clip=None,
        proj_clip=None,
        filters=((1, 16), (2, 32), (3, 64), (4, 96), (5, 128)),
    ),
    "tiny": ELMoConfig(hidden_size=32, proj_size=16, cell_clip=None, proj_clip=None, filters=((2, 8), (3, 16))),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
source = parser.add_mutually_exclusive_group(required=True)
source.add_argument("--corpus", nargs="+", choices=CORPORA)
source.add_argument("--text", type=Path, help="folder with train.txt and valid.txt, instead of a corpus")
parser.add_argument("--output", type=Path, required=True, help="folder")
parser.add_argument("--size", choices=SIZES, default="small")
parser.add_argument("--dropout", type=float, default=0.1, help="before every LSTM layer")
parser.add_argument("--epochs", type=int, default=5, help="length of the cycle")
parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
parser.add_argument("--tokens", type=int, default=2000, help="in a batch, about")
parser.add_argument("--longest", type=int, default=60, help="cut sentences to this many tokens")
parser.add_argument("--samples", type=int, default=2048, help="words that compete with the right one; 0 for all")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="precision of the computation")
parser.add_argument("--max-minutes", type=float, default=math.inf, help="then stop; the same command continues the run")
parser.add_argument("--checkpoint-seconds", type=float, default=180.0, help="time between two checkpoints")
arguments = parser.parse_args()
console, output, device = Console(), arguments.output, torch.device(arguments.device)
exit_if_done(output / "result.json")
lock = lock_folder(output)
warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")


def words(split):
    if arguments.text:
        return words_of((arguments.text / f"{split}.txt").read_text(encoding="utf-8"))
    return [word for corpus in arguments.corpus for word in read_words(corpus, split)]


def result():
    log = training.place["log"]
    return {
        "perplexity": {"valid": log[-1]["valid_perplexity"]},
        "epochs": len(log),
        "vocabulary": len(encoder.words),
        "tokens": encoder.tokens,
        "parameters": {
            "bilm": sum(parameter.numel() for parameter in objective.bilm.parameters()),
            "softmax": sum(parameter.numel() for parameter in objective.softmax.parameters()),
        },
        "options": config.to_options(),
        "config": recorded_options(arguments, without=("output", "max_minutes", "text")),
        "seconds": round(training.place["seconds"], 1),
        "provenance": provenance(),
    }


pace = Pace(arguments.max_minutes, arguments.checkpoint_seconds)
texts = {split: sentences_of(words(split), arguments.longest) for split in ("train", "valid")}
config = replace(SIZES[arguments.size], dropout=arguments.dropout)
encoder = SentenceEncoder(texts["train"], config.max_characters, device)
seed(arguments.seed, "weights")
objective = Objective(config, len(encoder.words)).to(device)
options = TrainingOptions(
    lr=arguments.lr,
    epochs=arguments.epochs,
    tokens=arguments.tokens,
    samples=arguments.samples,
    seed=arguments.seed,
    bfloat16=arguments.dtype == "bfloat16",
)
training = Training(objective, encoder, texts, options, device)
settings = settings_of(arguments, without=("output", "max_minutes", "checkpoint_seconds", "device"))
if (output / "checkpoint.safetensors").exists():
    training.read_checkpoint(output, settings)
    console.print(f"continuing in epoch {training.place['epoch']} at batch {training.place['batch']}")
training.run(lambda: training.write_checkpoint(output, settings), lambda: save_bilm(objective.bilm, output), pace, console)
found = result()
write_json(output / "result.json", found)
console.print(found["perplexity"])
