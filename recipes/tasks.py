"""Trains BCN on SST-5, ESIM on SNLI or BiDAF on SQuAD, with or without ELMo, and measures what compressing the ELMo costs.

    python recipes/tasks.py --task sst5 --output results/task_sst5
    python recipes/tasks.py --task sst5 --elmo runs/elmo --output results/task_sst5 --ranks 10 20 30 50 100
    python recipes/tasks.py --task sst5 --elmo runs/elmo --output results/task_sst5 --ranks 10 30 --latency

The first two train, for every seed, until the validation score has not risen for some epochs; checkpoints, a line for every
epoch and the best weights lie in ``runs/``. With ``--ranks``, the ELMo inside every trained model is compressed by every
method, target and rank, without training, and the task is measured again. With ``--latency``, sentences are timed one at a
time instead. The output folder gets ``trained-elmo.json`` or ``trained-plain.json``, one file for every cell and seed, and
``latency.json``. What was interrupted, or ended by ``--max-minutes``, goes on with the same command; files that are there
are not made again. Scores are in percent. Where only part of a data set is at hand, ``label`` in every file says so.
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import slimlstm as sl
from paper.bcn import BCN, BCNConfig
from paper.bidaf import BiDAF, BiDAFConfig
from paper.elmo import ELMo, load_bilm
from paper.esim import ESIM, ESIMConfig
from paper.task_data import Paragraph, read_task, read_vectors, with_phrases
from paper.tasks import Batches, Remembering, losses, predictions, scores, size_of, texts_of, vocabulary_of
from slimlstm.bench import explain, interleaved_seconds, median_ratios
from slimlstm.provenance import provenance

TASKS = {
    "sst5": {
        "model": (BCN, BCNConfig),
        "splits": ("train", "dev", "test"),
        "published": {"sizes": {}, "batch": 100, "lr": 1e-3},
        "small": {"sizes": {"embedding_size": 100, "hidden_size": 100}, "batch": 64, "lr": 1e-3},
    },
    "snli": {
        "model": (ESIM, ESIMConfig),
        "splits": ("train", "dev", "test"),
        "published": {"sizes": {}, "batch": 32, "lr": 4e-4},
        "small": {"sizes": {"embedding_size": 100, "hidden_size": 100}, "batch": 64, "lr": 1e-3},
    },
    "squad": {
        "model": (BiDAF, BiDAFConfig),
        # The test set is not public: a tenth of the training paragraphs is held out for early stopping instead.
        "splits": ("train", None, "dev"),
        "published": {"sizes": {}, "batch": 60, "lr": 1e-3},
        "small": {"sizes": {"embedding_size": 50, "num_filters": 50, "hidden_size": 50}, "batch": 30, "lr": 2e-3},
    },
}
HELD_OUT, LONGEST_PARAGRAPH = 10, 400
CLIP, PATIENCE, CALIBRATION_SEED = 5.0, 4, 0
SHARED, SEEDED = ("svd", "semi-nmf", "prune"), ("activation", "fisher")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--task", choices=TASKS, required=True)
parser.add_argument("--output", type=Path, required=True, help="folder of results")
parser.add_argument("--runs", type=Path, default=Path("runs/tasks"), help="folder of checkpoints and weights")
parser.add_argument("--elmo", type=Path, help="folder with the options.json and weights.hdf5 of an ELMo; none by default")
parser.add_argument("--vectors", type=Path, help="word vectors as a text file, such as GloVe's; random ones by default")
parser.add_argument("--data", type=Path, help="folder with data of your own in the same format")
parser.add_argument("--config", choices=["published", "small"], default="small", help="sizes, batch and learning rate")
parser.add_argument("--seeds", nargs="+", type=int, default=[1])
parser.add_argument("--lr", type=float, help="in the place of the config's")
parser.add_argument("--batch", type=int, help="sentences, pairs or questions of a step, likewise")
parser.add_argument("--elmo-dropout", type=float, default=0.5)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--ranks", nargs="+", type=int, default=[], help="of the compressed ELMos; none: only train")
parser.add_argument("--methods", nargs="+", choices=[*SHARED, *SEEDED], default=[*SHARED, *SEEDED])
parser.add_argument("--targets", nargs="+", choices=["hh", "ih", "both"], default=["hh", "ih"])
parser.add_argument("--calibration", type=int, default=256, help="training examples for activation and fisher")
parser.add_argument("--limit", type=int, help="measure the cells on the first so many examples only")
parser.add_argument("--latency", action="store_true", help="time single sentences in the place of the cells")
parser.add_argument("--device", default="cpu")
parser.add_argument("--max-minutes", type=float, default=math.inf, help="stop then; the same command goes on later")
parser.add_argument("--checkpoint-seconds", type=float, default=120.0)
parser.add_argument("--remember", type=float, default=3.0, help="gigabytes for the ELMo's outputs, computed once")
arguments = parser.parse_args()
began = time.monotonic()
device, console = torch.device(arguments.device), Console()
config = TASKS[arguments.task][arguments.config]
arguments.lr, arguments.batch = arguments.lr or config["lr"], arguments.batch or config["batch"]
if arguments.ranks and not arguments.elmo:
    parser.error("--ranks are those of the ELMo, which --elmo names")
if arguments.latency and not arguments.ranks:
    parser.error("--latency takes --ranks")
bilm = load_bilm(arguments.elmo).to(device) if arguments.elmo else None
if bilm and max(arguments.ranks, default=0) >= bilm.config.proj_size:
    parser.error(f"the ELMo's matrices have rank {bilm.config.proj_size} at most; ranks have to be below")
kind, metric = "elmo" if bilm else "plain", "f1" if arguments.task == "squad" else "accuracy"
runs = arguments.runs / f"{arguments.task}-{arguments.config}-{arguments.elmo.name if bilm else kind}"


def seed(*what):
    """Random numbers depend on the place in the run alone, so that a resumed one draws the same."""
    torch.manual_seed(zlib.crc32(repr(what).encode()))


def out_of_time():
    return time.monotonic() - began >= 60.0 * arguments.max_minutes


def stop():
    console.print(f"{arguments.max_minutes:g} minutes are over; the same command goes on")
    sys.exit()


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(text, encoding="utf-8")
    path.with_suffix(".part").replace(path)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_tensors(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, metadata)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(path)


def sha256_of(folder):
    """Of an ELMo's weights and options."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*options.json"), *folder.glob("*weights*.hdf5")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_splits():
    """Examples for training, validation and the final score, and the splits that they come from."""
    names = TASKS[arguments.task]["splits"]
    found = {name: read_task(arguments.task, name, arguments.data) for name in names if name}
    train, validation, test = (found[name].examples if name else None for name in names)
    if validation is None:
        validation = train[::HELD_OUT]
        train = [
            example for index, example in enumerate(train) if index % HELD_OUT and len(example.tokens) <= LONGEST_PARAGRAPH
        ]
    return train, validation, test, {name: {"label": part.label, "sha256": part.sha256} for name, part in found.items()}


train, validation, test, splits = read_splits()
learnt = with_phrases(train) if arguments.task == "sst5" else train
tokens = sorted(
    {token for part in (train, validation, test) for example in part for text in texts_of(example) for token in text}
)
with_vectors, vectors = [], None
if arguments.vectors:
    with_vectors, vectors = read_vectors(arguments.vectors, {token.lower() for token in tokens})
vocabulary = vocabulary_of(train, with_vectors)
batches_of = Batches(tokens, vocabulary, with_characters=bool(bilm) or arguments.task == "squad", device=device)


def in_kernel(bilm):
    """The same language model, its LSTMs being modules that the kernel runs where it can."""
    other = copy.copy(bilm)
    other._modules = dict(bilm._modules)
    for name in ("forward_lstms", "backward_lstms"):
        setattr(other, name, nn.ModuleList(sl.LowRankLSTM.from_dense(lstm) for lstm in getattr(bilm, name)))
    return other.eval()


def new_model(seed_of_weights, memory):
    """An untrained model; ``memory`` stands for its language model."""
    seed(seed_of_weights, "weights")
    model_type, config_type = TASKS[arguments.task]["model"]
    sizes = dict(config["sizes"])
    if vectors is not None:
        sizes["embedding_size"] = vectors.shape[1]
    elmo = ELMo(bilm, arguments.elmo_dropout) if bilm else None
    model = model_type(config_type(len(vocabulary), **sizes), elmo)
    if vectors is not None:
        with torch.no_grad():
            model.embedder.words.weight[vocabulary.encode(with_vectors)] = vectors
    if elmo:
        elmo.bilm = memory
    return model.to(device)


def own(tensors):
    """Those of the task, without the language model's."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("embedder.elmo.bilm.")}


def predictions_of(models, batches, bilm=None):
    """What every model predicts, in the order of the batches.

    The language model ``bilm``, where there is one, takes the place of theirs, and reads every text once for all of them.
    """
    found = [[] for _ in models]
    for model in models:
        model.eval()
    # No weight changes meanwhile, so that masks need to be applied only once.
    with parametrize.cached():
        for batch in batches:
            memory = Remembering(bilm) if bilm else None
            for model, predicted in zip(models, found, strict=True):
                if memory:
                    model.embedder.elmo.bilm = memory
                predicted.extend(predictions(model, batch))
    return found


# Training.

settings = {name: str(getattr(arguments, name)) for name in ("task", "config", "lr", "batch", "elmo_dropout")}
settings |= {
    "vectors": arguments.vectors.name if arguments.vectors else "none",
    "elmo": sha256_of(arguments.elmo) if bilm else "none",
    "train": splits["train"]["sha256"],
}


class Training:
    """One seed's: a place in it, checkpoints, and the best weights."""

    def __init__(self, number, memory):
        self.number, self.folder = number, runs / f"seed-{number}"
        self.model = new_model(number, memory)
        self.parameters = own({name: value for name, value in self.model.named_parameters() if value.requires_grad})
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=arguments.lr)
        self.place = {
            "epoch": 0,
            "position": 0,
            "total": 0.0,
            "seconds": 0.0,
            "lr": arguments.lr,
            "best": -1.0,
            "stalled": 0,
        }
        self.log = []
        self.checkpoint = self.folder / "checkpoint.safetensors"

    def write(self):
        tensors = {f"model.{name}": tensor for name, tensor in own(self.model.state_dict()).items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"moment.{index}.{key}": value for key, value in moments.items()}
        metadata = {"place": self.place, "log": self.log, "settings": settings}
        write_tensors(self.checkpoint, tensors, {name: json.dumps(value) for name, value in metadata.items()})
        write_text(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))

    def read(self):
        with safe_open(self.checkpoint, "pt", device=str(device)) as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        check_settings(metadata["settings"], self.checkpoint)
        self.place.update(metadata["place"])
        self.log = metadata["log"]
        weights = {name.removeprefix("model."): tensor for name, tensor in saved.items() if name.startswith("model.")}
        self.model.load_state_dict(weights, strict=False)
        moments = {}
        for name, tensor in saved.items():
            if name.startswith("moment."):
                _, index, key = name.split(".")
                # Adam counts its steps on the CPU.
                moments.setdefault(int(index), {})[key] = tensor.cpu() if key == "step" else tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def step(self, batch):
        seed(self.number, "dropout", self.place["epoch"], self.place["position"])
        loss = losses(self.model, batch).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        if not torch.isfinite(norm):
            raise sl.SlimLSTMError(f"the gradient is {float(norm)}; try an lr below {arguments.lr}")
        self.optimizer.param_groups[0]["lr"] = self.place["lr"]
        self.optimizer.step()
        self.place["total"] += loss.item()
        self.place["position"] += 1

    def epoch(self, batches, validation):
        """Goes through the batches, from where the checkpoint left off, and validates."""
        seed(self.number, "order", self.place["epoch"])
        order = torch.randperm(len(batches)).tolist()
        self.model.train()
        started = written = time.monotonic()
        before = self.place["seconds"]
        for index in track(
            order[self.place["position"] :], f"epoch {self.place['epoch']}", console=console, transient=True
        ):
            self.step(batches[index])
            now = time.monotonic()
            self.place["seconds"] = before + now - started
            if out_of_time() or now - written > arguments.checkpoint_seconds:
                self.write()
                written = now
            if out_of_time():
                stop()
        found = scores(predictions_of([self.model], validation)[0], validation)
        self.end_epoch(len(batches), found, before + time.monotonic() - started)

    def end_epoch(self, steps, found, seconds):
        place = self.place
        entry = {"epoch": place["epoch"], "train_loss": place["total"] / steps, "lr": place["lr"], **found}
        self.log.append(entry | {"seconds": round(seconds, 1)})
        console.print(f"seed {self.number} {json.dumps(self.log[-1])}", soft_wrap=True)
        if found[metric] > place["best"]:
            place.update(best=found[metric], stalled=0)
            write_tensors(self.folder / "model.safetensors", own(self.model.state_dict()))
        else:
            place.update(stalled=place["stalled"] + 1, lr=place["lr"] / 2)
        place.update(epoch=place["epoch"] + 1, position=0, total=0.0, seconds=seconds)
        self.write()


def check_settings(theirs, path, ours=settings):
    for name in ours:
        if ours[name] != theirs.get(name):
            raise sl.SlimLSTMError(
                f"{path} is of a run with {name}={theirs.get(name)}, not {ours[name]}; name other folders"
            )


def train_seed(number, memory, batches, validation, test):
    training = Training(number, memory)
    if training.checkpoint.exists():
        training.read()
        console.print(f"seed {number}: going on in epoch {training.place['epoch']}")
    while training.place["epoch"] < arguments.epochs and training.place["stalled"] < PATIENCE:
        training.epoch(batches, validation)
        if out_of_time():
            stop()
    model = trained_model(number, memory)
    total = sum(parameter.numel() for parameter in model.parameters())
    of_elmo = sum(parameter.numel() for parameter in bilm.parameters()) if bilm else 0
    result = {
        "seed": number,
        "validation": {
            name: value for name, value in max(training.log, key=lambda entry: entry[metric]).items() if name != "seconds"
        },
        "scores": scores(predictions_of([model], test)[0], test),
        "epochs": len(training.log),
        "parameters": {"model": total, "elmo": of_elmo},
        "seconds": round(training.place["seconds"], 1),
        "settings": settings,
    }
    write_json(training.folder / "result.json", result)


def trained_model(number, memory):
    model = new_model(number, memory)
    model.load_state_dict(load_file(runs / f"seed-{number}" / "model.safetensors", device=str(device)), strict=False)
    return model.eval()


def spread(values):
    return {"mean": statistics.fmean(values), "standard_deviation": statistics.stdev(values) if len(values) > 1 else None}


def common():
    """What stands in every file."""
    label = splits["train"]["label"]
    if learnt is not train:
        label += f", with the phrases of over three tokens in them {len(learnt):,} examples"
    if TASKS[arguments.task]["splits"][1] is None:
        label += (
            f", of which every {HELD_OUT}th paragraph is held out and those of over {LONGEST_PARAGRAPH} tokens are left out"
        )
    return {
        "task": arguments.task,
        "label": label,
        "data": splits,
        "config": {
            **settings,
            "elmo_name": arguments.elmo.name if bilm else None,
            "sizes": config["sizes"],
            "words": len(vocabulary),
        },
        "provenance": provenance(),
    }


left = [number for number in arguments.seeds if not (runs / f"seed-{number}" / "result.json").exists()]
memory = Remembering(in_kernel(bilm), arguments.remember) if bilm else None
if left:
    runs.mkdir(parents=True, exist_ok=True)
    lock = FileLock(runs / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit(f"another process trains in {runs}; wait for it, or end it")
    parts = [batches_of(part, arguments.batch) for part in (learnt, validation, test)]
    for number in left:
        train_seed(number, memory, *parts)
    del parts
    lock.release()
    # The table does not need what was remembered of the training data.
    memory = Remembering(memory.bilm) if bilm else None
results = [json.loads((runs / f"seed-{number}" / "result.json").read_text(encoding="utf-8")) for number in arguments.seeds]
for number, result in zip(arguments.seeds, results, strict=True):
    check_settings(result.pop("settings"), runs / f"seed-{number}" / "result.json")
over_seeds = {name: spread([result["scores"][name] for result in results]) for name in results[0]["scores"]}
summary = {"metric": metric, "scores": over_seeds, "seeds": results, **common()}
write_json(arguments.output / f"trained-{kind}.json", summary)
console.print(f"{arguments.task}, {kind}, {summary['label']}:", over_seeds)
if not arguments.ranks:
    sys.exit()

# The table: the ELMo inside the trained models, compressed.


def first(examples, limit):
    """The first so many sentences or pairs, or the first paragraphs that have so many questions."""
    if limit is None:
        return examples
    counts = itertools.accumulate(map(size_of, examples))
    return examples[: 1 + sum(count < limit for count in counts)]


def is_in_elmo(site):
    return site.module.startswith("embedder.elmo.")


def with_elmo(model, bilm):
    """A copy of the model with a language model of its own."""
    held, model.embedder.elmo.bilm = model.embedder.elmo.bilm, None
    other = copy.deepcopy(model)
    model.embedder.elmo.bilm, other.embedder.elmo.bilm = held, bilm
    return other.eval()


def compressed_alone(method, target, rank):
    """The language model without regard to a task, and the report."""
    other = copy.deepcopy(bilm)
    rule = sl.Prune(rank=rank, target=target) if method == "prune" else sl.LowRank(method, rank=rank, target=target)
    return other, sl.compress_(other, rule)


def compressed_inside(method, target, rank, number):
    """The language model for the task model of one seed, calibrated with the task's loss; and the report."""
    other = with_elmo(models[number], copy.deepcopy(bilm))
    if number not in calibrations:
        calibrations[number] = sl.calibrate(other, calibration_batches, losses)
    rule = sl.LowRank(method, rank=rank, target=target, filter=is_in_elmo)
    report = sl.compress_(other, rule, batches=calibration_batches, loss=losses, calibration=calibrations[number])
    return other.embedder.elmo.bilm, report


def path_of(method, target, rank, number):
    cell = "dense" if method == "dense" else f"{method}-{target}-{rank:03d}"
    return arguments.output / f"{cell}-seed{number}.json"


def settings_of(method):
    """What two files of the table have to agree in."""
    calibration = arguments.calibration if method in SEEDED else "none"
    return settings | {"limit": str(arguments.limit), "calibration": str(calibration)}


def read_cell(cell, number):
    path = path_of(*cell, number)
    result = json.loads(path.read_text(encoding="utf-8"))
    check_settings(result["config"], path, settings_of(cell[0]))
    return result


def measure(method, target, rank, numbers):
    """Measures one cell for some seeds, whose task models read the same compressed ELMo, and writes their files."""
    started, report = time.monotonic(), None
    if method == "dense":
        other = memory.bilm
    elif method in SHARED:
        other, report = compressed_alone(method, target, rank)
    else:
        other, report = compressed_inside(method, target, rank, numbers[0])
    solved = time.monotonic()
    predicted = predictions_of([models[number] for number in numbers], test_batches, other)
    seconds = {
        "compress": round(solved - started, 2),
        "evaluate": round(time.monotonic() - solved, 2),
        "seeds": len(numbers),
    }
    for number, answers in zip(numbers, predicted, strict=True):
        result = {
            **{"method": method, "target": target, "rank": rank, "seed": number, "metric": metric},
            "scores": scores(answers, test_batches),
            "examples": len(answers),
            "limit": f"first {len(answers):,} of {splits[TASKS[arguments.task]['splits'][2]]['label']}"
            if arguments.limit
            else None,
            "parameters": parameters_of(results[arguments.seeds.index(number)]["parameters"], report),
            "calibration_loss": {"before": report.loss_before, "after": report.loss_after} if report else None,
            "sites": [asdict(site) for site in report.sites] if report else [],
            "seconds": seconds,
            **common(),
        }
        result["config"] |= settings_of(method)
        write_json(path_of(method, target, rank, number), result)


def parameters_of(dense, report):
    """Of the ELMo and the whole model, before and after; of pruned matrices, the weights that are left."""
    saved = report.model.parameters_before - report.model.parameters_after if report else 0
    return {name: {"before": count, "after": count - saved} for name, count in dense.items()}


def rounding_error(model, inputs):
    """By how much the output is off, relative to that of the same weights in float64."""
    with torch.no_grad():
        fast, exact = model(*inputs).double(), copy.deepcopy(model).double()(*inputs)
    there = exact.isfinite()
    return float((fast - exact)[there].norm() / exact[there].norm())


def latency():
    """One sentence, the median one in length, through the ELMo and the whole model of the first seed, all by turns."""
    median = sorted(test, key=lambda example: len(texts_of(example)[0]))[len(test) // 2]
    if isinstance(median, Paragraph):
        median = replace(median, questions=median.questions[:1])
    batch = batches_of([median], 1)[0]
    versions = {"dense": (bilm, None), "dense, kernel": (memory.bilm, None)}
    for target, rank in itertools.product(arguments.targets, arguments.ranks):
        versions[f"svd, {target}, {rank}"] = compressed_alone("svd", target, rank)
    wholes = {name: with_elmo(models[arguments.seeds[0]], other) for name, (other, _) in versions.items()}
    found = {"tokens": [text[0].shape[1] for text in batch.inputs[:2]]}
    for part, inputs in (("elmo", batch.inputs[0][1:]), ("model", batch.inputs)):
        modules = {name: whole.embedder.elmo if part == "elmo" else whole for name, whole in wholes.items()}
        errors = {name: rounding_error(module, inputs) for name, module in modules.items()}
        for name, error in errors.items():
            if not error < 1e-4:
                raise sl.SlimLSTMError(
                    f"{part}, {name}: the output is off by {error:.1e}; no time is told of a wrong answer"
                )
        seconds = interleaved_seconds({name: partial(module, *inputs) for name, module in modules.items()})
        ratios = median_ratios(seconds, "dense")
        found[part] = {
            name: {
                "milliseconds": [1e3 * value for value in statistics.quantiles(seconds[name], n=4)],
                "faster": ratios[name],
                "rounding_error": errors[name],
                "backends": backends_of(module, inputs),
                "parameters": parameters_of(results[0]["parameters"], versions[name][1])[part],
            }
            for name, module in modules.items()
        }
    return found


def backends_of(model, inputs):
    """How many LSTM layers of the ELMo, or of the whole model, run with which backend."""
    with torch.no_grad():
        return Counter(layer.backend for layer in explain(model, *inputs).layers)


models = {number: trained_model(number, memory) for number in arguments.seeds}
if arguments.latency:
    found = latency()
    write_json(arguments.output / "latency.json", {**found, **common()})
    table = Table("", *(f"{part}: {what}" for part in ("elmo", "model") for what in ("ms", "faster", "parameters")))
    for name in found["elmo"]:
        cells = [found[part][name] for part in ("elmo", "model")]
        table.add_row(
            name,
            *(
                text
                for c in cells
                for text in (f"{c['milliseconds'][1]:.2f}", f"{c['faster']:.2f}x", f"{c['parameters']['after']:,}")
            ),
        )
    console.print(table)
    sys.exit()

test_batches = batches_of(first(test, arguments.limit), arguments.batch)
drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(CALIBRATION_SEED)).tolist()
calibration_batches = batches_of(first([train[index] for index in drawn], arguments.calibration), arguments.batch)
calibrations = {}
cells = [("dense", "none", 0), *itertools.product(arguments.methods, arguments.targets, arguments.ranks)]
for cell, number in itertools.product(cells, arguments.seeds):
    if path_of(*cell, number).exists():
        read_cell(cell, number)
for cell in track(cells, "compressed ELMos", console=console, transient=True):
    missing = [number for number in arguments.seeds if not path_of(*cell, number).exists()]
    # Calibration with the task's own loss gives every seed an ELMo of its own.
    for numbers in [[number] for number in missing] if cell[0] in SEEDED else [missing] if missing else []:
        if out_of_time():
            stop()
        measure(*cell, numbers)

table = Table("method", "target", "rank", "ELMo's parameters", metric, "spread", "change")
baseline = None
for cell in cells:
    found = [read_cell(cell, number) for number in arguments.seeds]
    one = spread([result["scores"][metric] for result in found])
    baseline = baseline or one["mean"]
    table.add_row(
        cell[0],
        cell[1],
        str(cell[2] or ""),
        f"{found[0]['parameters']['elmo']['after']:,}",
        f"{one['mean']:.2f}",
        "" if one["standard_deviation"] is None else f"{one['standard_deviation']:.2f}",
        f"{one['mean'] - baseline:+.2f}",
    )
console.print(table, summary["label"])
