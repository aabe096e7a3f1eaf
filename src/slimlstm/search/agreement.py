"""Measure the disagreement of a compressed model's outputs with the uncompressed model's, as one number from 0 up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimlstm.errors import SlimLSTMError

Outputs = Sequence[Sequence[NDArray[Any]]]
"""For each run the outputs, in the order of their names."""


def argmax_disagreement(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Return the share of rows whose largest entry is at another place; for integers, the share of unequal entries."""
    if not np.issubdtype(expected.dtype, np.floating):
        return float((expected != found).mean())
    return float((expected.argmax(-1) != found.argmax(-1)).mean())


def cosine_distance(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Return 1 minus the mean cosine between the rows along the last axis; a row of zeros agrees only with zeros."""
    one, other = expected.astype(np.float64), found.astype(np.float64)
    norms = np.linalg.norm(one, axis=-1), np.linalg.norm(other, axis=-1)
    product = norms[0] * norms[1]
    cosines = np.where(product > 0, (one * other).sum(-1) / np.where(product > 0, product, 1.0), norms[0] == norms[1])
    return float(1.0 - cosines.mean())


def noise_share(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Return ‖found - expected‖² / ‖expected‖²; 1% is a signal-to-noise ratio of 20 dB."""
    one, difference = expected.astype(np.float64), found.astype(np.float64) - expected.astype(np.float64)
    power, noise = float((one**2).sum()), float((difference**2).sum())
    return noise / power if power > 0 else float(noise > 0)


MEASURES: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "argmax": argmax_disagreement,
    "cosine": cosine_distance,
    "noise": noise_share,
}
"""Every measure, by the name that users give."""


def measure_of(outputs: Sequence[NDArray[Any]]) -> str:
    """Return the measure that fits an output, from its values in all runs.

    ``"argmax"`` fits integers, labels, probabilities and log-probabilities, ``"cosine"`` other vectors, and ``"noise"``
    everything else.

    Examples:
        >>> measure_of([np.array([[0.25, 0.75]])]), measure_of([np.array([[3.0, -1.0]])]), measure_of([np.array([[2.0]])])
        ('argmax', 'cosine', 'noise')
    """
    if not all(np.issubdtype(value.dtype, np.floating) for value in outputs):
        return "argmax"
    if not all(value.ndim > 0 and value.shape[-1] > 1 for value in outputs):
        return "noise"
    is_distribution = all(
        ((value >= 0).all() and np.allclose(value.sum(-1), 1.0, atol=1e-3))
        or ((value <= 0).all() and np.allclose(np.exp(value.astype(np.float64)).sum(-1), 1.0, atol=1e-3))
        for value in outputs
    )
    return "argmax" if is_distribution else "cosine"


def measures_of(expected: Outputs, names: Sequence[str], measure: str = "auto") -> dict[str, str]:
    """Return the measure of each output by its name.

    Args:
        expected: the outputs of the uncompressed file in every run.
        names: the names of the outputs.
        measure: a key of :data:`MEASURES` for all outputs, or ``"auto"`` to choose one for each.

    Raises:
        SlimLSTMError: the measure is unknown or does not fit an output, or an output is no array or not finite.
    """
    if measure != "auto" and measure not in MEASURES:
        raise SlimLSTMError(f"the measure is one of {', '.join(map(repr, ('auto', *MEASURES)))}, not {measure!r}")
    chosen: dict[str, str] = {}
    for index, name in enumerate(names):
        values = [run[index] for run in expected]
        other = next((value for value in values if not isinstance(value, np.ndarray)), None)  # pyright: ignore
        if other is not None:
            raise SlimLSTMError(
                f"the output {name} is a {type(other).__name__} and not an array, so no measure compares it; give a metric "
                "of your own"
            )
        if any(np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all() for value in values):
            raise SlimLSTMError(f"the output {name} of the uncompressed file is not finite; check the inputs")
        chosen[name] = measure_of(values) if measure == "auto" else measure
        if chosen[name] != "noise" and any(value.ndim == 0 and value.dtype.kind == "f" for value in values):
            raise SlimLSTMError(
                f"the output {name} is a single number, and {chosen[name]!r} compares rows of numbers; use the measure "
                "'noise'"
            )
    if not any(value.size for run in expected for value in run):
        raise SlimLSTMError("the outputs hold no numbers in any run, so nothing can be compared; give longer inputs")
    return chosen


def disagreement(expected: Outputs, found: Outputs, measures: Sequence[str]) -> float:
    """Return the largest disagreement of any output, each averaged over the runs.

    It is infinite if the shapes of an output differ, or a number is not finite.

    Args:
        expected: the outputs of the uncompressed file in every run.
        found: the outputs of the compressed file in the same runs.
        measures: the measure of every output, keys of :data:`MEASURES`.

    Examples:
        >>> one, other = [[np.array([[0.9, 0.1]])]], [[np.array([[0.2, 0.8]])]]
        >>> disagreement(one, one, ["argmax"]), disagreement(one, other, ["argmax"])
        (0.0, 1.0)
    """
    worst = 0.0
    for index, measure in enumerate(measures):
        pairs = [(one[index], other[index]) for one, other in zip(expected, found, strict=True)]
        for one, other in pairs:
            if one.shape != other.shape or (np.issubdtype(other.dtype, np.floating) and not np.isfinite(other).all()):
                return float("inf")
        # The mean over no rows would be NaN, which is never larger.
        values = [MEASURES[measure](one, other) for one, other in pairs if one.size]
        mean = float(np.mean(values)) if values else 0.0
        worst = max(worst, float("inf") if math.isnan(mean) else mean)
    return worst
