"""Trains ELMo's language model (Peters et al. 2018): over characters, forward and backward, with a sampled softmax.

    python recipes/elmo.py --corpus wikitext-2 --output runs/elmo --max-minutes 60
    python recipes/elmo.py --corpus wikitext-2 ptb --size released --device cuda --output runs/elmo_large

It learns from sentences, one at a time from a state of zeros, with a mark before and one behind, as tasks show them. The
optimizer is AdamW with one cycle. A run that was killed, or that ``--max-minutes`` ended, goes on with the same command and
ends with the same files: ``options.json`` and ``weights.hdf5`` in the official format, ``log.jsonl`` with a line for every
epoch, and ``result.json``.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, embedding, linear

import slimlstm as sl
from paper.elmo import BiLM, ELMoConfig, characters_of, save_bilm
from slimlstm.demo.corpora import CORPORA, EOS, read_words, words_of
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
WEIGHT_DECAY, CLIP, WARM_UP = 0.01, 1.0, 0.05
SENTENCE_ENDS = {".", "!", "?"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
source = parser.add_mutually_exclusive_group(required=True)
source.add_argument("--corpus", nargs="+", choices=CORPORA)
source.add_argument("--text", type=Path, help="folder with train.txt and valid.txt, in the place of a corpus")
parser.add_argument("--output", type=Path, required=True, help="folder")
parser.add_argument("--size", choices=SIZES, default="small")
parser.add_argument("--dropout", type=float, default=0.1, help="before every LSTM layer")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--tokens", type=int, default=2000, help="in a batch")
parser.add_argument("--longest", type=int, default=60, help="sentences are cut to so many tokens")
parser.add_argument("--samples", type=int, default=2048, help="words that compete with the right one; 0 for all")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="what is computed in")
parser.add_argument("--max-minutes", type=float, default=math.inf, help="stop then; the same command goes on later")
parser.add_argument("--checkpoint-seconds", type=float, default=180.0)
arguments = parser.parse_args()
console, output, device = Console(), arguments.output, torch.device(arguments.device)
if (output / "result.json").exists():
    console.print(f"{output / 'result.json'} is there")
    sys.exit()
output.mkdir(parents=True, exist_ok=True)
lock = FileLock(output / ".lock")
try:
    lock.acquire(timeout=0)  # released when the process ends, however it does
except Timeout:
    sys.exit(f"another process works in {output}; wait for it, or end it")
warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
began = time.monotonic()


def seed(*what):
    """Random numbers depend on the place in the run alone, so that a resumed one draws the same."""
    torch.manual_seed(zlib.crc32(repr((arguments.seed, *what)).encode()))


def sentences_of(split):
    """Lines, cut behind full stops and after so many tokens."""
    if arguments.text:
        words = words_of((arguments.text / f"{split}.txt").read_text(encoding="utf-8"))
    else:
        words = [word for corpus in arguments.corpus for word in read_words(corpus, split)]
    sentences, sentence = [], []
    for word in words:
        if word != EOS:
            sentence.append(word)
        if sentence and (word == EOS or word in SENTENCE_ENDS or len(sentence) == arguments.longest):
            sentences.append(sentence)
            sentence = []
    return sentences


texts = {split: sentences_of(split) for split in ("train", "valid")}
counts = Counter(word for sentence in texts["train"] for word in sentence)
# Targets only: what is read is characters. The most frequent come first, as the sampling wants them.
BEGIN, END, UNKNOWN = 0, 1, 2
words = [word for word, _ in counts.most_common()]
ids = {word: index + 3 for index, word in enumerate(words)}
config = replace(SIZES[arguments.size], dropout=arguments.dropout)
# Of every word once; padding and the marks have their own rows.
spelled = torch.zeros(len(words) + 3, config.max_characters, dtype=torch.int64)
spelled[3:] = characters_of([words], config.max_characters)[0]


class Objective(nn.Module):
    """Sentences to their mean loss a token, over both directions."""

    def __init__(self):
        super().__init__()
        self.bilm = BiLM(config)
        self.softmax = nn.Linear(config.proj_size, len(words) + 3)
        nn.init.normal_(self.softmax.weight, std=config.proj_size**-0.5)
        nn.init.zeros_(self.softmax.bias)

    def forward(self, characters, targets, lengths, samples):
        """Marked characters [B, T, C], word ids [B, T]; lengths count the marks."""
        top = self.bilm.run(self.bilm.tokens(characters), lengths)[0][-1]
        ahead, back = top.split(config.proj_size, dim=2)
        inside = torch.arange(targets.shape[1], device=targets.device) < lengths[:, None]
        # What comes next, and what came before; the marks at the far ends predict nothing.
        pairs = [(ahead[:, :-1], targets[:, 1:]), (back[:, 1:], targets[:, :-1])]
        hidden = torch.cat([outputs[inside[:, 1:]] for outputs, _ in pairs])
        wanted = torch.cat([words[inside[:, 1:]] for _, words in pairs])
        return self.loss(hidden, wanted, samples)

    def loss(self, hidden, wanted, samples):
        """Cross-entropy by all words; or by the right one and a sample that stands for the others (Jean et al. 2015): each
        counts as often as there are words per sampled one of its kind, so that the sum over all words is met on average."""
        weight, bias, size = self.softmax.weight, self.softmax.bias, self.softmax.out_features
        if not samples or samples >= size:
            return cross_entropy(self.softmax(hidden).float(), wanted)
        # Log-uniform: word k has log((k + 2) / (k + 1)) / log(V + 1), near Zipf's law where k is the rank.
        drawn = (torch.rand(samples, device=hidden.device) * math.log(size + 1)).exp().long().sub(1)
        drawn = drawn.clamp(0, size - 1).unique()
        once = ((drawn + 2.0).log() - (drawn + 1.0).log()) / math.log(size + 1)
        included = -torch.expm1(samples * torch.log1p(-once))
        right = (hidden * embedding(wanted, weight)).sum(1) + bias[wanted]
        others = linear(hidden, weight[drawn], bias[drawn]) - included.log()
        others = others.masked_fill(drawn == wanted[:, None], -math.inf)
        logits = torch.cat([right[:, None], others], dim=1).float()
        return cross_entropy(logits, torch.zeros_like(wanted))


seed("weights")
objective = Objective().to(device)
parameters = dict(objective.named_parameters())
optimizer = torch.optim.AdamW(parameters.values(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)


def batches_of(sentences, *order):
    """Batches of sentences of like length, in an order that ``order`` seeds; without, from the shortest on."""
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    if order:
        seed(*order)
        lengths = lengths + torch.rand(len(lengths))  # equal lengths in any order
    batches, batch = [], []
    for place in lengths.argsort().tolist():
        batch.append(place)
        if len(batch) * (len(sentences[place]) + 2) >= arguments.tokens:
            batches.append(batch)
            batch = []
    batches += [batch] if batch else []
    return [batches[index] for index in torch.randperm(len(batches)).tolist()] if order else batches


def tensors_of(sentences):
    """Characters [B, T, C], word ids [B, T] and lengths [B], marks included."""
    lengths = torch.tensor([len(sentence) + 2 for sentence in sentences])
    targets = torch.full((len(sentences), int(lengths.max())), END)
    for row, sentence in enumerate(sentences):
        found = [ids.get(word, UNKNOWN) for word in sentence]
        targets[row, : len(found) + 2] = torch.tensor([BEGIN, *found, END])
    marks = objective.bilm.marks.cpu()
    characters = spelled[targets]
    # A word that training has not seen is spelled here.
    for row, column in (targets == UNKNOWN).nonzero().tolist():
        characters[row, column] = characters_of([[sentences[row][column - 1]]], config.max_characters)[0, 0]
    characters[targets == BEGIN], characters[targets == END] = marks[0], marks[1]
    beyond = torch.arange(targets.shape[1]) >= lengths[:, None]
    characters[beyond] = 0
    return characters.to(device), targets.to(device), lengths.to(device)


def measured():
    """The mean loss over the validation text, by the full softmax, words that training has not seen as one word."""
    objective.eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in batches_of(texts["valid"]):
            chosen = tensors_of([texts["valid"][place] for place in batch])
            targets = 2 * int((chosen[2] - 1).sum())
            total, count = total + targets * objective(*chosen, 0).item(), count + targets
    objective.train()
    return total / count


place = {"epoch": 0, "batch": 0, "total": 0.0, "seconds": 0.0, "log": []}
free = ("output", "max_minutes", "checkpoint_seconds", "device")
settings = {name: str(value) for name, value in vars(arguments).items() if name not in free}
checkpoint = output / "checkpoint.safetensors"


def write_text(path, text):
    path.with_suffix(".part").write_text(text, encoding="utf-8")
    path.with_suffix(".part").replace(path)


def write_checkpoint():
    tensors = {f"model.{name}": parameter for name, parameter in parameters.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"moment.{index}.{key}": value for key, value in moments.items()}
    part = checkpoint.with_suffix(".part")
    metadata = {"place": json.dumps(place), "settings": json.dumps(settings)}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, metadata)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(checkpoint)
    write_text(output / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in place["log"]))


def read_checkpoint():
    """Brings everything to where the checkpoint is."""
    with safe_open(checkpoint, "pt", device=str(device)) as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        theirs = json.loads(file.metadata()["settings"])
        place.update(json.loads(file.metadata()["place"]))
    for name in settings.keys() | theirs.keys():
        if settings.get(name) != theirs.get(name):
            raise sl.SlimLSTMError(
                f"{checkpoint} is of a run with {name}={theirs.get(name)}, not {settings.get(name)}; "
                "go on with that, or name another output"
            )
    moments = {}
    with torch.no_grad():
        for name, tensor in saved.items():
            kind, _, rest = name.partition(".")
            if kind == "model":
                parameters[rest].copy_(tensor)
            else:
                index, key = rest.split(".")
                # AdamW counts its steps on the CPU.
                moments.setdefault(int(index), {})[key] = tensor.cpu() if key == "step" else tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def learning_rate(batches):
    done = (place["epoch"] + place["batch"] / batches) / arguments.epochs
    warm = min(1.0, 0.05 + done / WARM_UP)
    return arguments.lr * (warm if done < WARM_UP else (1.0 + math.cos(math.pi * (done - WARM_UP) / (1.0 - WARM_UP))) / 2.0)


if checkpoint.exists():
    read_checkpoint()
    console.print(f"going on in epoch {place['epoch']} at batch {place['batch']}")
before, written = place["seconds"], 0.0
while place["epoch"] < arguments.epochs:
    batches = batches_of(texts["train"], "order", place["epoch"])
    objective.train()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"epoch {place['epoch']}", total=len(batches), completed=place["batch"])
        while place["batch"] < len(batches):
            chosen = tensors_of([texts["train"][index] for index in batches[place["batch"]]])
            seed("step", place["epoch"], place["batch"])
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
                loss = objective(*chosen, arguments.samples)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), CLIP)
            if not torch.isfinite(norm):
                raise sl.SlimLSTMError(f"the gradient is {float(norm)}; try an lr below {arguments.lr}")
            optimizer.param_groups[0]["lr"] = learning_rate(len(batches))
            optimizer.step()
            place["total"] += loss.item()
            place["batch"] += 1
            seconds = time.monotonic() - began
            place["seconds"] = before + seconds
            bar.update(task, completed=place["batch"])
            stop = seconds >= 60.0 * arguments.max_minutes
            if stop or seconds - written >= arguments.checkpoint_seconds:
                write_checkpoint()
                written = seconds
            if stop:
                console.print(f"{arguments.max_minutes:g} minutes are over; the same command goes on")
                sys.exit()
    loss = measured()
    entry = {
        "epoch": place["epoch"],
        "train_loss_sampled": place["total"] / len(batches),
        "valid_loss": loss,
        "valid_perplexity": math.exp(loss),
        "seconds": round(place["seconds"], 1),
    }
    place["log"].append(entry)
    console.print(entry)
    place.update(epoch=place["epoch"] + 1, batch=0, total=0.0)
    save_bilm(objective.bilm, output)
    write_checkpoint()

chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
result = {
    "perplexity": {"valid": place["log"][-1]["valid_perplexity"]},
    "epochs": len(place["log"]),
    "vocabulary": len(words),
    "tokens": sum(counts.values()),
    "parameters": {
        "bilm": sum(parameter.numel() for parameter in objective.bilm.parameters()),
        "softmax": sum(parameter.numel() for parameter in objective.softmax.parameters()),
    },
    "options": config.to_options(),
    "config": {name: value for name, value in chosen.items() if name not in ("output", "max_minutes", "text")},
    "seconds": round(place["seconds"], 1),
    "provenance": provenance(),
}
write_text(output / "result.json", json.dumps(result, indent=1) + "\n")
console.print(result["perplexity"])
