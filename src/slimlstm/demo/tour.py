"""The tour: the embedded language model compressed by every method, target and rank, with what that costs and saves."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimlstm.bench.timing import interleaved_seconds, median_ratios
from slimlstm.calibration.collect import calibrate
from slimlstm.compress import compress_, sha256_of
from slimlstm.demo.awd_lstm import AWDLSTM
from slimlstm.demo.model import embedded_model, held_out_tokens
from slimlstm.errors import SlimLSTMError
from slimlstm.evaluate import perplexity
from slimlstm.modules.hosts import find_sites
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.pipeline.plan import LowRank, Prune, Target
from slimlstm.provenance import provenance

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
    """One way to compress the model.

    ``rank`` is that of every matrix; of ``"fisher"``, whose ranks differ, the one that would take as many bytes.
    ``parameters`` and ``bytes`` are those of the LSTMs. ``change`` is the relative rise in perplexity over the dense model,
    ``latency_ratio`` how many times faster than the dense model the LSTMs read 35 tokens at batch 1, on one thread.
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
    """All rows, the dense model's first."""

    rows: list[Row]

    @property
    def dense(self) -> Row:
        """The model as it was trained."""
        return self.rows[0]

    def row(self, method: str, target: str, rank: int) -> Row:
        """The row of one method, target and rank."""
        return next(r for r in self.rows if (r.method, r.target, r.rank) == (method, target, rank))

    def summary(self) -> str:
        """What is to be seen, in three sentences made from the numbers."""
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
            f"Against magnitude pruning with as many weights, SVD is the better one in {svd_wins} of {len(pairs)} cases, "
            "and it alone makes the stored model smaller."
        )

    def to_dict(self) -> dict[str, Any]:
        """The tour as JSON types."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "summary": self.summary(),
            "data_sha256": sha256_of(held_out_tokens()[:_TOKENS]),
            "provenance": provenance(),
        }

    def __rich__(self) -> Table:
        table = Table(caption_justify="left")
        table.add_column("method")
        table.add_column("target")
        for heading in ("rank", "LSTM parameters", "LSTM bytes", "perplexity", "change", "speed"):
            table.add_column(heading, justify="right")
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
    """Compresses the embedded model in every way and measures it on the held-out text; takes about a minute.

    Args:
        progress: called with what is being done and the fraction of all that is done.

    Raises:
        SlimLSTMError: a compressed model's fast output is not the one that the reference recurrence gives.
    """
    dense, tokens = embedded_model(), held_out_tokens()[:_TOKENS]
    if progress is not None:
        progress("calibrating", 0.0)
    calibration = calibrate(dense, _pieces(held_out_tokens()[_TOKENS:]), _losses)
    sample = tokens[:_LATENCY_STEPS, None]
    ways = list(itertools.product(METHODS, TARGETS, RANKS))
    dense_loss = perplexity(dense, tokens, streams=_STREAMS)
    size = sum(parameter.numel() for parameter in dense.lstms.parameters())
    rows = [Row("dense", "", None, size, 4 * size, dense_loss.perplexity, 0.0, 1.0)]
    for index, (method, target, rank) in enumerate(ways):
        if progress is not None:
            progress(f"{method} {target} rank {rank}", index / len(ways))
        model = copy.deepcopy(dense)
        seen = calibration if method == "fisher" else None  # without, no rise of the loss is predicted, which takes time
        report = compress_(model, _config(dense, method, target, rank), calibration=seen)
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


def _config(dense: AWDLSTM, method: str, target: Target, rank: int) -> LowRank | Prune:
    if method == "prune":
        return Prune(rank=rank, target=target)
    if method == "fisher":
        sites = [site for site in find_sites(dense) if target in (site.target, "both")]
        return LowRank(method, bytes=4 * rank * sum(sum(site.shape) for site in sites), target=target)
    return LowRank(method, rank=rank, target=target)


def _pieces(tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets [T, B] of a text, in pieces that are read one by one."""
    length = len(tokens) // _STREAMS
    text = tokens[: length * _STREAMS].view(_STREAMS, length).t()
    starts = range(0, length - _STEPS, _STEPS)
    return [(text[start : start + _STEPS], text[start + 1 : start + 1 + _STEPS]) for start in starts]


def _losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0])[0].flatten(0, 1), batch[1].flatten(), reduction="none")


def _latency_ratio(dense: AWDLSTM, compressed: AWDLSTM, sample: Tensor) -> float:
    _check_outputs(compressed, sample)
    calls = {"dense": lambda: dense.features(sample), "compressed": lambda: compressed.features(sample)}
    return median_ratios(interleaved_seconds(calls, repeats=9, threads=1), "dense")["compressed"]


def _check_outputs(model: AWDLSTM, sample: Tensor) -> None:
    """No speed is told of a wrong answer: every backend has to agree with the reference recurrence."""
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, LowRankLSTM):
            module.backend = "reference"
    with torch.no_grad():
        expected, found = reference.features(sample)[0], model.features(sample)[0]
    error = float((expected - found).norm() / expected.norm())
    if not error < 1e-4:
        raise SlimLSTMError(f"the compressed model's output differs from the reference recurrence's by {error:.1e}")
