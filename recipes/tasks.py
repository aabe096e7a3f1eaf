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
import itertools
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from paper.elmo_files import load_bilm
from paper.methods import add_plugin_option
from paper.runs import Pace
from paper.task_runs import TASKS, TaskOptions, TaskRun
from paper.task_table import ScoreTable, cells_of, latency
from slimlstm.files import write_json
from slimlstm.methods import METHODS, calibrated_methods

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add_plugin_option(parser)
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
config = TASKS[arguments.task].configs[arguments.config]
if arguments.ranks and not arguments.elmo:
    parser.error("--ranks apply to an ELMo; name one by --elmo")
if arguments.latency and not arguments.ranks:
    parser.error("--latency needs --ranks")
bilm = load_bilm(arguments.elmo).to(device) if arguments.elmo else None
if bilm and max(arguments.ranks, default=0) >= bilm.config.proj_size:
    parser.error(f"the ELMo's matrices have rank {bilm.config.proj_size} at most; ranks have to be lower")


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


def score_table(scores, cells):
    table = Table("method", "target", "rank", "ELMo's parameters", run.task.metric, "spread", "change")
    rows = {cell: scores.row(cell) for cell in cells}
    baseline = rows[cells[0]]["mean"]
    for cell, row in rows.items():
        deviation = "" if row["standard_deviation"] is None else f"{row['standard_deviation']:.2f}"
        numbers = f"{row['parameters']:,}", f"{row['mean']:.2f}", deviation, f"{row['mean'] - baseline:+.2f}"
        table.add_row(cell.method, cell.target, str(cell.rank or ""), *numbers)
    return table


options = TaskOptions(
    task=arguments.task,
    config=arguments.config,
    lr=arguments.lr or config.lr,
    batch=arguments.batch or config.batch,
    elmo_dropout=arguments.elmo_dropout,
    elmo=arguments.elmo,
    vectors=arguments.vectors,
    data=arguments.data,
)
run = TaskRun(options, bilm, arguments.runs, device)
run.train(arguments.seeds, arguments.epochs, arguments.remember, pace, console)
results, kind = run.results(arguments.seeds), "elmo" if bilm else "plain"
summary = run.summary(results)
write_json(arguments.output / f"trained-{kind}.json", summary)
console.print(f"{arguments.task}, {kind}, {summary['label']}:", summary["scores"])
if not arguments.ranks:
    sys.exit()
if arguments.latency:
    first = run.trained(arguments.seeds[0])
    found = latency(run, first, results[0]["parameters"], arguments.targets, arguments.ranks)
    write_json(arguments.output / "latency.json", {**found, **run.common()})
    console.print(latency_table(found))
    sys.exit()
scores = ScoreTable(run, results, arguments.output, arguments.limit, arguments.calibration)
cells = cells_of(arguments.methods, arguments.targets, arguments.ranks)
scores.fill(cells, pace, console)
console.print(score_table(scores, cells), summary["label"])
