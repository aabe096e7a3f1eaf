"""Compresses a trained AWD-LSTM by every method, target and rank, and measures its perplexity.

    python recipes/sweep.py --model checkpoints/awd_lstm_ptb --corpus ptb --output results/ptb_untuned
    python recipes/sweep.py --model checkpoints/awd_lstm_ptb --corpus ptb --output results/ptb_fine_tuned --ranks 10 400 \\
        --tune "--optimizer asgd --epochs 1 --dtype bfloat16"

Beyond the paper's methods, activation and fisher are calibrated on training text, once for all cells; int8 (this library's)
and pytorch-int8 (PyTorch's dynamic quantisation) take all matrices as they are, and so have neither target nor rank.
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
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from joblib import Parallel, delayed, parallel_config
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import slimlstm as sl
from slimlstm.calibration.moments import Calibration
from slimlstm.demo.awd_lstm import load_awd_lstm
from slimlstm.demo.corpora import CORPORA, Vocabulary, read_text, words_of
from slimlstm.evaluate import NextTokens, perplexity, pieces
from slimlstm.methods import calibrated_methods
from slimlstm.provenance import provenance

TUNABLE, QUANTIZED = ("svd", "semi-nmf", "prune"), ("int8", "pytorch-int8")
CALIBRATION_STREAMS, CALIBRATION_STEPS = 60, 70

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, required=True, help="folder with model.safetensors and vocab.txt")
source = parser.add_mutually_exclusive_group(required=True)
source.add_argument("--corpus", choices=CORPORA)
source.add_argument("--text", type=Path, help="folder with train.txt, valid.txt and test.txt, in the place of a corpus")
parser.add_argument("--split", default="test")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--methods", nargs="+", choices=[*TUNABLE, *calibrated_methods(), *QUANTIZED], default=list(TUNABLE))
parser.add_argument("--targets", nargs="+", default=["hh", "ih"])
parser.add_argument("--ranks", nargs="+", type=int, default=[10, 50, 100, 200, 400])
parser.add_argument("--streams", type=int, default=10, help="pieces of the text that are read side by side")
parser.add_argument("--calibrate", type=int, default=60_000, metavar="TOKENS", help="training text for activation, fisher")
parser.add_argument("--tune", metavar="OPTIONS", help="fine-tune every cell: options for recipes/language_model.py")
parser.add_argument("--jobs", type=int, default=1, help="cells that run side by side on this machine")
parser.add_argument(
    "--scheduler", help="address of a Dask scheduler, whose workers see the same folders; else this machine"
)
arguments = parser.parse_args()
if arguments.tune is not None and not set(arguments.methods) <= set(TUNABLE):
    parser.error(f"--tune takes the methods {', '.join(TUNABLE)}")
arguments.model, arguments.output = arguments.model.absolute(), arguments.output.absolute()
recipe = Path(__file__).absolute().with_name("language_model.py")
console = Console()
arguments.output.mkdir(parents=True, exist_ok=True)


def read(split):
    if arguments.corpus:
        return read_text(arguments.corpus, split)
    return (arguments.text / f"{split}.txt").read_text(encoding="utf-8")


def encoded(text):
    return Vocabulary.read(arguments.model / "vocab.txt").encode(words_of(text))


text = read(arguments.split)
calibration = arguments.output / "calibration.safetensors"  # large, and ignored by git
settings = {
    "model": arguments.model.name,
    "corpus": arguments.corpus or arguments.text.name,
    "split": arguments.split,
    "sha256": hashlib.sha256(text.encode()).hexdigest(),
    "streams": arguments.streams,
}


def path_of(method, target, rank):
    return arguments.output / (f"{method}-{target}-{rank:03d}.json" if rank else f"{method}.json")


def batches():
    return pieces(encoded(read("train"))[: arguments.calibrate], streams=CALIBRATION_STREAMS, steps=CALIBRATION_STEPS)


def compress(model, method, target, rank):
    """Carries out one cell; returns the report."""
    if method in calibrated_methods():
        data = {"calibration": Calibration.load(calibration), "batches": batches(), "loss": NextTokens()}
        return sl.compress_(model, sl.LowRank(method, rank=rank, target=target), **data)
    if method == "int8":
        return sl.compress_(model, sl.Quantize("int8"))
    rule = sl.Prune(rank=rank, target=target) if method == "prune" else sl.LowRank(method, rank=rank, target=target)
    return sl.compress_(model, rule)


def measure(method, target, rank):
    """Runs one cell without training; returns its file's content."""
    began, model = time.monotonic(), load_awd_lstm(arguments.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size, sites, config = 4 * parameters, [], settings
    if method == "pytorch-int8":
        size -= 3 * sum(site.shape[0] * site.shape[1] for site in sl.find_sites(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will move to another package
            model = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, torch.qint8)
    elif method != "dense":
        report = compress(model, method, target, rank)
        parameters, size = report.model.parameters_after, report.model.bytes_after
        sites = [asdict(site) for site in report.sites]
    if method in calibrated_methods():
        config = settings | {"calibration_tokens": arguments.calibrate}
    solved = time.monotonic()
    found = perplexity(model, encoded(text), streams=arguments.streams, steps=350)
    return {
        "method": method,
        "target": target,
        "rank": rank,
        "perplexity": found.perplexity,
        "loss": found.loss,
        "predictions": found.predictions,
        "parameters": parameters,
        "bytes": size,
        "sites": sites,
        "seconds": {"compress": round(solved - began, 2), "evaluate": round(time.monotonic() - solved, 2)},
        "config": config,
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


whole = [(method, "both", 0) for method in arguments.methods if method in QUANTIZED]
ranked = [method for method in arguments.methods if method not in QUANTIZED]
runs = [("dense", "none", 0), *whole, *itertools.product(ranked, arguments.targets, arguments.ranks)]
left = [cell for cell in runs if not path_of(*cell).exists()]
if not calibration.exists() and any(method in calibrated_methods() for method, *_ in left):
    tell = partial(console.print, "batches calibrated on:")
    sl.calibrate(load_awd_lstm(arguments.model), batches(), NextTokens(), progress=tell).save(calibration)
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
table = Table("method", "target", "rank", "parameters", "bytes", "perplexity", "change")
for result in sorted(results, key=lambda entry: (entry["target"], entry["method"], entry["rank"])):
    table.add_row(
        result["method"],
        result["target"],
        str(result["rank"] or ""),
        f"{result['parameters']:,}",
        f"{result.get('bytes', 4 * result['parameters']):,}",
        f"{result['perplexity']:.2f}",
        f"{result['perplexity'] / baseline - 1:+.1%}",
    )
console.print(table)
