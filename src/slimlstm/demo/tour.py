"""The tour: compress the embedded language model by every method, target and rank; measure quality, size and speed."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimlstm.bench import interleaved_seconds, median_ratios
from slimlstm.bench.candidates import TOLERANCE
from slimlstm.calibration.collect import calibrate
from slimlstm.compress import compress_, measure_sensitivity
from slimlstm.demo.awd_lstm import AWDLSTM
from slimlstm.demo.model import embedded_model, held_out_tokens
from slimlstm.demo.plots import loss_against_bytes
from slimlstm.errors import SlimLSTMError
from slimlstm.evaluate import perplexity
from slimlstm.methods import sha256_of
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.pipeline.config import AUTO, LowRank, Prune, Quantize, Target
from slimlstm.pipeline.plan import Config
from slimlstm.pipeline.report import Report
from slimlstm.pipeline.sensitivity import Sensitivity
from slimlstm.provenance import provenance
from slimlstm.tables import new_table

METHODS = ("svd", "semi-nmf", "fisher", "prune")
TARGETS: tuple[Target, ...] = ("hh", "ih", "both")
RANKS = (10, 25, 50, 100)
STORED = ("svd", "fisher")
"""The methods that are also measured with all matrices as factors in int8."""
CHOSEN = "fisher"
"""The method that is also measured with rank and storage chosen together, at the bytes of SVD's factors in int8."""
_DRAWN = ("svd", "fisher", "svd int8", "fisher int8", "int8", "fisher auto")
# Half of the held-out text, so that the whole tour takes a minute or two.
_TOKENS = 12_000
_STREAMS = 20
_STEPS = 70
_LATENCY_STEPS = 35
_LATENCY_SECONDS = 0.1


@dataclass(frozen=True)
class Row:
    """One compressed model.

    Attributes:
        method, target: see :class:`slimlstm.LowRank`; ``"dense"`` and ``""`` for the dense model.
        storage: ``"float32"`` or ``"int8"``, or ``"auto"`` where every matrix has a storage of its own.
        rank: the rank of every matrix. With ``"fisher"`` ranks differ between matrices; this is then the rank at which SVD
            takes as many bytes.
        parameters, bytes: the size of the LSTMs.
        perplexity: per byte-pair token of the held-out text.
        change: the rise in perplexity over the dense model, relative to it.
        latency_ratio: how many times faster than the dense model the LSTMs read 35 tokens, at batch 1 on one thread.
    """

    method: str
    target: str
    storage: str
    rank: int | None
    parameters: int
    bytes: int
    perplexity: float
    change: float
    latency_ratio: float
    latency = None
    accepted = True

    @property
    def label(self) -> str:
        """The method, target and rank in words."""
        return self.name if self.rank is None else f"{self.name} of {self.target}, rank {self.rank}"

    @property
    def metric(self) -> float:
        """The perplexity."""
        return self.perplexity

    @property
    def name(self) -> str:
        """The method and, unless it is float32, the storage."""
        words = (self.method, self.storage)
        return " ".join(word for word in words if word not in ("float32", "dense")) or "dense"


@dataclass(frozen=True)
class Tour:
    """All rows; the first is the dense model.

    Attributes:
        rows: the models.
        report: the report for Fisher-weighted factors of every matrix, at the second highest of the ranks.
    """

    rows: list[Row]
    report: Report
    limit = ""
    worst = None
    metric_name = "perplexity"
    higher_is_better = False

    @property
    def dense(self) -> Row:
        """The row of the dense model."""
        return self.rows[0]

    @property
    def best(self) -> Row:
        """The row of the model that ``report`` describes."""
        return self.row("fisher", "both", RANKS[-2])

    @property
    def trials(self) -> list[Row]:
        """The rows of compressed models."""
        return self.rows[1:]

    def row(self, method: str, target: str, rank: int) -> Row:
        """Return the float32 row of one method, target and rank."""
        wanted = (method, target, rank, "float32")
        return next(r for r in self.rows if (r.method, r.target, r.rank, r.storage) == wanted)

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
                row.name,
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
    calibration_batches = _pieces(held_out_tokens()[_TOKENS:])
    calibration = calibrate(dense, calibration_batches, _losses)
    sensitivity = measure_sensitivity(dense, calibration_batches, _losses, method=CHOSEN, calibration=calibration)
    sample = tokens[:_LATENCY_STEPS, None]
    combinations = _combinations()
    dense_loss = perplexity(dense, tokens, streams=_STREAMS)
    size = sum(parameter.numel() for parameter in dense.lstms.parameters())
    rows = [Row("dense", "", "float32", None, size, 4 * size, dense_loss.perplexity, 0.0, 1.0)]
    budgets: dict[tuple[Any, ...], int] = {}
    shown: Report | None = None
    for index, (method, target, rank, storage) in enumerate(combinations):
        if progress is not None:
            progress(f"{method} {target} {storage} rank {rank or 'full'}", index / len(combinations))
        model = copy.deepcopy(dense)
        needed = calibration if method == "fisher" else None  # the others would spend time on a prediction of the loss
        config = _config(method, target, rank, storage, budgets, sensitivity)
        report = compress_(model, config, calibration=needed)
        if method == "svd":
            budgets[target, rank, storage] = sum(site.bytes_after for site in report.sites)
        found = perplexity(model, tokens, streams=_STREAMS).perplexity
        if (method, target, rank, storage) == ("fisher", "both", RANKS[-2], "float32"):
            shown = report
        rows.append(
            Row(
                *(method, target, storage, rank),
                report.lstm.parameters_after,
                report.lstm.bytes_after,
                found,
                found / dense_loss.perplexity - 1.0,
                _latency_ratio(dense, model, sample, 1e-4 if storage == "float32" else TOLERANCE["int8"]),
            )
        )
    if progress is not None:
        progress("done", 1.0)
    assert shown is not None  # noqa: S101 (one of the combinations)
    return Tour(rows, shown)


def _combinations() -> list[tuple[str, Target, int | None, str]]:
    """Return the method, target, rank and storage of every compressed model."""
    floats = itertools.product(METHODS, TARGETS, RANKS, ("float32",))
    integers = itertools.product(STORED, ("both",), RANKS, ("int8",))
    return [*floats, ("dense", "both", None, "int8"), *integers, *itertools.product((CHOSEN,), ("both",), RANKS, (AUTO,))]


def draw(tour: Tour, path: Path) -> None:
    """Draw the loss against the bytes of the LSTMs, all matrices compressed, and write a PNG or PDF.

    Semi-NMF, which costs as much as SVD, and pruning, which saves no bytes, are left out.

    Raises:
        SlimLSTMError: matplotlib is not installed.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in tour.rows:
        if row.target == "both" and row.name in _DRAWN:
            curves.setdefault(row.name, []).append((row.bytes, math.log(row.perplexity)))
    loss_against_bytes(curves, (tour.dense.bytes, math.log(tour.dense.perplexity)), path)


def _config(
    method: str,
    target: Target,
    rank: int | None,
    storage: str,
    budgets: dict[tuple[Any, ...], int],
    sensitivity: Sensitivity,
) -> Config:
    """Return a model's configuration; Fisher-weighted factors get the bytes of SVD's at the same rank."""
    if storage == AUTO:
        return sensitivity.plan(budgets[target, rank, "int8"])
    if rank is None:
        return Quantize(storage, target)
    if method == "prune":
        return Prune(rank=rank, target=target)
    stored = None if storage == "float32" else storage
    if method == "fisher":
        return LowRank(method, bytes=budgets[target, rank, storage], target=target, storage=stored)
    return LowRank(method, rank=rank, target=target, storage=stored)


def _pieces(tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut a text into batches of inputs and targets, each [T, B]."""
    length = len(tokens) // _STREAMS
    text = tokens[: length * _STREAMS].view(_STREAMS, length).t()
    starts = range(0, length - _STEPS, _STEPS)
    return [(text[start : start + _STEPS], text[start + 1 : start + 1 + _STEPS]) for start in starts]


def _losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0])[0].flatten(0, 1), batch[1].flatten(), reduction="none")


def _latency_ratio(dense: AWDLSTM, compressed: AWDLSTM, sample: Tensor, tolerance: float) -> float:
    _check_outputs(compressed, sample, tolerance)
    calls = {"dense": lambda: dense.features(sample), "compressed": lambda: compressed.features(sample)}
    return median_ratios(interleaved_seconds(calls, seconds=_LATENCY_SECONDS, threads=1), "dense")["compressed"]


def _check_outputs(model: AWDLSTM, sample: Tensor, tolerance: float) -> None:
    """Check the outputs against the reference recurrence, so that no wrong result is timed."""
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, LowRankLSTM):
            module.backend = "reference"
    with torch.no_grad():
        expected, found = reference.features(sample)[0], model.features(sample)[0]
    error = float((expected - found).norm() / expected.norm())
    if not error < tolerance:
        raise SlimLSTMError(
            f"the compressed model's output differs from the reference recurrence by {error:.1e}; please report it"
        )
