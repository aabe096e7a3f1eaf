"""How much to keep, found by trying: as little as a quality allows, or as much as a latency does."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from slimlstm.calibration.losses import Loss
from slimlstm.calibration.moments import Calibration
from slimlstm.compress import compress_
from slimlstm.errors import SlimLSTMError
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
    """``config`` with the smallest ``keep`` at which a copy of ``model``, compressed so, has a metric of at most ``limit``.

    A perplexity at most 2% worse: ``find_keep(model, LowRank("fisher", keep=1), perplexity, 1.02 * perplexity(model),
    calibration=calibration)``. The metric is taken to fall as more is kept; with ``largest`` to rise, as a latency does, of
    which the largest keep is found. Bisects log(keep) between ``smallest_keep`` and 1; the model itself does not change.

    Args:
        metric: takes the compressed copy; lower is better.
        evaluations: how often the metric may be asked; the answer is within (1 / smallest_keep)^(2^-(evaluations - 1)) of
            where the metric meets the limit.
        calibration: for the methods that need it.
        batches, loss: as of :func:`compress_`, so that the factors of every copy are fitted again.
        progress: called with every keep that was tried and its metric.

    Raises:
        SlimLSTMError: fewer than two evaluations, or the limit is met nowhere that was tried. As :func:`compress_` besides.
    """
    if evaluations < 2 or not 0.0 < smallest_keep < 1.0:
        raise SlimLSTMError(
            f"a search takes two evaluations and a smallest_keep in (0, 1), not {evaluations} and {smallest_keep}"
        )

    def at(keep: float) -> LowRank:
        return dataclasses.replace(config, keep=keep, rank=None, bytes=None, energy=None)

    def accepts(keep: float) -> bool:
        trial = copy.deepcopy(model)
        compress_(trial, at(keep), calibration=calibration, batches=batches, loss=loss)
        value = metric(trial)
        if progress is not None:
            progress(keep, value)
        return value <= limit

    # ``good`` meets the limit, ``bad`` lies on the side where it is missed.
    good, bad = (smallest_keep, 1.0) if largest else (1.0, smallest_keep)
    if not accepts(good):
        raise SlimLSTMError(f"even keep={good} does not bring the metric to {limit:g}; allow more, or check the metric")
    for _ in range(evaluations - 1):
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if accepts(middle) else (good, middle)
    return at(good)
