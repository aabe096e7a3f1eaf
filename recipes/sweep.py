"""Compresses a trained AWD-LSTM by every method, target and rank, and measures its perplexity.

    python recipes/sweep.py --model checkpoints/awd_lstm_ptb --corpus ptb --output results/ptb_untuned
    python recipes/sweep.py --model checkpoints/awd_lstm_ptb --corpus ptb --output results/ptb_fine_tuned --ranks 10 400 \\
        --tune "--optimizer asgd --epochs 1 --dtype bfloat16"

Nothing is trained without ``--tune``; with it, checkpoints lie in a folder for every cell beside its file. Every run
writes one JSON file with its provenance into the output folder; runs whose file is there are skipped, so that a killed
sweep goes on where it stopped. Without training, the table of all files is printed at the end.
"""

import argparse
import hashlib
import itertools
import json
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from joblib import Parallel, delayed, parallel_config
from rich.console import Console
from rich.progress import track
from rich.table import Table

import slimlstm as sl
from slimlstm.data import CORPORA, Vocabulary, read_text, words_of
from slimlstm.evaluate import perplexity
from slimlstm.models.awd_lstm import load_awd_lstm
from slimlstm.provenance import provenance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, required=True, help="folder with model.safetensors and vocab.txt")
source = parser.add_mutually_exclusive_group(required=True)
source.add_argument("--corpus", choices=CORPORA)
source.add_argument("--text", type=Path, help="folder with train.txt, valid.txt and test.txt, in the place of a corpus")
parser.add_argument("--split", default="test")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--methods", nargs="+", default=["svd", "semi-nmf", "prune"])
parser.add_argument("--targets", nargs="+", default=["hh", "ih"])
parser.add_argument("--ranks", nargs="+", type=int, default=[10, 50, 100, 200, 400])
parser.add_argument("--streams", type=int, default=10, help="pieces of the text that are read side by side")
parser.add_argument("--tune", metavar="OPTIONS", help="fine-tune every cell: options for recipes/language_model.py")
parser.add_argument("--jobs", type=int, default=1, help="cells that run side by side on this machine")
parser.add_argument(
    "--scheduler", help="address of a Dask scheduler, whose workers see the same folders; else this machine"
)
arguments = parser.parse_args()
arguments.model, arguments.output = arguments.model.absolute(), arguments.output.absolute()
recipe = Path(__file__).absolute().with_name("language_model.py")
console = Console()
arguments.output.mkdir(parents=True, exist_ok=True)

if arguments.corpus:
    text = read_text(arguments.corpus, arguments.split)
else:
    text = (arguments.text / f"{arguments.split}.txt").read_text(encoding="utf-8")
settings = {
    "model": arguments.model.name,
    "corpus": arguments.corpus or arguments.text.name,
    "split": arguments.split,
    "sha256": hashlib.sha256(text.encode()).hexdigest(),
    "streams": arguments.streams,
}


def path_of(method, target, rank):
    return arguments.output / ("dense.json" if method == "dense" else f"{method}-{target}-{rank:03d}.json")


def measure(method, target, rank):
    """Runs one cell without training; returns its file's content."""
    began, model, report = time.monotonic(), load_awd_lstm(arguments.model), None
    tokens = Vocabulary.read(arguments.model / "vocab.txt").encode(words_of(text))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if method == "prune":
        report = sl.compress_(model, sl.Prune(rank=rank, target=target))
    elif method != "dense":
        report = sl.compress_(model, sl.LowRank(method, rank=rank, target=target))
    solved = time.monotonic()
    found = perplexity(model, tokens, streams=arguments.streams, steps=350)
    return {
        "method": method,
        "target": target,
        "rank": rank,
        "perplexity": found.perplexity,
        "loss": found.loss,
        "predictions": found.predictions,
        "parameters": report.model.parameters_after if report else parameters,
        "sites": [asdict(site) for site in report.sites] if report else [],
        "seconds": {"compress": round(solved - began, 2), "evaluate": round(time.monotonic() - solved, 2)},
        "config": settings,
        "provenance": provenance(),
    }


def tune(method, target, rank):
    """Fine-tunes one cell by recipes/language_model.py, which goes on where it was interrupted; its file's content."""
    run = path_of(method, target, rank).with_suffix("")
    command = [sys.executable, recipe, "--start", arguments.model, "--output", run]
    command += ["--corpus", arguments.corpus] if arguments.corpus else ["--text", arguments.text.absolute()]
    if method != "dense":
        command += ["--compress", method, "--target", target, "--rank", rank]
    subprocess.run([str(part) for part in (*command, *shlex.split(arguments.tune))], check=True)
    found = run / "result.json"
    # Out of its minutes, it is not there yet.
    return json.loads(found.read_text(encoding="utf-8")) if found.exists() else None


def work(cell):
    path = path_of(*cell)
    result = measure(*cell) if arguments.tune is None else tune(*cell)
    if result is not None:
        path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".part").replace(path)


runs = [("dense", "none", 0), *itertools.product(arguments.methods, arguments.targets, arguments.ranks)]
left = [cell for cell in runs if not path_of(*cell).exists()]
workers = -1 if arguments.scheduler else arguments.jobs
with ExitStack() as stack:
    if arguments.scheduler:
        from distributed import Client

        stack.enter_context(Client(arguments.scheduler))
        stack.enter_context(parallel_config("dask"))
    done = Parallel(n_jobs=workers, return_as="generator_unordered")(delayed(work)(cell) for cell in left)
    for _ in track(done, "sweep", total=len(left), console=console, transient=True):
        pass
if arguments.tune is not None:
    sys.exit()

results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.output.glob("*.json"))]
baseline = next(result["perplexity"] for result in results if result["method"] == "dense")
table = Table("method", "target", "rank", "parameters", "perplexity", "change")
for result in sorted(results, key=lambda entry: (entry["target"], entry["method"], entry["rank"])):
    table.add_row(
        result["method"],
        result["target"],
        str(result["rank"] or ""),
        f"{result['parameters']:,}",
        f"{result['perplexity']:.2f}",
        f"{result['perplexity'] / baseline - 1:+.1%}",
    )
console.print(table)
