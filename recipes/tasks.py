"""Train BCN on SST-5, ESIM on SNLI or BiDAF on SQuAD, with or without ELMo, and measure what compressing the ELMo costs.

    python recipes/tasks.py --task sst5 --output results/task_sst5
    python recipes/tasks.py --task sst5 --elmo runs/elmo --output results/task_sst5 --ranks 10 20 30 50 100
    python recipes/tasks.py --task sst5 --elmo runs/elmo --output results/task_sst5 --ranks 10 30 --latency

The first two commands train, for every seed, until the validation score has not risen for some epochs; checkpoints, a line
for every epoch and the best weights are in ``runs/``. With ``--ranks``, the ELMo in every trained model is compressed by
every method, target and rank, without training, and the task is measured again. With ``--latency``, single sentences are
timed instead. The output folder gets ``trained-elmo.json`` or ``trained-plain.json``, one file for every cell and seed, and
``latency.json``. After an interruption or ``--max-minutes``, the same command continues; files that exist are not made
again. Scores are in percent. Where only part of a data set is available, ``label`` in every file says so.
"""

import argparse
import hashlib
import itertools
import math
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from paper.bcn import BCN, BCNConfig
from paper.bidaf import BiDAF, BiDAFConfig
from paper.elmo import ELMo
from paper.elmo_files import load_bilm
from paper.esim import ESIM, ESIMConfig
from paper.methods import add_plugin_option
from paper.runs import Pace, check_settings, lock_folder, read_json, seed
from paper.task_cells import (
    TaskCompressor,
    compressed_alone,
    first_examples,
    in_kernel,
    latencies,
    median_example,
    parameters_of,
    with_elmo,
)
from paper.task_data import read_task, read_vectors, with_phrases
from paper.task_training import Training, predictions_of, with_best_weights
from paper.tasks import Batches, Remembering, scores, texts_of, vocabulary_of
from slimlstm.files import write_json
from slimlstm.methods import METHODS, calibrated_methods
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
HELD_OUT, LONGEST_PARAGRAPH, CALIBRATION_SEED = 10, 400, 0

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
plugins = add_plugin_option(parser)
methods = sorted(METHODS, key=lambda name: name in calibrated_methods())
parser.add_argument("--task", choices=TASKS, required=True)
parser.add_argument("--output", type=Path, required=True, help="folder of results")
parser.add_argument("--runs", type=Path, default=Path("runs/tasks"), help="folder of checkpoints and weights")
parser.add_argument("--elmo", type=Path, help="folder with an ELMo's options.json and weights.hdf5; default: no ELMo")
parser.add_argument("--vectors", type=Path, help="word vectors as a text file, such as GloVe's; default: random ones")
parser.add_argument("--data", type=Path, help="folder with data of your own in the same format")
parser.add_argument("--config", choices=["published", "small"], default="small", help="sizes, batch and learning rate")
parser.add_argument("--seeds", nargs="+", type=int, default=[1])
parser.add_argument("--lr", type=float, help="learning rate; default: the config's")
parser.add_argument("--batch", type=int, help="sentences, pairs or questions of a step; default: the config's")
parser.add_argument("--elmo-dropout", type=float, default=0.5)
parser.add_argument("--epochs", type=int, default=20, help="at most")
parser.add_argument("--ranks", nargs="+", type=int, default=[], help="of the compressed ELMos; default: only train")
parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
parser.add_argument("--targets", nargs="+", choices=["hh", "ih", "both"], default=["hh", "ih"])
parser.add_argument("--calibration", type=int, default=256, help="training examples for methods that need calibration")
parser.add_argument("--limit", type=int, help="measure the cells on this many examples, the first ones")
parser.add_argument("--latency", action="store_true", help="time single sentences instead of measuring the cells")
parser.add_argument("--device", default="cpu")
parser.add_argument("--max-minutes", type=float, default=math.inf, help="then stop; the same command continues the run")
parser.add_argument("--checkpoint-seconds", type=float, default=120.0, help="time between two checkpoints")
parser.add_argument("--remember", type=float, default=3.0, help="gigabytes for the ELMo's outputs, computed once")
arguments = parser.parse_args()
pace = Pace(arguments.max_minutes, arguments.checkpoint_seconds)
device, console = torch.device(arguments.device), Console()
task, config = TASKS[arguments.task], TASKS[arguments.task][arguments.config]
arguments.lr, arguments.batch = arguments.lr or config["lr"], arguments.batch or config["batch"]
if arguments.ranks and not arguments.elmo:
    parser.error("--ranks apply to an ELMo; name one by --elmo")
if arguments.latency and not arguments.ranks:
    parser.error("--latency needs --ranks")
bilm = load_bilm(arguments.elmo).to(device) if arguments.elmo else None
if bilm and max(arguments.ranks, default=0) >= bilm.config.proj_size:
    parser.error(f"the ELMo's matrices have rank {bilm.config.proj_size} at most; ranks have to be lower")
kind, metric = "elmo" if bilm else "plain", "f1" if arguments.task == "squad" else "accuracy"
runs = arguments.runs / f"{arguments.task}-{arguments.config}-{arguments.elmo.name if bilm else kind}"


def sha256_of(folder):
    """Return the SHA-256 of an ELMo's weights and options."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*options.json"), *folder.glob("*weights*.hdf5")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_splits():
    """Return examples for training, validation and the final score, and what is known of their splits."""
    found = {name: read_task(arguments.task, name, arguments.data) for name in task["splits"] if name}
    train, validation, test = (found[name].examples if name else None for name in task["splits"])
    if validation is None:
        validation = train[::HELD_OUT]
        short = [len(example.tokens) <= LONGEST_PARAGRAPH for example in train]
        train = [example for index, example in enumerate(train) if index % HELD_OUT and short[index]]
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
settings = {name: str(getattr(arguments, name)) for name in ("task", "config", "lr", "batch", "elmo_dropout")} | {
    "vectors": arguments.vectors.name if arguments.vectors else "none",
    "elmo": sha256_of(arguments.elmo) if bilm else "none",
    "train": splits["train"]["sha256"],
}


def new_model(number, memory):
    """Return an untrained model, in which ``memory`` replaces the language model."""
    seed(number, "weights")
    model_type, config_type = task["model"]
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


def trained_model(number, memory):
    return with_best_weights(new_model(number, memory), runs / f"seed-{number}", device)


def check_file(path, theirs, ours):
    """Check the settings that the file has among others."""
    check_settings(path, {name: theirs.get(name, "None") for name in ours}, ours)


def common():
    """Return the entries that all files share."""
    label = splits["train"]["label"]
    if learnt is not train:
        label += f", with the phrases of over three tokens in them {len(learnt):,} examples"
    if task["splits"][1] is None:
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


# ---- training ----


def train_seed(number, memory, batches, validation, test):
    folder = runs / f"seed-{number}"
    training = Training(
        number,
        new_model(number, memory),
        folder,
        metric=metric,
        lr=arguments.lr,
        settings=settings,
        device=device,
    )
    training.run(batches, validation, arguments.epochs, pace, console)
    model = trained_model(number, memory)
    total = sum(parameter.numel() for parameter in model.parameters())
    of_elmo = sum(parameter.numel() for parameter in bilm.parameters()) if bilm else 0
    result = {
        "seed": number,
        "validation": training.best_entry(),
        "scores": scores(predictions_of([model], test)[0], test),
        "epochs": len(training.log),
        "parameters": {"model": total, "elmo": of_elmo},
        "seconds": round(training.place["seconds"], 1),
        "settings": settings,
    }
    write_json(folder / "result.json", result)


def spread(values):
    return {"mean": statistics.fmean(values), "standard_deviation": statistics.stdev(values) if len(values) > 1 else None}


left = [number for number in arguments.seeds if not (runs / f"seed-{number}" / "result.json").exists()]
memory = Remembering(in_kernel(bilm), arguments.remember) if bilm else None
if left:
    lock = lock_folder(runs)
    parts = [batches_of(part, arguments.batch) for part in (learnt, validation, test)]
    for number in left:
        train_seed(number, memory, *parts)
    del parts
    lock.release()
    # Outputs on the training data are not needed any more.
    memory = Remembering(memory.bilm) if bilm else None
results = [read_json(runs / f"seed-{number}" / "result.json") for number in arguments.seeds]
for number, result in zip(arguments.seeds, results, strict=True):
    check_file(runs / f"seed-{number}" / "result.json", result.pop("settings"), settings)
over_seeds = {name: spread([result["scores"][name] for result in results]) for name in results[0]["scores"]}
summary = {"metric": metric, "scores": over_seeds, "seeds": results, **common()}
write_json(arguments.output / f"trained-{kind}.json", summary)
console.print(f"{arguments.task}, {kind}, {summary['label']}:", over_seeds)
if not arguments.ranks:
    sys.exit()
models = {number: trained_model(number, memory) for number in arguments.seeds}


# ---- latencies ----


def latency():
    """Time one sentence, of median length, through the ELMo and through the whole model of the first seed."""
    batch = batches_of([median_example(test)], 1)[0]
    versions = {"dense": (bilm, None), "dense, kernel": (memory.bilm, None)}
    for target, rank in itertools.product(arguments.targets, arguments.ranks):
        versions[f"svd, {target}, {rank}"] = compressed_alone(bilm, "svd", target, rank)
    wholes = {name: with_elmo(models[arguments.seeds[0]], other) for name, (other, _) in versions.items()}
    found = {"tokens": [text[0].shape[1] for text in batch.inputs[:2]]}
    for part, inputs in (("elmo", batch.inputs[0][1:]), ("model", batch.inputs)):
        modules = {name: whole.embedder.elmo if part == "elmo" else whole for name, whole in wholes.items()}
        found[part] = {
            name: {**timed, "parameters": parameters_of(results[0]["parameters"], versions[name][1])[part]}
            for name, timed in latencies(modules, inputs, part).items()
        }
    return found


def latency_table(found):
    table = Table("", *(f"{part}: {what}" for part in ("elmo", "model") for what in ("ms", "faster", "parameters")))
    for name in found["elmo"]:
        cells = [found[part][name] for part in ("elmo", "model")]
        texts = [
            (f"{cell['milliseconds'][1]:.2f}", f"{cell['faster']:.2f}x", f"{cell['parameters']['after']:,}")
            for cell in cells
        ]
        table.add_row(name, *itertools.chain(*texts))
    return table


if arguments.latency:
    found = latency()
    write_json(arguments.output / "latency.json", {**found, **common()})
    console.print(latency_table(found))
    sys.exit()


# ---- the table: scores with compressed ELMos ----


def path_of(method, target, rank, number):
    cell = "dense" if method == "dense" else f"{method}-{target}-{rank:03d}"
    return arguments.output / f"{cell}-seed{number}.json"


def settings_of_cell(method):
    """Return the settings in which two files of the table have to agree."""
    calibration = arguments.calibration if method in calibrated_methods() else "none"
    return settings | {"limit": str(arguments.limit), "calibration": str(calibration)}


def read_cell(cell, number):
    path = path_of(*cell, number)
    result = read_json(path)
    check_file(path, result["config"], settings_of_cell(cell[0]))
    return result


def measure(method, target, rank, numbers):
    """Measure one cell for seeds whose task models get the same compressed ELMo, and write their files."""
    started, report = time.monotonic(), None
    if method == "dense":
        other = memory.bilm
    elif method in calibrated_methods():
        other, report = compress_inside(models[numbers[0]], numbers[0], method, target, rank)
    else:
        other, report = compressed_alone(bilm, method, target, rank)
    solved = time.monotonic()
    predicted = predictions_of([models[number] for number in numbers], test_batches, other)
    seconds = {
        "compress": round(solved - started, 2),
        "evaluate": round(time.monotonic() - solved, 2),
        "seeds": len(numbers),
    }
    for number, answers in zip(numbers, predicted, strict=True):
        parameters = results[arguments.seeds.index(number)]["parameters"]
        limit = f"first {len(answers):,} of {splits[task['splits'][2]]['label']}"
        result = {
            **{"method": method, "target": target, "rank": rank, "seed": number, "metric": metric},
            "scores": scores(answers, test_batches),
            "examples": len(answers),
            "limit": limit if arguments.limit else None,
            "parameters": parameters_of(parameters, report),
            "calibration_loss": {"before": report.loss_before, "after": report.loss_after} if report else None,
            "sites": [asdict(site) for site in report.sites] if report else [],
            "seconds": seconds,
            **common(),
        }
        result["config"] |= settings_of_cell(method)
        write_json(path_of(method, target, rank, number), result)


def score_table(cells):
    table = Table("method", "target", "rank", "ELMo's parameters", metric, "spread", "change")
    baseline = None
    for method, target, rank in cells:
        found = [read_cell((method, target, rank), number) for number in arguments.seeds]
        one = spread([result["scores"][metric] for result in found])
        baseline = baseline or one["mean"]
        deviation = "" if one["standard_deviation"] is None else f"{one['standard_deviation']:.2f}"
        parameters = f"{found[0]['parameters']['elmo']['after']:,}"
        numbers = f"{one['mean']:.2f}", deviation, f"{one['mean'] - baseline:+.2f}"
        table.add_row(method, target, str(rank or ""), parameters, *numbers)
    return table


test_batches = batches_of(first_examples(test, arguments.limit), arguments.batch)
drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(CALIBRATION_SEED)).tolist()
calibration_examples = first_examples([train[index] for index in drawn], arguments.calibration)
compress_inside = TaskCompressor(bilm, batches_of(calibration_examples, arguments.batch))
cells = [("dense", "none", 0), *itertools.product(arguments.methods, arguments.targets, arguments.ranks)]
for cell, number in itertools.product(cells, arguments.seeds):
    if path_of(*cell, number).exists():
        read_cell(cell, number)
for cell in track(cells, "compressed ELMos", console=console, transient=True):
    missing = [number for number in arguments.seeds if not path_of(*cell, number).exists()]
    # Calibration with a task model's loss gives every seed an ELMo of its own.
    for numbers in [[number] for number in missing] if cell[0] in calibrated_methods() else [missing] if missing else []:
        if pace.is_over():
            pace.stop()
        measure(*cell, numbers)
console.print(score_table(cells), summary["label"])
