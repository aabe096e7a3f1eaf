"""Controls of the compressed Penn Treebank model, and its speed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from paper.page.results import Result, epochs_of, marked, perplexity_on_test
from paper.page.sources import Sources
from paper.page.tables import Row, counted, formatted, markdown, millions

CONTROLS = (
    ("dense", "untuned/dense", "AWD-LSTM"),
    ("hh as SVD factors of rank 10", "untuned/svd-hh-010", ""),
    ("hh as SVD factors of rank 10, fine-tuned", "fine_tuned/svd-hh-010", ""),
    ("int8, this library", "untuned/int8", ""),
    ("int8, PyTorch's dynamic quantisation", "untuned/pytorch-int8", ""),
    ("a smaller dense AWD-LSTM", "controls/ptb-13m", ""),
    ("TT-LSTM", "controls/ptb-tensor-train", "TT-LSTM"),
)
"""Name, file, and key among the printed baselines."""
HEADER = ("model", "trained", "parameters", "MB", "perplexity", "printed parameters", "printed")


@dataclass(frozen=True)
class Controls:
    """The section on controls, and the names of those that have not been run."""

    section: str
    missing: list[str]


def read_controls(sources: Sources) -> Controls:
    """Return the table of controls."""
    found = {path: sources.results.load(f"ptb_{path}") for _, path, _ in CONTROLS}
    trained = found | {"untuned/dense": sources.results.load("ptb_trained")}
    rows = [_row_of(name, key, found[path], trained[path], sources) for name, path, key in CONTROLS]
    missing = [name for name, path, _ in CONTROLS if found[path] is None]
    table = markdown(HEADER, rows, left=2)
    perplexities = {path: perplexity_on_test(result) for path, result in found.items() if result}
    if perplexities.get("controls/ptb-13m", math.inf) < perplexities.get("untuned/dense", 0.0):
        table += (
            "\n\nThe smaller model is ahead of the dense one because of its training, not its size: it was trained by "
            "`recipes/language_model.py`, the dense one was not, and no model of full size has been trained by that recipe "
            "for as long. The cost of compression is the change within one model."
        )
    section = f"""## Controls, Penn Treebank

{table}

Both int8 models round all of ih and hh. The smaller dense AWD-LSTM has as many parameters as the model with factors of
rank 10 at hh, and is trained from random weights, as the TT-LSTM is. The paper does not say which matrices its TT-LSTM
stores as tensor trains, nor their ranks; ours has three cores for each ih and hh, and in all as many parameters as
theirs."""
    return Controls(section, missing)


def _row_of(name: str, key: str, found: Result | None, trained: Result | None, sources: Sources) -> Row:
    paper = sources.printed["penn_treebank"]["baseline"].get(key, {})
    printed = f"{paper['params_millions']}M" if paper else None
    if found is None:
        return (name, None, None, None, None, printed, paper.get("ppl"))
    size, how = found.get("bytes", 4 * found["parameters"]) / 1e6, None
    if trained and "epochs" in trained:
        how = f"{counted(epochs_of(trained), 'epoch')}, {trained['config']['optimizer']} {trained['config']['lr']:g}"
    perplexity = marked(f"{perplexity_on_test(found):.2f}", found)
    return (name, how, millions(found["parameters"]), f"{size:.1f}", perplexity, printed, paper.get("ppl"))


def speed_section(result: Result, sources: Sources) -> str:
    """Return the table of how much faster hh as SVD factors makes the model."""
    paper = sources.printed["penn_treebank"]["speedup"]
    rows: list[Row] = []
    for row in result["rows"]:
        for name, ratios in row["faster"].items():
            rank = int(name.split()[1])
            scope = "LSTM layers" if row["scope"] == "layers" else "whole model"
            ours = (marked(f"{ratios[engine]:.2f}x", result) for engine in ("fused", "plain PyTorch"))
            printed = formatted(paper.get(f"svd hh {rank}"), "{:.2f}x")
            rows.append((scope, row["steps"], row["batch"], rank, *ours, printed))
    return f"""## Speed

How many times faster hh as SVD factors makes the model than the better of PyTorch's two engines for a dense `nn.LSTM`,
oneDNN and its own, on one thread; T time steps, B sequences. Neither hardware nor batch of the printed speed is known; the
paper also reports about 1.5x at little loss.

{markdown(("timed", "T", "B", "rank", "fused kernel", "plain PyTorch", "printed"), rows)}"""
