"""Compresses a trained AWD-LSTM by every method, target and rank, without training, and measures its perplexity.

    python recipes/sweep.py --model checkpoints/awd_lstm_ptb --corpus ptb --output results/ptb_untuned

Every run writes one JSON file with its provenance into the output folder; runs whose file is there are skipped, so that an
interrupted sweep goes on where it stopped. The table of all files is printed at the end.
"""

import argparse
import copy
import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import slimlstm as sl
from slimlstm.data import CORPORA, Vocabulary, read_words
from slimlstm.evaluate import perplexity
from slimlstm.models.awd_lstm import load_awd_lstm
from slimlstm.provenance import provenance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, required=True, help="folder with model.safetensors and vocab.txt")
parser.add_argument("--corpus", choices=CORPORA, required=True)
parser.add_argument("--split", default="test")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--methods", nargs="+", default=["svd", "semi-nmf", "prune"])
parser.add_argument("--targets", nargs="+", default=["hh", "ih"])
parser.add_argument("--ranks", nargs="+", type=int, default=[10, 50, 100, 200, 400])
parser.add_argument("--streams", type=int, default=10, help="pieces of the text that are read side by side")
arguments = parser.parse_args()
console = Console()
arguments.output.mkdir(parents=True, exist_ok=True)

dense = load_awd_lstm(arguments.model)
tokens = Vocabulary.read(arguments.model / "vocab.txt").encode(read_words(arguments.corpus, arguments.split))

runs = [("dense", "none", 0), *itertools.product(arguments.methods, arguments.targets, arguments.ranks)]
with Progress(console=console, transient=True) as progress:
    task = progress.add_task("sweep", total=len(runs))
    for method, target, rank in runs:
        progress.update(task, description=f"{method} {target} {rank}", advance=0)
        path = arguments.output / ("dense.json" if method == "dense" else f"{method}-{target}-{rank:03d}.json")
        if not path.exists():
            began, model, report = time.monotonic(), copy.deepcopy(dense), None
            if method == "prune":
                report = sl.compress_(model, sl.Prune(rank=rank, target=target))
            elif method != "dense":
                report = sl.compress_(model, sl.LowRank(method, rank=rank, target=target))
            solved = time.monotonic()
            found = perplexity(model, tokens, streams=arguments.streams, steps=350)
            parameters = sum(parameter.numel() for parameter in dense.parameters())
            result = {
                "method": method,
                "target": target,
                "rank": rank,
                "perplexity": found.perplexity,
                "loss": found.loss,
                "predictions": found.predictions,
                "parameters": report.model.parameters_after if report else parameters,
                "sites": [asdict(site) for site in report.sites] if report else [],
                "seconds": {"compress": round(solved - began, 2), "evaluate": round(time.monotonic() - solved, 2)},
                "config": {
                    "model": arguments.model.name,
                    "corpus": arguments.corpus,
                    "split": arguments.split,
                    "sha256": CORPORA[arguments.corpus].splits[arguments.split].sha256,
                    "streams": arguments.streams,
                },
                "provenance": provenance(),
            }
            path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".part").replace(path)
        progress.advance(task)

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
