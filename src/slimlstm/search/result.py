"""Results of a search: every trial, the best one, and the limit it met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from torch import nn

from slimlstm.errors import SlimLSTMError
from slimlstm.pipeline.plan import Plan
from slimlstm.pipeline.report import Report, as_text
from slimlstm.tables import new_table

Better = Literal["lower", "higher"]
"""Direction in which a metric improves."""
Metric = Callable[[nn.Module], float]
"""Takes a model and returns a number, such as a perplexity or an accuracy on held-out data."""


@dataclass(frozen=True)
class Trial:
    """One compressed model that a search measured.

    Attributes:
        label: the method, storage and size in words.
        plan: for :func:`slimlstm.compress_`; None for the dense model.
        bytes: of the whole model, or of the ONNX file.
        metric: its value.
        accepted: whether the metric, and a latency where one was asked for, meet the limit.
        latency: median seconds of a call; None where no example inputs were given.
        faster: the dense model's median seconds over ``latency``, from interleaved calls in one run.
    """

    label: str
    plan: Plan | None
    bytes: int
    metric: float
    accepted: bool
    latency: float | None = None
    faster: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as JSON types."""
        return {**asdict(self), "plan": None if self.plan is None else self.plan.to_dict()}


@dataclass(frozen=True)
class Search:
    """Result of a search. Print it to see every trial.

    Attributes:
        dense: the uncompressed model.
        trials: every compressed model that was measured, in order.
        best: the chosen trial.
        report: of its compression.
        limit: what the search had to meet, in words.
        better: the metric's better direction.
        metric_name: how to call the metric in tables.
        interrupted: whether Ctrl-C ended the search, so that ``best`` is the best so far.
        notes: what else to know, such as candidates that could not be made.
        worst: the worst metric that meets the limit; None where the limit is on bytes or a latency.
    """

    dense: Trial
    trials: list[Trial]
    best: Trial
    report: Report
    limit: str
    better: Better
    metric_name: str
    interrupted: bool
    notes: list[str]
    worst: float | None

    @property
    def plan(self) -> Plan:
        """The best trial's plan, for :func:`slimlstm.compress_`."""
        assert self.best.plan is not None  # noqa: S101 (only the dense model has none)
        return self.best.plan

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher metric is better."""
        return self.better == "higher"

    @property
    def frontier(self) -> list[Trial]:
        """The trials, and the dense model, than which none is both smaller and better; largest first."""
        sign = -1.0 if self.better == "higher" else 1.0
        ordered = sorted([self.dense, *self.trials], key=lambda trial: (trial.bytes, sign * trial.metric))
        frontier: list[Trial] = []
        for trial in ordered:
            if not frontier or sign * trial.metric < sign * frontier[-1].metric:
                frontier.append(trial)
        return frontier[::-1]

    def to_dict(self) -> dict[str, Any]:
        """Return the search as JSON types."""
        return {
            "limit": self.limit,
            "worst": self.worst,
            "better": self.better,
            "metric": self.metric_name,
            "dense": self.dense.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "best": self.best.to_dict(),
            "report": self.report.to_dict(),
            "interrupted": self.interrupted,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def __rich__(self) -> Table:
        has_latency = self.best.faster is not None
        table = new_table([""], ["bytes", "left", self.metric_name, *(["speed"] if has_latency else []), "meets the limit"])
        for trial in (self.dense, *self.trials):
            left = f"{trial.bytes / self.dense.bytes:.1%}"
            speed = [f"{trial.faster:.2f}x" if trial.faster else ""] if has_latency else []
            mark = "chosen" if trial is self.best else "yes" if trial.accepted else "no"
            table.add_row(trial.label, f"{trial.bytes:,}", left, f"{trial.metric:.5g}", *speed, mark)
        table.caption = "\n".join([self.limit, *self.notes])
        return table


@dataclass(frozen=True)
class SmallerModel(Search):
    """Result of a search on a module.

    Attributes:
        model: the compressed copy; the model given to the search is as it was.
    """

    model: nn.Module


def limit_of(dense: float, at_most: str | float, better: Better) -> float:
    """Return the worst acceptable value of a metric.

    Args:
        dense: the uncompressed model's value.
        at_most: how much worse it may get: a share of ``dense`` such as ``"1%"``, or a number in the metric's units.
        better: the metric's better direction.

    Raises:
        SlimLSTMError: ``at_most`` is neither, or is a share of zero.

    Examples:
        >>> limit_of(80.0, "1%", "lower"), limit_of(0.875, 0.125, "higher")
        (80.8, 0.75)
    """
    if better not in ("lower", "higher"):
        raise SlimLSTMError(f"better is 'lower' or 'higher', the direction in which the metric improves, not {better!r}")
    try:
        is_share = isinstance(at_most, str)
        worse = float(at_most.strip().removesuffix("%")) / 100.0 if isinstance(at_most, str) else float(at_most)
        if isinstance(at_most, str) and not at_most.strip().endswith("%"):
            raise ValueError
    except (TypeError, ValueError):
        raise SlimLSTMError(
            f"at_most is a share such as '1%', or a number in the metric's units, not {at_most!r}"
        ) from None
    if not 0.0 <= worse < float("inf"):
        raise SlimLSTMError(f"at_most is how much worse the metric may get, at least 0, not {at_most!r}")
    if is_share and dense == 0.0:
        raise SlimLSTMError(f"{at_most} of a metric of 0 is 0; give at_most as a number in the metric's units")
    amount = worse * abs(dense) if is_share else worse
    return dense + amount if better == "lower" else dense - amount


def nothing_found(trials: Sequence[Trial], refusals: Sequence[str], limit: str) -> SlimLSTMError:
    """Return the error that says what was tried, and that nothing smaller meets the limit."""
    tried = "; ".join(f"{trial.label}: {trial.metric:.5g}" for trial in trials) or "nothing could be measured"
    return SlimLSTMError("; ".join([f"nothing smaller meets the limit ({limit}). Tried: {tried}", *refusals]))
