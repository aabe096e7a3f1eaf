"""The tour: compress the embedded language model by every method, target and rank; measure quality, size and speed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimlstm.bench import interleaved_seconds, median_ratios
from slimlstm.calibration.collect import calibrate
from slimlstm.compress import compress_
from slimlstm.demo.awd_lstm import AWDLSTM
from slimlstm.demo.model import embedded_model, held_out_tokens
from slimlstm.demo.plots import quality_curves
from slimlstm.errors import SlimLSTMError
from slimlstm.evaluate import perplexity
from slimlstm.methods import sha256_of
from slimlstm.modules.hosts import find_sites
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.pipeline.config import LowRank, Prune, Target
from slimlstm.provenance import provenance
from slimlstm.tables import new_table

METHODS = ("svd", "semi-nmf", "fisher", "prune")
TARGETS: tuple[Target, ...] = ("hh", "ih", "both")
RANKS = (10, 25, 50, 100)
# Half of the held-out text, so that the whole tour takes about a minute.
_TOKENS = 12_000
_STREAMS = 20
_STEPS = 70
_LATENCY_STEPS = 35


@dataclass(frozen=True)
class Row:
    """One compressed model.

    Attributes:
        method, target: see :class:`slimlstm.LowRank`; ``"dense"`` and ``""`` for the dense model.
        rank: the rank of every matrix. The ranks of ``"fisher"`` differ; its row has the rank of the same size in bytes.
        parameters, bytes: the size of the LSTMs.
        perplexity: per byte-pair token of the held-out text.
        change: the rise in perplexity over the dense model, relative to it.
        latency_ratio: how many times faster than the dense model the LSTMs read 35 tokens, at batch 1 on one thread.
    """

    method: str
    target: str
    rank: int | None
    parameters: int
    bytes: int
    perplexity: float
    change: float
    latency_ratio: float


@dataclass(frozen=True)
class Tour:
    """All rows; the first is the dense model."""

    rows: list[Row]

    @property
    def dense(self) -> Row:
        """Return the row of the dense model."""
        return self.rows[0]

    def row(self, method: str, target: str, rank: int) -> Row:
        """Return the row of one method, target and rank."""
        return next(r for r in self.rows if (r.method, r.target, r.rank) == (method, target, rank))

    def summary(self) -> str:
        """Return the main findings in three sentences, made from the numbers."""
        rank = RANKS[-2]
        hh, ih = self.row("svd", "hh", rank), self.row("svd", "ih", rank)
        both, fisher = self.row("svd", "both", rank), self.row("fisher", "both", rank)
        pairs = [(self.row("svd", target, r), self.row("prune", target, r)) for target in ("hh", "ih") for r in RANKS]
        svd_wins = sum(svd.perplexity < prune.perplexity for svd, prune in pairs)
        return (
            f"At rank {rank}, SVD of every hh matrix changes perplexity by {hh.change:+.1%} and leaves "
            f"{hh.parameters / self.dense.parameters:.0%} of the LSTM's parameters, while the same rank at every ih matrix "
            f"changes it by {ih.change:+.1%} and leaves {ih.parameters / self.dense.parameters:.0%}. "
            f"With all matrices at rank {rank} SVD changes it by {both.change:+.1%}, Fisher-weighted factors of the same "
            f"size by {fisher.change:+.1%}. "
            f"With as many weights, SVD has a lower perplexity than magnitude pruning in {svd_wins} of {len(pairs)} cases, "
            "and only SVD makes the stored model smaller."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the tour as JSON types."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "summary": self.summary(),
            "data_sha256": sha256_of(held_out_tokens()[:_TOKENS]),
            "provenance": provenance(),
        }

    def __rich__(self) -> Table:
        table = new_table(["method", "target"], ["rank", "parameters", "bytes", "perplexity", "change", "speed"])
        for row in self.rows:
            table.add_row(
                row.method,
                row.target,
                "" if row.rank is None else str(row.rank),
                f"{row.parameters:,}",
                f"{row.bytes:,}",
                f"{row.perplexity:.2f}",
                f"{row.change:+.1%}",
                f"{row.latency_ratio:.2f}x",
                end_section=row.rank in (None, RANKS[-1]),
            )
        return table


def run(progress: Callable[[str, float], None] | None = None) -> Tour:
    """Compress the embedded model by every method, target and rank, and measure each on held-out text; takes a minute.

    Args:
        progress: called with the current method, target and rank, and the fraction done.

    Raises:
        SlimLSTMError: the output of a compressed model differs from the reference recurrence.
    """
    dense, tokens = embedded_model(), held_out_tokens()[:_TOKENS]
    if progress is not None:
        progress("calibrating", 0.0)
    calibration = calibrate(dense, _pieces(held_out_tokens()[_TOKENS:]), _losses)
    sample = tokens[:_LATENCY_STEPS, None]
    combinations = list(itertools.product(METHODS, TARGETS, RANKS))
    dense_loss = perplexity(dense, tokens, streams=_STREAMS)
    size = sum(parameter.numel() for parameter in dense.lstms.parameters())
    rows = [Row("dense", "", None, size, 4 * size, dense_loss.perplexity, 0.0, 1.0)]
    for index, (method, target, rank) in enumerate(combinations):
        if progress is not None:
            progress(f"{method} {target} rank {rank}", index / len(combinations))
        model = copy.deepcopy(dense)
        needed = calibration if method == "fisher" else None  # the others would spend time on a prediction of the loss
        report = compress_(model, _config(dense, method, target, rank), calibration=needed)
        found = perplexity(model, tokens, streams=_STREAMS).perplexity
        rows.append(
            Row(
                method,
                target,
                rank,
                report.lstm.parameters_after,
                report.lstm.bytes_after,
                found,
                found / dense_loss.perplexity - 1.0,
                _latency_ratio(dense, model, sample),
            )
        )
    if progress is not None:
        progress("done", 1.0)
    return Tour(rows)


def draw(tour: Tour, path: Path) -> None:
    """Draw perplexity against the size of the LSTMs, a panel per target and a line per method, and write a PNG or PDF.

    Raises:
        SlimLSTMError: matplotlib is not installed.
    """
    panels = {
        f"{target} compressed": {
            method: [
                (100 * row.parameters / tour.dense.parameters, row.perplexity)
                for row in (tour.row(method, target, rank) for rank in RANKS)
            ]
            for method in METHODS
        }
        for target in TARGETS
    }
    quality_curves(panels, tour.dense.perplexity, path, x_label="LSTM parameters left (%)", y_label="perplexity")


def _config(dense: AWDLSTM, method: str, target: Target, rank: int) -> LowRank | Prune:
    if method == "prune":
        return Prune(rank=rank, target=target)
    if method == "fisher":
        sites = [site for site in find_sites(dense) if target in (site.target, "both")]
        return LowRank(method, bytes=4 * rank * sum(sum(site.shape) for site in sites), target=target)
    return LowRank(method, rank=rank, target=target)


def _pieces(tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut a text into batches of inputs and targets, each [T, B]."""
    length = len(tokens) // _STREAMS
    text = tokens[: length * _STREAMS].view(_STREAMS, length).t()
    starts = range(0, length - _STEPS, _STEPS)
    return [(text[start : start + _STEPS], text[start + 1 : start + 1 + _STEPS]) for start in starts]


def _losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0])[0].flatten(0, 1), batch[1].flatten(), reduction="none")


def _latency_ratio(dense: AWDLSTM, compressed: AWDLSTM, sample: Tensor) -> float:
    _check_outputs(compressed, sample)
    calls = {"dense": lambda: dense.features(sample), "compressed": lambda: compressed.features(sample)}
    return median_ratios(interleaved_seconds(calls, threads=1), "dense")["compressed"]


def _check_outputs(model: AWDLSTM, sample: Tensor) -> None:
    """Check the outputs against the reference recurrence, so that no wrong result is timed."""
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, LowRankLSTM):
            module.backend = "reference"
    with torch.no_grad():
        expected, found = reference.features(sample)[0], model.features(sample)[0]
    error = float((expected - found).norm() / expected.norm())
    if not error < 1e-4:
        raise SlimLSTMError(
            f"the compressed model's output differs from the reference recurrence by {error:.1e}; please report it"
        )
