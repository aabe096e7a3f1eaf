"""Results of a search: every trial, the best one, and the limit it met."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from rich.table import Table
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.pipeline.plan import Plan
from slimlstm.pipeline.report import Report, as_text
from slimlstm.tables import new_table

Better = Literal["lower", "higher"]
"""Direction in which a metric improves."""
Metric = Callable[[nn.Module], "float | Tensor | ArrayLike"]
"""Takes a model and returns a number, such as a perplexity, or one value for each held-out example [n], such as 1.0 for a
right answer and 0.0 for a wrong one."""
CONFIDENCE = 0.995
"""Probability that the mean of new examples is no worse than a trial's margin says. The margins of ten trials then all hold
in about 95 of 100 searches, so that the smallest accepted trial was hardly accepted by chance."""


@dataclass(frozen=True)
class Measured:
    """Value of a metric.

    Attributes:
        value: the number, or the mean over the examples.
        margin: how much worse new examples may be, by a t-test with :data:`CONFIDENCE` on the differences to the
            uncompressed model; 0 for a number.
        examples: the values of the examples [n], or None for a number.
    """

    value: float
    margin: float = 0.0
    examples: Tensor | None = None

    @classmethod
    def of(cls, found: float | Tensor | ArrayLike, dense: Measured | None = None) -> Measured:
        """Return the value of a user's metric, compared with the uncompressed model's.

        Args:
            found: the result of the metric: a number, or one value for each example [n].
            dense: the value for the uncompressed model; None where ``found`` is for the uncompressed model.

        Raises:
            SlimLSTMError: ``found`` is neither a number nor a list of numbers, or has another shape than for the
                uncompressed model.

        Examples:
            >>> dense = Measured.of([1.0, 1.0, 1.0, 1.0])
            >>> found = Measured.of([1.0, 0.0, 1.0, 1.0], dense)
            >>> found.value, round(found.margin, 3)
            (0.75, 1.449)
        """
        try:
            values = torch.as_tensor(found, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise SlimLSTMError(f"the metric returned {found!r}; return a number, or one for each example") from error
        before = values if dense is None else torch.zeros(()) if dense.examples is None else dense.examples
        if values.ndim > 1 or values.shape != before.shape or values.numel() == 0:
            raise SlimLSTMError(
                f"the metric returned values of shape {list(values.shape)}, before compression {list(before.shape)}; "
                "return a number, or one for each of the same examples [n]"
            )
        if values.ndim == 0:
            return cls(float(values))
        freedom = max(1, len(values) - 1)
        spread = float((values - before).std(correction=min(1, len(values) - 1)))
        return cls(float(values.mean()), student_quantile(CONFIDENCE, freedom) * spread / math.sqrt(len(values)), values)


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t, by its expansion in 1 / freedom (Abramowitz and Stegun 1964, 26.7.5).

    Args:
        probability: between 0 and 1.
        freedom: degrees of freedom; below 3 the result is too small.

    Examples:
        >>> round(student_quantile(0.95, 9), 3)
        1.833
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


@dataclass(frozen=True)
class Trial:
    """One compressed model that a search measured.

    Attributes:
        label: the method, storage and size in words.
        plan: the plan for :func:`slimlstm.compress_`; None for the dense model.
        bytes: the bytes of the whole model, or of the ONNX file.
        metric: the value of the metric.
        accepted: whether the metric, and a latency where one was asked for, meet the limit.
        latency: median seconds of a call; None where no example inputs were given.
        faster: the dense model's median seconds over ``latency``, from interleaved calls in one run.
        margin: how much worse new examples may be; see :class:`Measured`.
    """

    label: str
    plan: Plan | None
    bytes: int
    metric: float
    accepted: bool
    latency: float | None = None
    faster: float | None = None
    margin: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as JSON types."""
        return {**asdict(self), "plan": None if self.plan is None else self.plan.to_dict()}


@dataclass(frozen=True)
class Goal:
    """The limit that a search has to meet, beside the uncompressed model.

    Attributes:
        dense: the uncompressed model.
        limit: the limit in words.
        better: the metric's better direction.
        metric_name: the name of the metric in tables.
        worst: the worst metric that meets the limit; None where the limit is on bytes or a latency.
        notes: remarks for the result, or for the error where nothing meets the limit.
    """

    dense: Trial
    limit: str
    better: Better
    metric_name: str
    worst: float | None = None
    notes: Sequence[str] = ()

    @property
    def sign(self) -> float:
        """1 where a lower metric is better, else -1."""
        return 1.0 if self.better == "lower" else -1.0

    def is_met_by(self, metric: Measured) -> bool:
        """Return whether a metric, made worse by its margin, is no worse than ``worst``."""
        return self.worst is None or self.sign * metric.value + metric.margin <= self.sign * self.worst


@dataclass(frozen=True)
class Search:
    """Result of a search. Print it to see every trial.

    Attributes:
        dense: the uncompressed model.
        trials: every compressed model that was measured, in order.
        best: the chosen trial.
        report: the report of the chosen trial's compression.
        limit: the limit that the search had to meet, in words.
        better: the metric's better direction.
        metric_name: the name of the metric in tables.
        interrupted: whether Ctrl-C ended the search, so that ``best`` is the best so far.
        notes: further remarks, such as configurations that were impossible.
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
        """The trials, the dense model included, that no other betters in both bytes and metric; largest first."""
        sign = -1.0 if self.better == "higher" else 1.0
        measured = [trial for trial in [self.dense, *self.trials] if not math.isnan(trial.metric)]
        ordered = sorted(measured, key=lambda trial: (trial.bytes, sign * trial.metric))
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

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __rich__(self) -> Table:
        has_latency = self.best.faster is not None
        table = new_table([""], ["bytes", "left", self.metric_name, *(["speed"] if has_latency else []), "meets the limit"])
        for trial in (self.dense, *self.trials):
            left = f"{trial.bytes / self.dense.bytes:.1%}"
            speed = [f"{trial.faster:.2f}x" if trial.faster else ""] if has_latency else []
            mark = "chosen" if trial is self.best else "yes" if trial.accepted else "no"
            metric = f"{trial.metric:.5g}" + (f" ± {trial.margin:.1g}" if trial.margin else "")
            table.add_row(trial.label, f"{trial.bytes:,}", left, metric, *speed, mark)
        table.caption = "\n".join([self.limit, *self.notes])
        return table


@dataclass(frozen=True)
class SmallerModel(Search):
    """Result of a search on a module.

    Attributes:
        model: the compressed copy; the model given to the search is as it was.
    """

    model: nn.Module

    @classmethod
    def of(cls, search: Search, model: nn.Module) -> SmallerModel:
        """Return the result of a search together with its best model."""
        return cls(**vars(search), model=model)


def limit_of(dense: float, at_most: str | float, better: Better) -> float:
    """Return the worst acceptable value of a metric.

    Args:
        dense: the uncompressed model's value.
        at_most: how much worse it may get: a share of ``dense`` such as ``"1%"``, or a number in the metric's units.
        better: the metric's better direction.

    Raises:
        SlimLSTMError: ``better`` is no direction, or ``at_most`` is neither a share nor a number, is negative, or is a
            share of zero.

    Examples:
        >>> limit_of(80.0, "1%", "lower"), limit_of(0.875, 0.125, "higher")
        (80.8, 0.75)
    """
    if better not in ("lower", "higher"):
        raise SlimLSTMError(f"better is 'lower' or 'higher', the direction in which the metric improves, not {better!r}")
    worse, is_share = _amount_of(at_most), isinstance(at_most, str)
    if is_share and dense == 0.0:
        raise SlimLSTMError(f"{at_most} of a metric of 0 is 0; give at_most as a number in the metric's units")
    amount = worse * abs(dense) if is_share else worse
    return dense + amount if better == "lower" else dense - amount


def share_of(at_most: str | float) -> float:
    """Return the largest acceptable disagreement, from 0 to 1.

    Raises:
        SlimLSTMError: ``at_most`` is neither a share such as ``"1%"`` nor a number, or not from 0 to 1.

    Examples:
        >>> share_of("20%"), share_of(0.01)
        (0.2, 0.01)
    """
    found = _amount_of(at_most)
    if found > 1.0:
        raise SlimLSTMError(f"at_most is the largest disagreement, from 0 to 1 or from 0% to 100%, not {at_most!r}")
    return found


def _amount_of(at_most: str | float) -> float:
    """Return ``at_most`` as a finite number of at least 0; a string is a percentage."""
    try:
        if isinstance(at_most, str):
            if not at_most.strip().endswith("%"):
                raise ValueError
            found = float(at_most.strip().removesuffix("%")) / 100.0
        else:
            found = float(at_most)
    except (TypeError, ValueError):
        raise SlimLSTMError(
            f"at_most is a share such as '1%', or a number in the metric's units, not {at_most!r}"
        ) from None
    if not 0.0 <= found < float("inf"):
        raise SlimLSTMError(f"at_most is how much worse the metric may get, at least 0, not {at_most!r}")
    return found


def limit_in_words(name: str, better: Better, limit: float, dense: Measured) -> str:
    """Return the limit of a metric in words.

    Examples:
        >>> limit_in_words("accuracy", "higher", 0.891, Measured(0.9))
        'accuracy at least 0.891 (uncompressed: 0.9)'
    """
    words = f"{name} at {'most' if better == 'lower' else 'least'} {limit:.5g} (uncompressed: {dense.value:.5g})"
    return words if dense.examples is None else f"{words}, with 95% confidence for new examples"


def nothing_found(
    trials: Sequence[Trial], refusals: Sequence[str], limit: str, no_smaller: Sequence[str] = ()
) -> SlimLSTMError:
    """Return the error that says what was tried, and that nothing smaller meets the limit."""
    tried = "; ".join(f"{trial.label}: {trial.metric:.5g}" for trial in trials) or "nothing could be measured"
    same = [f"no smaller than the model: {', '.join(no_smaller)}"] if no_smaller else []
    return SlimLSTMError("; ".join([f"nothing smaller meets the limit ({limit}). Tried: {tried}", *same, *refusals]))
