"""Compress a trained AWD-LSTM by every method, target and rank, and measure its perplexity.

    python recipes/sweep.py --model ptb --corpus ptb --output results/ptb_untuned
    python recipes/sweep.py --model ptb --corpus ptb --output results/ptb_fine_tuned --ranks 10 400 \\
        --tune "--optimizer adamw --lr 2e-3 --epochs 3 --dtype bfloat16"

Methods that need calibration get it on training text, once for all cells. fisher-auto chooses rank and bits of every
matrix together, in the bytes of float32 factors of the cell's rank. int8 (this library's) and pytorch-int8 (PyTorch's
dynamic quantisation) round all matrices, so that they have neither target nor rank. ``--plugin`` imports a
module or a file that registers further methods. Cells are trained only with ``--tune``; checkpoints are then in a folder
for every cell beside its file. Every cell writes one JSON file with its provenance into the output folder. Cells whose file
exists are skipped, so the same command continues a killed sweep. Without training, a table of all files is printed at the
end.
"""

import argparse
import hashlib
import itertools
import shlex
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from joblib import Parallel, delayed, parallel_config
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import slimlstm as sl
from paper.cells import CALIBRATION_TOKENS, calibration_batches, compress_cell_
from paper.methods import PAPER, TOGETHER, add_plugin_option, import_plugins, is_calibrated
from paper.runs import read_json
from paper.stored_models import load_language_model, model_folder
from paper.texts import add_text_options, text_of
from slimlstm.calibration.moments import Calibration
from slimlstm.demo.corpora import Vocabulary, words_of
from slimlstm.evaluate import NextTokens, perplexity
from slimlstm.files import write_json
from slimlstm.methods import METHODS
from slimlstm.provenance import provenance

QUANTIZED = ("int8", "pytorch-int8")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
plugins = add_plugin_option(parser)
parser.add_argument("--model", type=model_folder, required=True, help="folder of an AWD-LSTM, or name of a stored one")
add_text_options(parser)
parser.add_argument("--split", default="test")
parser.add_argument("--output", type=Path, required=True, help="folder")
parser.add_argument("--methods", nargs="+", choices=[*METHODS, TOGETHER, *QUANTIZED], default=list(PAPER))
parser.add_argument("--targets", nargs="+", default=["hh", "ih"])
parser.add_argument("--ranks", nargs="+", type=int, default=[10, 50, 100, 200, 400])
parser.add_argument("--streams", type=int, default=10, help="pieces of the text that are evaluated side by side")
parser.add_argument(
    "--calibrate", type=int, default=CALIBRATION_TOKENS, metavar="TOKENS", help="training text to calibrate on"
)
parser.add_argument("--tune", metavar="OPTIONS", help="fine-tune every cell: options for recipes/language_model.py")
parser.add_argument("--jobs", type=int, default=1, help="cells that run at once on this machine")
parser.add_argument(
    "--scheduler", help="address of a Dask scheduler whose workers see the same folders; default: this machine"
)
arguments = parser.parse_args()
if arguments.tune is not None and set(arguments.methods) & set(QUANTIZED):
    parser.error(f"--tune does not take {' and '.join(QUANTIZED)}, whose weights are not trained")
arguments.model, arguments.output = arguments.model.absolute(), arguments.output.absolute()
recipe = Path(__file__).absolute().with_name("language_model.py")
console = Console()
arguments.output.mkdir(parents=True, exist_ok=True)


def encoded(text):
    return Vocabulary.read(arguments.model / "vocab.txt").encode(words_of(text))


text = text_of(arguments, arguments.split)
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


def calibration_tokens():
    return encoded(text_of(arguments, "train"))[: arguments.calibrate]


def quiet(*_):
    """Draw no bar: workers run side by side on one terminal."""


def compress(model, method, target, rank):
    """Compress the model of one cell, and return the report."""
    if method == "int8":
        return sl.compress_(model, sl.Quantize("int8"), progress=quiet)
    data = {}
    if is_calibrated(method):
        data = {"calibration": Calibration.load(calibration), "tokens": calibration_tokens()}
    return compress_cell_(model, method, target, rank, **data, progress=quiet)


def measure(method, target, rank):
    """Return the content of a cell's file, without training."""
    began, model = time.monotonic(), load_language_model(arguments.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size, sites, config = 4 * parameters, [], settings
    if method == "pytorch-int8":
        size -= 3 * sum(site.shape[0] * site.shape[1] for site in sl.find_sites(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the function will move to another package
            model = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, torch.qint8)
    elif method != "dense":
        report = compress(model, method, target, rank)
        parameters, size = report.model.parameters_after, report.model.bytes_after
        sites = [asdict(site) for site in report.sites]
    if is_calibrated(method):
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
    """Fine-tune one cell by recipes/language_model.py, which can be interrupted; return the content of its file, if any."""
    run = path_of(method, target, rank).with_suffix("")
    command = [sys.executable, recipe, "--start", arguments.model, "--output", run]
    command += ["--corpus", arguments.corpus] if arguments.corpus else ["--text", arguments.text.absolute()]
    if method != "dense":
        command += ["--compress", method, "--target", target, "--rank", rank]
    if is_calibrated(method):
        command += ["--calibration", calibration, "--calibrate", arguments.calibrate]
    command += [part for plugin in plugins for part in ("--plugin", plugin)]
    subprocess.run([str(part) for part in (*command, *shlex.split(arguments.tune))], check=True)
    found = run / "result.json"
    # It is missing if the run stopped at --max-minutes.
    return read_json(found) if found.exists() else None


def work(cell):
    # Worker processes have tables of their own.
    import_plugins(plugins)
    result = measure(*cell) if arguments.tune is None else tune(*cell)
    if result is not None:
        write_json(path_of(*cell), result)


whole = [(method, "both", 0) for method in arguments.methods if method in QUANTIZED]
ranked = [method for method in arguments.methods if method not in QUANTIZED]
runs = [("dense", "none", 0), *whole, *itertools.product(ranked, arguments.targets, arguments.ranks)]
left = [cell for cell in runs if not path_of(*cell).exists()]
if not calibration.exists() and any(is_calibrated(method) for method, *_ in left):
    sl.calibrate(
        load_language_model(arguments.model),
        calibration_batches(calibration_tokens()),
        NextTokens(),
        progress=lambda label, _: console.print(f"calibrated on {label}"),
    ).save(calibration)
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

results = [read_json(path) for path in sorted(arguments.output.glob("*.json"))]
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
