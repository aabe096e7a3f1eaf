"""Try configurations one after the other, and remember the best so far."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import STORAGES
from slimlstm.pipeline.config import Quantize
from slimlstm.pipeline.plan import Config, Plan
from slimlstm.pipeline.report import Report
from slimlstm.search.progress import TrialProgress, print_trials
from slimlstm.search.result import Goal, Measured, Search, Trial, nothing_found

Made = TypeVar("Made")
WHOLE_STORAGES = ("bfloat16", "int8", "int6", "int5", "int4", "int3")
"""Storages of whole matrices that a search tries, from the largest to the smallest."""
FIRST = "int8"
"""The storage to try first: it rarely changes a metric."""
STEP = 0.45
"""As long as no size was refused, the next size is this share of the smallest accepted one."""
NEAR = 1.04
"""The search ends when the smallest accepted size is at most this many times the largest refused one."""


@dataclass(frozen=True)
class Speed:
    """Speed of a compressed model.

    Attributes:
        latency: median seconds of a call.
        faster: the dense model's median seconds over ``latency``.
    """

    latency: float
    faster: float


@dataclass
class Engine(Generic[Made]):
    """Tries configurations and remembers the outcomes.

    Attributes:
        make: returns a compressed model and its report; raises SlimLSTMError where a configuration is impossible.
        measure: returns a compressed model's metric.
        accepts: says whether a metric and a speed meet the limit.
        evaluations: how many more times the metric may be computed.
        is_better: says whether the first trial is preferred to the second; by default the smaller one is.
        speed_of: times a compressed model; returns None where no latency is wanted.
        on_trial: called after each trial with the trial and an upper bound on the seconds left.
        trials: the outcomes, in order.
        refusals: configurations that were impossible, and why.
        no_smaller: the labels of configurations that made the model no smaller.
        matrix_bytes: returns the bytes of a compressed model's matrices; one that several sites share counts once.
        best: the preferred accepted trial, with its model and report.
        interrupted: whether Ctrl-C ended the search.
    """

    make: Callable[[Config], tuple[Made, Report]]
    measure: Callable[[Made], Measured]
    accepts: Callable[[Measured, Speed | None], bool]
    evaluations: int
    is_better: Callable[[Trial, Trial], bool] = lambda new, old: new.bytes < old.bytes
    speed_of: Callable[[Made], Speed | None] = lambda made: None
    on_trial: Callable[[Trial, float], None] = lambda trial, left: None
    trials: list[Trial] = field(default_factory=list[Trial])
    refusals: list[str] = field(default_factory=list[str])
    no_smaller: list[str] = field(default_factory=list[str])
    matrix_bytes: Callable[[Made, Report], int] = lambda made, report: sum(site.bytes_after for site in report.sites)
    best: tuple[Trial, Made, Report] | None = None
    interrupted: bool = False
    _started: float = field(default_factory=time.monotonic)

    def run(self, strategy: Callable[[], None]) -> None:
        """Run a strategy. Ctrl-C ends it; the best trial so far is then the result, if one was accepted."""
        try:
            strategy()
        except KeyboardInterrupt:
            if self.best is None:
                raise
            self.interrupted = True

    def attempt(self, label: str, config: Config) -> Trial | None:
        """Try one configuration.

        Returns:
            The trial, or None where the configuration is impossible, makes nothing smaller or repeats an earlier plan, or
            where no evaluation is left.
        """
        if self.evaluations < 1:
            return None
        try:
            made, report = self.make(config)
        except SlimLSTMError as error:
            if not any(refusal.endswith(f": {error}") for refusal in self.refusals):
                self.refusals.append(f"{label}: {error}")
            return None
        if report.model.bytes_after >= report.model.bytes_before:
            self.no_smaller.append(label)
            return None
        if self._is_known(report.plan):
            return None
        self.evaluations -= 1
        speed = self.speed_of(made)
        metric = self.measure(made)
        accepted = not math.isnan(metric.value) and self.accepts(metric, speed)
        latency, faster = (None, None) if speed is None else (speed.latency, speed.faster)
        size = report.model.bytes_after
        trial = Trial(label, report.plan, size, metric.value, accepted, latency, faster, metric.margin)
        self.trials.append(trial)
        if accepted and (self.best is None or self.is_better(trial, self.best[0])):
            self.best = trial, made, report
        self.on_trial(trial, self._seconds_left())
        return trial

    def _is_known(self, plan: Plan) -> bool:
        return any(trial.plan == plan for trial in self.trials)

    def _seconds_left(self) -> float:
        return (time.monotonic() - self._started) / len(self.trials) * self.evaluations


def run_search(
    engine: Engine[Made],
    strategy: Callable[[], None],
    goal: Goal,
    keep: Callable[[Search, Made], None],
    progress: TrialProgress | None,
) -> tuple[Search, Made]:
    """Run a strategy, and return the search and its best model.

    Args:
        engine: tries configurations.
        strategy: gives the engine configurations to try.
        goal: the limit, and the uncompressed model.
        keep: called after each trial with the search so far and its best model, as soon as a trial is accepted.
        progress: called after each trial, see :func:`slimlstm.find_smallest`.

    Raises:
        SlimLSTMError: no trial was accepted.
    """
    report_trial = print_trials(goal.metric_name) if progress is None else progress

    def on_trial(trial: Trial, left: float) -> None:
        if engine.best is not None:
            keep(*_outcome(engine, goal))
        report_trial(trial, left)

    engine.on_trial = on_trial
    engine.run(strategy)
    return _outcome(engine, goal)


def _outcome(engine: Engine[Made], goal: Goal) -> tuple[Search, Made]:
    """Return the search so far and its best model, or raise :class:`SlimLSTMError` if no trial was accepted."""
    notes = [*engine.refusals, *goal.notes]
    if engine.best is None:
        raise nothing_found(engine.trials, notes, goal.limit, engine.no_smaller)
    best, made, report = engine.best
    times = [trial.latency * trial.faster for trial in engine.trials if trial.latency and trial.faster]
    dense = replace(goal.dense, latency=statistics.median(times), faster=1.0) if times else goal.dense
    search = Search(
        dense=dense,
        trials=engine.trials,
        best=best,
        report=report,
        limit=goal.limit,
        better=goal.better,
        metric_name=goal.metric_name,
        interrupted=engine.interrupted,
        notes=notes,
        worst=goal.worst,
    )
    return search, made


def smallest(
    engine: Engine[Made],
    whole: Callable[[str], Quantize],
    within: Callable[[int, str], Config | None],
    storages: Sequence[str] = WHOLE_STORAGES,
) -> None:
    """Look for the smallest model that is accepted: fewer bits of whole matrices first, then rank and bits together.

    Args:
        engine: tries the configurations.
        whole: takes a storage and returns the configuration of whole matrices in it.
        within: takes a number of bytes and a storage for factors, and returns a configuration; None where none fits.
        storages: storages of whole matrices, from the largest to the smallest; the largest is tried only if int8 is
            refused.
    """
    bits = [name for name in storages if name in STORAGES]
    lowest = _fewest_bits(engine, whole, bits)
    if engine.best is None:
        return
    # Low rank and the fewest bits together lose too much: factors get the next larger storage than whole matrices need.
    storage = bits[max(lowest - 1, bits.index(FIRST))]
    high, low = float(engine.matrix_bytes(*engine.best[1:])), 0.0
    while engine.evaluations > 0 and high > max(NEAR * low, 1.0):
        middle = math.sqrt(high * low) if low else STEP * high
        config = within(int(middle), storage)
        trial = None if config is None else engine.attempt(f"rank and bits for {int(middle):,} bytes of matrices", config)
        if trial is not None and trial.accepted:
            high = float(engine.matrix_bytes(*engine.best[1:]))
        else:
            low = middle


def _fewest_bits(engine: Engine[Made], whole: Callable[[str], Quantize], bits: list[str]) -> int:
    """Return the index of the smallest storage that is accepted, found by bisection; 0 if int8 is not accepted."""

    def accepts(index: int) -> bool:
        trial = engine.attempt(bits[index], whole(bits[index]))
        # A model that already has these bits, or fewer, may accept still fewer.
        return bits[index] in engine.no_smaller if trial is None else trial.accepted

    good, bad = bits.index(FIRST), len(bits)
    if not accepts(good):
        accepts(0)
        return 0
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if accepts(middle) else (good, middle)
    return good


def try_all(engine: Engine[Made], candidates: Iterable[tuple[str, Config | None]], *, first_only: bool = False) -> None:
    """Try labelled configurations in order, as long as evaluations are left; ``first_only`` ends at the first accepted."""
    for label, config in candidates:
        if config is not None:
            trial = engine.attempt(label, config)
            if first_only and trial is not None and trial.accepted:
                return
