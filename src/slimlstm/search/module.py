"""Search on modules: for the smallest model that a metric allows, or the best model within bytes or a latency."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from slimlstm.bench import compare
from slimlstm.calibration.collect import calibrate
from slimlstm.calibration.losses import Loss
from slimlstm.calibration.moments import Calibration
from slimlstm.compress import compress_, measure_sensitivity
from slimlstm.errors import SlimLSTMError
from slimlstm.files import write_json
from slimlstm.module_source import ModuleSource
from slimlstm.modules.arguments import check_data, check_function, check_model, check_repeatable
from slimlstm.modules.graphs import copy_model
from slimlstm.modules.modes import evaluation_mode, plain_mode
from slimlstm.modules.state import kept_state
from slimlstm.pipeline.config import Filter, LowRank, Quantize, Target
from slimlstm.pipeline.plan import Config
from slimlstm.pipeline.report import Report
from slimlstm.pipeline.sensitivity import Sensitivity
from slimlstm.search.engine import WHOLE_STORAGES, Engine, Speed, run_search, smallest, try_all
from slimlstm.search.progress import TrialProgress
from slimlstm.search.result import (
    Better,
    Goal,
    Measured,
    Metric,
    Search,
    SmallerModel,
    Trial,
    limit_in_words,
    limit_of,
)

_SHARES = (0.2, 0.14, 0.1, 0.07, 0.05, 0.035, 0.025)
"""Sizes of factors in int8 that a search for a latency tries, as shares of the dense matrices' bytes; whole matrices in
int8 take a quarter."""


@plain_mode()
def find_smallest(
    model: nn.Module,
    metric: Metric,
    *,
    better: Better,
    at_most: str | float = "1%",
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    calibration: Calibration | None = None,
    target: Target = "both",
    filter: Filter | None = None,
    evaluations: int = 10,
    inputs: Sequence[Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    metric_name: str = "metric",
    progress: TrialProgress | None = None,
) -> SmallerModel:
    """Return the smallest compressed copy of ``model`` whose metric meets a limit; the model does not change.

    The search tries int8 first, then fewer bits of whole matrices, then rank and bits together for fewer and fewer bytes.
    Batches improve every step after int8. With a loss too, the search can weigh the matrices against each other. Ctrl-C
    ends the search with the best model so far.

    Args:
        model: any module that :func:`slimlstm.compress_` can compress.
        metric: takes a compressed copy in evaluation mode, and returns a number, or one value for each example [n]. It runs
            without gradients. With values of examples, their mean has to meet the limit with 95% confidence for new
            examples. Measure it on data that ``batches`` do not contain.
        better: ``"lower"`` for a perplexity or an error, ``"higher"`` for an accuracy.
        at_most: how much worse the metric may get: a share of the uncompressed model's metric such as ``"1%"``, or a number
            in the metric's units.
        batches, loss, calibration: see :func:`slimlstm.compress_`; batches have to be iterable more than once.
        target, filter: see :class:`slimlstm.LowRank`.
        evaluations: the largest number of times to compute the metric, the uncompressed model included.
        inputs: arguments of one call of the model, to time every copy beside the uncompressed model.
        output: a JSON file for the search so far, written after every trial; it holds the best plan.
        metric_name: the name of the metric in tables.
        progress: called after each trial with the trial and an upper bound on the seconds left; None prints a line for
            each trial on a terminal.

    Returns:
        The best copy, its report and plan, and every trial.

    Raises:
        SlimLSTMError: nothing smaller meets the limit, the metric of the uncompressed model is not finite, an argument is
            out of range, or see :func:`slimlstm.compress_`.

    Examples:
        >>> import torch
        >>> model, x = nn.Sequential(nn.LSTM(8, 16)), torch.randn(20, 4, 8)
        >>> expected = model(x)[0].detach()
        >>> def error(model):
        ...     return float((model(x)[0] - expected).norm() / expected.norm())
        >>> found = find_smallest(model, error, better="lower", at_most=0.02)
        >>> found.best.metric <= 0.02, found.best.bytes < 0.4 * found.dense.bytes
        (True, True)
    """
    subject = _Subject(model, metric, batches, loss, calibration, target, filter, inputs, output)
    dense = subject.dense_trial(evaluations)
    worst = limit_of(dense.metric, at_most, better)
    words = limit_in_words(metric_name, better, worst, subject.dense_metric)
    goal = Goal(dense, words, better, metric_name, worst)
    engine = Engine(
        make=subject.make,
        measure=subject.measure,
        accepts=lambda metric, _: goal.is_met_by(metric),
        evaluations=evaluations - 1,
        speed_of=subject.speed_of,
        refusals=subject.refusals,
        matrix_bytes=matrix_bytes,
    )
    return subject.search(engine, lambda: smallest(engine, subject.whole, subject.within), goal, progress)


@plain_mode()
def find_best(
    model: nn.Module,
    metric: Metric,
    *,
    better: Better,
    bytes: int | None = None,
    latency: float | None = None,
    inputs: Sequence[Any] | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    calibration: Calibration | None = None,
    target: Target = "both",
    filter: Filter | None = None,
    evaluations: int = 10,
    output: str | os.PathLike[str] | None = None,
    metric_name: str = "metric",
    progress: TrialProgress | None = None,
) -> SmallerModel:
    """Return the compressed copy of ``model`` with the best metric within a number of bytes or a latency.

    Args:
        bytes: the most that all selected matrices together may take when saved. Give this or ``latency``.
        latency: the most seconds that ``model(*inputs)`` may take, as a median with PyTorch's current number of threads.
            The search goes from slow to fast models, and ends at the first one that is fast enough.
        inputs: arguments of one call; needed for a latency.
        model, metric, better, batches, loss, calibration, target, filter, evaluations, output, metric_name, progress: see
            :func:`find_smallest`.

    Raises:
        SlimLSTMError: nothing that was tried meets the limit, not exactly one limit is given, or see
            :func:`find_smallest`.

    Examples:
        >>> import torch
        >>> model, x = nn.Sequential(nn.LSTM(8, 16)), torch.randn(20, 4, 8)
        >>> expected = model(x)[0].detach()
        >>> def error(model):
        ...     return float((model(x)[0] - expected).norm() / expected.norm())
        >>> found = find_best(model, error, better="lower", bytes=1700)
        >>> sum(site.bytes_after for site in found.report.sites) <= 1700
        True
    """
    if (bytes is None) == (latency is None):
        raise SlimLSTMError(f"give either bytes or latency, not bytes={bytes} and latency={latency}")
    if bytes is not None and (type(bytes) is not int or bytes < 1):
        raise SlimLSTMError(f"bytes is an int of at least 1, not {bytes!r}")
    if latency is not None and not (isinstance(cast(object, latency), int | float) and latency > 0):
        raise SlimLSTMError(f"a latency is a number of seconds above 0, not {latency!r}")
    if latency is not None and inputs is None:
        raise SlimLSTMError("a latency takes inputs=, the arguments of one call to time")
    subject = _Subject(model, metric, batches, loss, calibration, target, filter, inputs, output)
    dense = subject.dense_trial(evaluations)
    limit_of(dense.metric, 0.0, better)
    words = f"{bytes:,} bytes of matrices" if bytes is not None else f"a latency of at most {1e6 * (latency or 0):,.0f} us"
    goal = Goal(dense, f"best {metric_name} within {words}", better, metric_name)
    engine = Engine(
        make=subject.make_within(bytes) if bytes is not None else subject.make,
        measure=subject.measure,
        accepts=lambda _, speed: latency is None or (speed is not None and speed.latency <= latency),
        evaluations=evaluations - 1,
        is_better=lambda new, old: goal.sign * new.metric < goal.sign * old.metric,
        speed_of=subject.speed_of,
        refusals=subject.refusals,
        matrix_bytes=matrix_bytes,
    )
    candidates = subject.fast_candidates() if bytes is None else subject.candidates(bytes)
    return subject.search(engine, lambda: try_all(engine, candidates, first_only=bytes is None), goal, progress)


@dataclass
class _Subject:
    """A module to compress, and everything that a search asks about it; ``refusals`` says what was impossible, and why."""

    model: nn.Module
    metric: Metric
    batches: Iterable[Any] | None
    loss: Loss | None
    calibration: Calibration | None
    target: Target
    filter: Filter | None
    inputs: Sequence[Any] | None
    output: str | os.PathLike[str] | None
    refusals: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        check_model(self.model)
        check_function(self.metric, "metric", "model")
        check_data(self.batches, self.loss)
        check_repeatable(self.batches)
        if self.output is not None and Path(self.output).is_dir():
            raise SlimLSTMError(f"{self.output} is a folder; give output= the name of a JSON file")

    def dense_trial(self, evaluations: int) -> Trial:
        """Return the trial of the uncompressed model, measured on a copy."""
        if type(evaluations) is not int or evaluations < 2:
            raise SlimLSTMError(f"a search takes at least two evaluations of the metric, not {evaluations!r}")
        report = compress_(copy_model(self.model), Quantize("int8", self.target, self.filter))
        self.dense_metric = self._measured(copy_model(self.model), None)
        value = self.dense_metric.value
        if not math.isfinite(value):
            raise SlimLSTMError(f"the metric of the uncompressed model is {value}; it has to be a finite number")
        self.dense_bytes = _once_each(self.model, {site.key: site.bytes_before for site in report.sites})
        return Trial("uncompressed", None, report.model.bytes_before, value, accepted=True)

    def measure(self, model: nn.Module) -> Measured:
        """Return the metric of a compressed copy, beside the uncompressed model's."""
        return self._measured(model, self.dense_metric)

    def _measured(self, model: nn.Module, dense: Measured | None) -> Measured:
        with evaluation_mode(model), torch.no_grad(), kept_state(model):
            return Measured.of(self.metric(model), dense)

    def make(self, config: Config) -> tuple[nn.Module, Report]:
        trial = copy_model(self.model)
        return trial, compress_(trial, config, calibration=self.moments)

    def make_within(self, budget: int) -> Callable[[Config], tuple[nn.Module, Report]]:
        """Return a function like :meth:`make` that refuses results with more than ``budget`` bytes of matrices."""

        def make(config: Config) -> tuple[nn.Module, Report]:
            made, report = self.make(config)
            size = matrix_bytes(made, report)
            if size > budget:
                raise SlimLSTMError(f"the matrices take {size:,} bytes, more than {budget:,}")
            return made, report

        return make

    def speed_of(self, model: nn.Module) -> Speed | None:
        if self.inputs is None:
            return None
        found = compare(copy_model(self.model), model, *self.inputs)
        return Speed(found.compressed[1], found.faster)

    def whole(self, storage: str) -> Quantize:
        return Quantize(storage, self.target, self.filter)

    def within(self, budget: int, storage: str) -> Config | None:
        """Return a plan by sensitivities for a number of bytes, or, without a loss, factors in one storage."""
        if self.sensitivity is not None:
            return self.sensitivity.plan(budget) if budget >= self.sensitivity.smallest_bytes else None
        method = "svd" if self.moments is None else "activation"
        return LowRank(method, bytes=budget, storage=storage, target=self.target, filter=self.filter)

    def candidates(self, budget: int) -> list[tuple[str, Config | None]]:
        """Return configurations for a number of bytes: whole matrices, and factors or a plan by sensitivities."""
        found: list[tuple[str, Config | None]] = [(name, self.whole(name)) for name in WHOLE_STORAGES]
        if self.sensitivity is not None:
            return [*found, (f"rank and bits for {budget:,} bytes of matrices", self.within(budget, ""))]
        return found + [(f"{name} factors, {budget:,} bytes", self.within(budget, name)) for name in ("int8", "int5")]

    def fast_candidates(self) -> list[tuple[str, Config]]:
        """Return configurations from the slowest to the fastest; storages with fewer bits than int8 are no faster."""
        method = "svd" if self.moments is None else "activation" if self.loss is None else "fisher"
        found: list[tuple[str, Config]] = [(name, self.whole(name)) for name in ("bfloat16", "int8")]
        for share in _SHARES:
            size = int(share * self.dense_bytes)
            config = LowRank(method, bytes=size, storage="int8", target=self.target, filter=self.filter)
            found.append((f"{method} int8 factors, {size:,} bytes", config))
        return found

    def search(
        self, engine: Engine[nn.Module], strategy: Callable[[], None], goal: Goal, progress: TrialProgress | None
    ) -> SmallerModel:
        """Run a strategy, and return its result; after every trial the search so far is written to ``output``."""

        def keep(search: Search, _: nn.Module) -> None:
            if self.output is not None:
                write_json(self.output, search.to_dict())

        found, model = run_search(engine, strategy, goal, keep, progress)
        keep(found, model)
        return SmallerModel.of(found, model)

    @cached_property
    def moments(self) -> Calibration | None:
        if self.calibration is None and self.batches is not None:
            return calibrate(self.model, self.batches, self.loss)
        return self.calibration

    @cached_property
    def sensitivity(self) -> Sensitivity | None:
        """The sensitivities of all matrices; None without a loss, or where they cannot be measured."""
        if self.batches is None or self.loss is None:
            return None
        try:
            return measure_sensitivity(
                self.model, self.batches, self.loss, calibration=self.moments, target=self.target, filter=self.filter
            )
        except SlimLSTMError as error:
            self.refusals.append(f"rank and bits chosen together: {error}")
            return None


def matrix_bytes(model: nn.Module, report: Report) -> int:
    """Return the bytes of the matrices in a report of ``model``; one that several sites share counts once.

    Examples:
        >>> model = nn.Sequential(nn.LSTM(8, 8), nn.LSTM(8, 8))
        >>> model[1].weight_hh_l0 = model[0].weight_hh_l0
        >>> report = compress_(model, Quantize("bfloat16"))
        >>> matrix_bytes(model, report) // (2 * 32 * 8)
        3
    """
    return _once_each(model, {site.key: site.bytes_after for site in report.sites})


def _once_each(model: nn.Module, sizes: dict[str, int]) -> int:
    """Return the sum of the sizes of matrices, by key; sites that share a matrix count once."""
    source = ModuleSource(model)
    return sum({source.identity(site): sizes[site.key] for site in source.sites() if site.key in sizes}.values())
