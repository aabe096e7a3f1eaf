"""What a rank costs and what it keeps: break-even, a fraction of the parameters, a fraction of the energy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError


def break_even_rank(shape: tuple[int, int]) -> float:
    """mn / (m + n): at or above it the factors of an m x n matrix are no smaller than the matrix."""
    m, n = shape
    return m * n / (m + n)


def saves(shape: tuple[int, int], rank: int) -> bool:
    """Whether rank-r factors of an m x n matrix hold fewer numbers than the matrix: r (m + n) < m n."""
    m, n = shape
    return rank * (m + n) < m * n


def rank_for_fraction(shape: tuple[int, int], keep: float) -> int:
    """The largest rank whose factors hold at most ``keep`` of the m n parameters, at least 1."""
    # A whole number that rounding put just below itself is meant.
    return max(1, math.floor(keep * break_even_rank(shape) * (1 + 1e-12)))


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """The smallest rank r with Σ_{i≤r} σ_i² ≥ energy · Σ σ_i²; ``singular_values`` [k], largest first.

    Raises:
        SlimLSTMError: ``energy`` is not in (0, 1].
    """
    if not 0.0 < energy <= 1.0:
        raise SlimLSTMError(f"energy is a fraction of the squared singular values in (0, 1], not {energy!r}")
    squares = singular_values.double().square()
    if float(squares.sum()) == 0.0:
        return 1
    cumulative = squares.cumsum(0) / squares.sum()
    return min(int(torch.searchsorted(cumulative, energy)) + 1, len(squares))
