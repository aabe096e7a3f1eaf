"""The one protocol by which everything is timed: calls interleave, so that noise cancels; report ratios only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from torch.nn.utils import parametrize

from slimlstm.errors import SlimLSTMError
from slimlstm.progress import Progress, shown

SECONDS = 0.3
"""Default time for each call in all, in seconds."""
MIN_TURNS, MAX_TURNS = 5, 200
"""The smallest and the largest number of turns in which each call is timed."""
PATIENCE = 10
"""A run that takes this many times as long as it should ends early, once every call was timed twice."""


def interleaved_seconds(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = SECONDS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Return the wall-clock seconds of each call, timed in turns that are spread evenly over the run.

    A turn is one call that is not timed and one that is, so that each call is timed as if it ran repeatedly, with warm
    caches. Every call gets about the same time in total, in ``MIN_TURNS`` to ``MAX_TURNS`` turns. The calls run without
    gradients, and parametrizations such as masks are applied once, as in a deployed model.

    Args:
        calls: functions without arguments, by name.
        seconds: about how long each call is timed in all.
        threads: the number of PyTorch's threads meanwhile, unchanged if None.
        progress: called before every turn with the name of its call and the fraction done; None draws a bar on a terminal.

    Returns:
        The seconds of every timed call, by name.

    Raises:
        SlimLSTMError: ``calls`` is empty, or ``seconds`` is not above zero.

    Examples:
        >>> times = interleaved_seconds({"sum": lambda: sum(range(100))}, seconds=0.01)
        >>> len(times["sum"]) >= MIN_TURNS
        True
    """
    if not calls or not seconds > 0.0:
        raise SlimLSTMError(
            f"{len(calls)} calls cannot be timed for {seconds} seconds; give at least one, and a time above 0"
        )
    with (
        shown("timing", progress) as before_turn,
        using_threads(threads or torch.get_num_threads()),
        torch.no_grad(),
        parametrize.cached(),
    ):
        turns = {name: _turns(call, seconds) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        rounds, deadline = max(turns.values()), time.perf_counter() + PATIENCE * seconds * len(calls)
        for index in range(rounds):
            # Engines whose threads wait actively slow each other down where the cores are too few.
            if time.perf_counter() > deadline and min(map(len, times.values())) >= 2:
                break
            for name, call in calls.items():
                if (index + 1) * turns[name] // rounds > index * turns[name] // rounds:
                    before_turn(name, index / rounds)
                    call()
                    times[name].append(_timed(call))
    return times


def median_ratios(times: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Return the median time of ``baseline`` over the median time of each call; calls above 1 are faster than it.

    Examples:
        >>> median_ratios({"dense": [4.0, 4.0, 6.0], "small": [1.0, 2.0, 30.0]}, "dense")
        {'dense': 1.0, 'small': 2.0}
    """
    reference = statistics.median(times[baseline])
    return {name: reference / statistics.median(values) for name, values in times.items()}


@contextmanager
def using_threads(count: int) -> Generator[None]:
    """Limit PyTorch to ``count`` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _turns(call: Callable[[], object], seconds: float) -> int:
    call()
    return min(max(round(seconds / _timed(call)), MIN_TURNS), MAX_TURNS)


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
