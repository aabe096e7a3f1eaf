"""Check the outputs of candidates for one layer, then time the right ones side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimlstm.bench.timing import SECONDS, interleaved_seconds, using_threads
from slimlstm.errors import reason_of

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 5e-2}
"""The largest accepted error by precision: the norm of the error over the norm of the float64 output."""


class Candidate(NamedTuple):
    """An engine that runs a layer.

    Attributes:
        ours: whether the engine is slimlstm's.
        precision: "float32", "bfloat16" or "int8".
        model: the name of the weights that it computes with, such as "dense".
        call: runs the layer and returns its output.
    """

    ours: bool
    precision: str
    model: str
    call: Callable[[], Tensor]


def check_and_time(
    candidates: Mapping[str, Candidate],
    exact: Mapping[str, Tensor],
    refused: Mapping[str, str],
    *,
    threads: int = 1,
    seconds: float = SECONDS,
    tolerance: Mapping[str, float] = TOLERANCE,
) -> dict[str, Any]:
    """Check each candidate's output against the exact output of its model, then time all that are right.

    Args:
        candidates: the engines by name.
        exact: the float64 output for each model, by the model's name.
        refused: engines that are known not to run, with the reason.
        threads: the number of PyTorch's threads.
        seconds: about how long each candidate is timed.
        tolerance: the largest accepted relative error, by precision.

    Returns:
        ``candidates``: for each candidate its median ``microseconds``, ``quartiles``, ``error`` and ``turns``. Ours also
        have ``faster``: the best rival of the same precision with the dense model, and with the same model, and how many
        times faster ours is. ``refused``: all other candidates, with the reason.
    """
    errors, wrong = _check(candidates, exact, tolerance, threads)
    right = {name: one for name, one in candidates.items() if name in errors and name not in wrong}
    calls = {name: one.call for name, one in right.items()}
    times = interleaved_seconds(calls, seconds=seconds, threads=threads) if calls else {}
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows: dict[str, Any] = {}
    for name, one in right.items():
        quartiles = [1e6 * value for value in statistics.quantiles(times[name], n=4, method="inclusive")[::2]]
        rows[name] = {"ours": one.ours, "precision": one.precision, "model": one.model, "error": errors[name]}
        rows[name] |= {"microseconds": 1e6 * medians[name], "quartiles": quartiles, "turns": len(times[name])}
        if one.ours:
            rows[name]["faster"] = _against_rivals(name, one, right, medians)
    return {"candidates": rows, "refused": dict(refused) | wrong}


def _check(
    candidates: Mapping[str, Candidate], exact: Mapping[str, Tensor], tolerance: Mapping[str, float], threads: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the relative errors of all candidates that run, and the reasons why others fail or are wrong."""
    errors: dict[str, float] = {}
    wrong: dict[str, str] = {}
    with using_threads(threads), torch.no_grad():
        for name, one in candidates.items():
            truth = exact[one.model]
            try:
                output = one.call()
            except Exception as error:  # each library raises classes of its own
                if one.ours:
                    raise
                wrong[name] = reason_of(error)
                continue
            errors[name] = float((output.reshape(truth.shape) - truth).norm() / truth.norm().clamp_min(1e-30))
            if not errors[name] <= tolerance[one.precision]:
                wrong[name] = f"wrong by {errors[name]:.2g} of the output's norm"
    return errors, wrong


def _against_rivals(
    name: str, one: Candidate, candidates: Mapping[str, Candidate], medians: Mapping[str, float]
) -> dict[str, Any]:
    """Return the best rival with the dense model, and with the same model, and its time over the time of one of ours."""
    # bfloat16 has no rivals of its own here.
    precision = "int8" if one.precision == "int8" else "float32"
    found: dict[str, Any] = {}
    for what, model in {"dense": "dense", "same model": one.model}.items():
        rivals = [
            other
            for other, rival in candidates.items()
            if (rival.ours, rival.precision, rival.model) == (False, precision, model)
        ]
        if rivals and (what == "dense" or model != "dense"):
            best = min(rivals, key=medians.__getitem__)
            found[what] = {"than": best, "ratio": medians[best] / medians[name]}
    return found
