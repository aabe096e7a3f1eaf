"""The form of a layer in an ONNX file, chosen by predicted time.

A layer is one LSTM operator, whose weights are dense once a runtime has loaded the file, or a Scan over time, whose steps
multiply by the factors. A step of a Scan runs some twenty small operators, so it is faster only where the matrices are
large and the factors small. ``python recipes/onnx_forms.py`` measures both forms in ONNX Runtime and fits :data:`COSTS`.
Shapes as in :mod:`slimlstm.ops.weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.onnx.scan import dtype_of
from slimlstm.ops.weights import Direction, Matrix, columns, is_clipped, rows

LSTM, SCAN = "lstm", "scan"
FORMS = ("auto", LSTM, SCAN)
"""Values of ``form=``."""
STEPS = (1, 100)
"""Numbers of time steps for which calls are predicted, with one sequence on one thread."""
MARGIN = 0.9
"""A Scan is chosen if its predicted time is at most this fraction of the operator's, at every number of steps."""

COSTS: Mapping[str, float] = {
    "operator_call": 9.23,
    "operator_step": 0.0754,
    "operator_unit": 0.0,
    "scan_call": 10.3,
    "scan_step": 2.52,
    "scan_unit": 0.0153,
    "float_product": 0.564,
    "integer_product": 3.29,
    "integer_input": 0.0,
    "float_weight": 2.8e-05,
    "integer_weight": 2.65e-05,
    "byte_beyond_cache": 6.04e-05,
    "cache_bytes": 1050000.0,
}
"""Microseconds, from ``results/onnx_forms.json``, for a call of one direction, a step, and a hidden unit in a step; for a
product, an input that an integer product rounds, and a weight of a product; and for a byte of weights that the cache cannot
keep from step to step. ``cache_bytes`` is the size of this cache."""


class Form(NamedTuple):
    """The form of a layer.

    Attributes:
        name: ``"lstm"`` or ``"scan"``.
        reason: why this form was chosen, in words.
        is_integer: whether a Scan multiplies by int8 weights as integers, instead of widening them when it is loaded.
    """

    name: str
    reason: str
    is_integer: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def check_form(form: object) -> None:
    """Raise :class:`SlimLSTMError` unless a form is one of :data:`FORMS`."""
    if form not in FORMS:
        raise SlimLSTMError(f"form={form!r} is none of {', '.join(map(repr, FORMS))}")


def choose_form(directions: Sequence[Direction], form: str = "auto") -> Form:
    """Return the form of a layer.

    Args:
        directions: the weights.
        form: ``"lstm"`` for the operator; ``"scan"`` for a Scan, which multiplies by int8 weights as integers; ``"auto"``
            for the one that the costs predict to be faster.

    Raises:
        SlimLSTMError: ``form`` is unknown, or ``"lstm"`` for a layer that the operator cannot compute.

    Examples:
        >>> from slimlstm import LowRankLSTM
        >>> ranks = {"weight_ih_l0": 4, "weight_hh_l0": 4}
        >>> [choose_form(LowRankLSTM(size, size, ranks=ranks).layers()[0]).name for size in (32, 512)]
        ['lstm', 'scan']
    """
    check_form(form)
    obstacle = _obstacle(directions)
    if form == LSTM and obstacle:
        raise SlimLSTMError(f"form='lstm' is not possible, because {obstacle}; give form='scan' or 'auto'")
    if form != "auto":
        return Form(form, "as asked for", is_integer=form == SCAN)
    if not obstacle and not any(_gains(weights) for weights in directions):
        return Form(LSTM, "no factors and no integers that a Scan could multiply by")
    scans = {is_integer: predicted(directions, SCAN, is_integer) for is_integer in {False, _has_int8(directions)}}
    is_integer = min(scans, key=lambda kind: sum(scans[kind]))
    if obstacle:
        return Form(SCAN, obstacle, is_integer)
    ratios = [scan / operator for scan, operator in zip(scans[is_integer], predicted(directions, LSTM), strict=True)]
    times = " and ".join(f"{ratio:.2g} times" for ratio in ratios)
    is_faster = max(ratios) <= MARGIN
    reason = (
        f"a Scan {'takes' if is_faster else 'would take'} {times} the operator's time at {STEPS[0]} and {STEPS[1]} steps, "
        "by the measured costs"
    )
    return Form(SCAN, reason, is_integer) if is_faster else Form(LSTM, reason)


def predicted(directions: Sequence[Direction], name: str, is_integer: bool = False) -> list[float]:
    """Return the predicted microseconds of a layer in a form, for each number of :data:`STEPS`.

    Args:
        directions: the weights.
        name: ``"lstm"`` or ``"scan"``.
        is_integer: whether a Scan multiplies by int8 weights as integers.
    """
    found: list[float] = []
    for steps in STEPS:
        of_all = [counts(one, name, is_integer, steps, COSTS["cache_bytes"]) for one in directions]
        found.append(sum(COSTS[kind] * count for one in of_all for kind, count in one.items()))
    return found


def counts(weights: Direction, name: str, is_integer: bool, steps: int, cache: float) -> dict[str, float]:
    """Return how often each of :data:`COSTS` arises in a call of one direction.

    Args:
        weights: the direction's weights.
        name: ``"lstm"`` or ``"scan"``.
        is_integer: whether a Scan multiplies by int8 weights as integers.
        steps: the number of time steps T.
        cache: the bytes of weights that stay in the cache.
    """
    hidden = rows(weights.hh) // 4
    kind = "operator" if name == LSTM else "scan"
    found = {f"{kind}_call": 1.0, f"{kind}_step": steps, f"{kind}_unit": steps * hidden}
    recurrent: list[tuple[Matrix, str]] = [(weights.hh, weights.hh_storage)]
    if weights.hr is not None:
        recurrent.append((weights.hr, weights.hh_storage))
    for matrices, is_recurrent in ([(weights.ih, weights.ih_storage)], False), (recurrent, True):
        size = 0
        for matrix, storage in matrices:
            kind = "integer" if name == SCAN and is_integer and storage == "int8" else "float"
            for m, n in _factor_shapes(matrix, name):
                size += m * n * (1 if kind == "integer" else 4)
                _add(found, f"{kind}_weight", steps * m * n)
                if name == SCAN:
                    _add(found, f"{kind}_product", steps if is_recurrent else 1)
                if kind == "integer":
                    _add(found, "integer_input", steps * n)
        _add(found, "byte_beyond_cache", max(0.0, size - cache) * (steps if is_recurrent else 1))
    return found


def _add(found: dict[str, float], kind: str, count: float) -> None:
    found[kind] = found.get(kind, 0.0) + count


def _factor_shapes(matrix: Matrix, name: str) -> list[tuple[int, int]]:
    if name == LSTM or isinstance(matrix, Tensor):
        return [(rows(matrix), columns(matrix))]
    return [(part.shape[0], part.shape[1]) for part in matrix]


def _has_int8(directions: Sequence[Direction]) -> bool:
    return any("int8" in (one.ih_storage, one.hh_storage) for one in directions)


def _gains(weights: Direction) -> bool:
    """Return whether a Scan could multiply by fewer or smaller numbers than the operator."""
    return not isinstance(weights.ih, Tensor) or not isinstance(weights.hh, Tensor) or _has_int8([weights])


def _obstacle(directions: Sequence[Direction]) -> str:
    """Return why ONNX's operator cannot compute a layer; "" where it can."""
    if any(weights.hr is not None for weights in directions):
        return "the LSTM operator has no projections"
    if is_clipped(directions):
        return "the LSTM operator clips gates, not cells"
    return "" if dtype_of(directions) == torch.float32 else "ONNX Runtime has the LSTM operator for float32 only"
