"""Latency, measured side by side: the machine's moods fall on all candidates alike, and only ratios are told."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.nn.utils import parametrize

from slimlstm.errors import SlimLSTMError


def interleaved_seconds(
    calls: Mapping[str, Callable[[], object]], *, repeats: int = 15, threads: int | None = None
) -> dict[str, list[float]]:
    """Wall-clock seconds of every call, ``repeats`` times each, taking turns; without gradients, after one warm-up round.

    ``threads`` is how many PyTorch may use meanwhile, as many as before if None.

    Masks and other parametrizations are applied once, in the warm-up round, as in a model that is shipped.

    Raises:
        SlimLSTMError: no call, or ``repeats`` below 1.
    """
    if not calls or repeats < 1:
        raise SlimLSTMError(f"{len(calls)} calls cannot be timed {repeats} times")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        with torch.no_grad(), parametrize.cached():
            for call in calls.values():
                call()
            for _ in range(repeats):
                for name, call in calls.items():
                    began = time.perf_counter()
                    call()
                    seconds[name].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads_before)
    return seconds


def median_ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Median time of ``baseline`` over that of every call: above 1 is faster than the baseline."""
    reference = statistics.median(seconds[baseline])
    return {name: reference / statistics.median(times) for name, times in seconds.items()}
