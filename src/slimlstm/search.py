"""Search for a size by trying: the smallest that a quality allows, or the largest that a latency allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from slimlstm.calibration.losses import Loss
from slimlstm.calibration.moments import Calibration
from slimlstm.compress import compress_
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.graphs import copy_model
from slimlstm.pipeline.plan import LowRank


def find_keep(
    model: nn.Module,
    config: LowRank,
    metric: Callable[[nn.Module], float],
    limit: float,
    *,
    largest: bool = False,
    smallest_keep: float = 0.01,
    evaluations: int = 6,
    calibration: Calibration | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> LowRank:
    """Return ``config`` with the smallest ``keep`` whose compressed copy of ``model`` has a metric of at most ``limit``.

    Bisects log(keep) between ``smallest_keep`` and 1. The model does not change. For instance, a perplexity at most 2%
    worse: ``find_keep(model, LowRank("fisher", keep=1), perplexity, 1.02 * perplexity(model), calibration=calibration)``.

    Args:
        model: any module that :func:`slimlstm.compress_` can compress.
        config: the method, target and storage; its size is replaced.
        metric: takes a compressed copy, and returns a number; lower is better. It should fall as ``keep`` rises.
        limit: the highest acceptable metric.
        largest: find the largest ``keep`` instead, for a metric that rises with ``keep``, such as a latency.
        smallest_keep: the smallest fraction to try.
        evaluations: how often to compute the metric, at least twice. The result is within a factor of
            (1 / smallest_keep)^(2^-(evaluations - 1)) of the exact one.
        calibration: for calibrated methods.
        batches, loss: see :func:`slimlstm.compress_`; with them every copy's factors are fitted again.
        progress: called with every ``keep`` that was tried and its metric.

    Raises:
        SlimLSTMError: fewer than two evaluations, no size that was tried meets the limit, or see
            :func:`slimlstm.compress_`.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.LSTM(8, 16))
        >>> def parameters(model):
        ...     return sum(parameter.numel() for parameter in model.parameters())
        >>> round(find_keep(model, LowRank(keep=1.0), parameters, limit=1000, largest=True).keep, 2)
        0.56
    """
    if evaluations < 2 or not 0.0 < smallest_keep < 1.0:
        raise SlimLSTMError(
            f"a search takes two evaluations and a smallest_keep in (0, 1), not {evaluations} and {smallest_keep}"
        )

    def at(keep: float) -> LowRank:
        return dataclasses.replace(config, keep=keep, rank=None, bytes=None, energy=None)

    def accepts(keep: float) -> bool:
        trial = copy_model(model)
        compress_(trial, at(keep), calibration=calibration, batches=batches, loss=loss)
        value = metric(trial)
        if progress is not None:
            progress(keep, value)
        return value <= limit

    # ``good`` meets the limit; ``bad`` is on the side that misses it.
    good, bad = (smallest_keep, 1.0) if largest else (1.0, smallest_keep)
    if not accepts(good):
        raise SlimLSTMError(f"even keep={good} does not bring the metric to {limit:g}; allow more, or check the metric")
    for _ in range(evaluations - 1):
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if accepts(middle) else (good, middle)
    return at(good)
