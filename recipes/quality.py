"""Measure the cost of compression by every method at the same size, without training, on a language model.

    python recipes/quality.py --model ptb --corpus ptb --output results/quality_ptb
    python recipes/quality.py --model embedded --corpus wikitext-2 --evaluate 60000 --output results/quality_embedded

Calibrated methods see ``--tokens`` of the training text only. Every run compresses all recurrent matrices to ``--keep``
of their bytes and writes one JSON file with its provenance; runs whose file exists are skipped. Methods ending in -global
choose all ranks together; those ending in -int8 have the same bytes as the others, and so four times as many weights.
Those ending in -auto choose rank and bits together, from ``sensitivity.json`` in the output folder, which is measured
where it is missing; dense-int4 keeps the matrices whole, in 4 bits.
"""

import argparse
import copy
import itertools
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import slimlstm as sl
from paper.cells import CALIBRATION_TOKENS, calibration_batches
from paper.methods import add_plugin_option, configuration_called, is_calibrated
from paper.runs import read_json
from paper.stored_models import load_language_model, model_folder
from slimlstm.calibration.moments import Calibration
from slimlstm.demo.corpora import CORPORA, Vocabulary, read_text, read_words
from slimlstm.demo.model import embedded_model, encode
from slimlstm.evaluate import NextTokens, perplexity
from slimlstm.files import write_json
from slimlstm.provenance import provenance

VARIANTS = ["svd", "svd-global", "activation", "fisher", "prune", "svd-int8", "fisher-int8"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add_plugin_option(parser)
parser.add_argument("--model", required=True, help="folder of an AWD-LSTM, name of a stored one, or 'embedded'")
parser.add_argument("--corpus", choices=CORPORA, required=True)
parser.add_argument("--split", default="test", help="the text to evaluate on")
parser.add_argument("--output", type=Path, required=True, help="folder")
parser.add_argument(
    "--methods", nargs="+", default=VARIANTS, help="methods, or variants ending in -global, a storage or -auto"
)
parser.add_argument("--keep", nargs="+", type=float, default=[0.25, 0.15, 0.08], help="fractions of the bytes")
parser.add_argument("--tokens", type=int, default=CALIBRATION_TOKENS, help="training text to calibrate on")
parser.add_argument("--evaluate", type=int, help="evaluate on this many tokens of the split; default: all")
parser.add_argument("--streams", type=int, default=10, help="parts of the text that are evaluated side by side")
parser.add_argument("--refit", type=int, help="how often to fit factors again; default: as compress_ does")
arguments = parser.parse_args()
console = Console()
arguments.output.mkdir(parents=True, exist_ok=True)

if arguments.model == "embedded":
    dense, read = embedded_model(), lambda split: encode(read_text(arguments.corpus, split))
else:
    folder = model_folder(arguments.model)
    dense, vocabulary = load_language_model(folder), Vocabulary.read(folder / "vocab.txt")
    read = lambda split: vocabulary.encode(read_words(arguments.corpus, split))  # noqa: E731
tokens = read(arguments.split)[: arguments.evaluate]
size = 4 * sum(site.shape[0] * site.shape[1] for site in sl.find_sites(dense))


batches = calibration_batches(read("train")[: arguments.tokens])
loss = NextTokens()
stored = arguments.output / "calibration.safetensors"  # large, and ignored by git
seconds = 0.0
if not stored.exists():
    began = time.monotonic()
    sl.calibrate(dense, batches, loss, progress=lambda label, _: console.print(f"calibrated on {label}")).save(stored)
    seconds = time.monotonic() - began
calibration = Calibration.load(stored)
measured = arguments.output / "sensitivity.json"
if any(method.endswith("-auto") for method in arguments.methods) and not measured.exists():
    sl.measure_sensitivity(dense, batches, loss, calibration=calibration).save(measured)
common = {
    "config": {
        "model": Path(arguments.model).name,
        "corpus": arguments.corpus,
        "split": arguments.split,
        "sha256": CORPORA[arguments.corpus].splits[arguments.split].sha256,
        "evaluated_tokens": len(tokens),
        "calibration_tokens": arguments.tokens,
        "threads": torch.get_num_threads(),
        "refit": arguments.refit,
    },
    "provenance": provenance(),
}
if not (arguments.output / "dense.json").exists():
    found = perplexity(dense, tokens, streams=arguments.streams, steps=350)
    write_json(
        arguments.output / "dense.json",
        {"method": "dense", **asdict(found), "calibration_seconds": round(seconds, 1), **common},
    )
reference = read_json(arguments.output / "dense.json")
unlike = {
    key for key, value in common["config"].items() if key not in ("threads", "refit") and reference["config"][key] != value
}
if unlike:
    sys.exit(
        f"{arguments.output / 'dense.json'} was made with other {', '.join(unlike)}; repeat that, or name another folder"
    )
baseline = reference["loss"]
for keep, method in itertools.product(arguments.keep, arguments.methods):
    name = f"{method}-{round(100 * keep):02d}"
    if (arguments.output / f"{name}.json").exists():
        continue
    began, model = time.monotonic(), copy.deepcopy(dense)
    data = {"batches": batches, "loss": loss} if is_calibrated(method) else {}
    if method.endswith("-auto"):
        data["sensitivity"] = sl.Sensitivity.load(measured)
    config = configuration_called(method, keep, size)
    report = sl.compress_(model, config, calibration=calibration, refit=arguments.refit, **data)
    solved = time.monotonic()
    found = perplexity(model, tokens, streams=arguments.streams, steps=350)
    lstm_before, lstm_after = sum(s.bytes_before for s in report.sites), sum(s.bytes_after for s in report.sites)
    result = {
        "method": method,
        "keep": keep,
        "matrix_bytes": [lstm_before, lstm_after],
        "matrix_parameters": sum(site.parameters_after for site in report.sites),
        **asdict(found),
        "perplexity": found.perplexity,
        "rise": found.loss - baseline,
        "predicted_rise": report.predicted_rise,
        "plan": report.plan.to_dict(),
        "notes": report.notes,
        "seconds": {"compress": round(solved - began, 1), "evaluate": round(time.monotonic() - solved, 1)},
        **common,
    }
    write_json(arguments.output / f"{name}.json", result)
    console.print(f"{name}: rise {result['rise']:+.4f}, predicted {result['predicted_rise']:+.4f}")

table = Table("keep", "method", "bytes", "perplexity", "rise of the loss", "against svd")
results = [read_json(path) for path in sorted(arguments.output.glob("*-*.json"))]
plain = {result["keep"]: result["rise"] for result in results if result["method"] == "svd"}
for result in sorted(results, key=lambda entry: (-entry["keep"], entry["rise"])):
    ratio = f"{result['rise'] / plain[result['keep']]:.2f}" if result["keep"] in plain else ""
    numbers = f"{result['matrix_bytes'][1]:,}", f"{result['perplexity']:.2f}", f"{result['rise']:+.4f}", ratio
    table.add_row(f"{result['keep']:.0%}", result["method"], *numbers)
console.print(table)
