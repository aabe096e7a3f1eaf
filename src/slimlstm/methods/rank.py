"""What a rank costs and what it keeps: break-even, a fraction of the parameters, a fraction of the energy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError


def break_even_rank(shape: tuple[int, int]) -> float:
    """mn / (m + n): at or above it the factors of an m x n matrix are no smaller than the matrix."""
    m, n = shape
    return m * n / (m + n)


def is_smaller(shape: tuple[int, int], rank: int) -> bool:
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
    return rank_for_share(singular_values.double().square(), energy)


def rank_for_share(parts: Tensor, fraction: float) -> int:
    """The smallest r with Σ_{i≤r} p_i ≥ fraction · Σ p_i for p [k] ≥ 0, largest first; at least 1."""
    if float(parts.sum()) == 0.0:
        return 1
    cumulative = parts.double().cumsum(0) / parts.double().sum()
    return min(int(torch.searchsorted(cumulative, fraction)) + 1, len(parts))


@dataclass(frozen=True)
class RankCosts:
    """What the ranks of one matrix cost and lose.

    Attributes:
        losses: [k + 1], the losses of ranks 0, 1, ..., k; falling and convex, as what singular values leave out is.
        cost: of one rank, in the unit of the budget.
        whole: the cost of the matrix as it is, which loses nothing.
        fixed: what the matrix costs besides, at any rank and as it is.
    """

    losses: Sequence[float]
    cost: float
    whole: float
    fixed: float = 0.0


def allocate(curves: Mapping[str, RankCosts], budget: float) -> dict[str, int | None]:
    """The ranks, None for a matrix that stays as it is, whose costs fit into ``budget`` and whose losses add up to little.

    Bought is, as long as anything fits, what takes most loss away for its cost: a rank more somewhere, which alone would be
    best for convex losses (Fox 1966, Operations Research 14(2)), or a whole matrix in the place of its factors. Every
    matrix has rank 1 at least; ranks at or above break-even are never bought, nor such as take no loss away.

    Raises:
        SlimLSTMError: rank 1 everywhere is above the budget.
    """
    ranks = {key: 1 if curve.cost < curve.whole else None for key, curve in curves.items()}
    left = budget - sum(curve.fixed + min(curve.cost, curve.whole) for curve in curves.values())
    if left < 0:
        raise SlimLSTMError(
            f"a budget of {budget:g} is too small for rank 1 at every matrix, which takes {budget - left:g}"
        )
    while True:
        moves = [move for key, curve in curves.items() for move in _moves(key, curve, ranks[key]) if move[1] <= left]
        gain, cost, key, rank = max(moves, default=(0.0, 0.0, "", None), key=lambda move: move[0])
        if gain <= 0.0:
            return ranks
        ranks[key], left = rank, left - cost


def _moves(key: str, curve: RankCosts, rank: int | None) -> list[tuple[float, float, str, int | None]]:
    """What can be bought next for a matrix of this rank: loss taken away per cost, cost, and the rank then."""
    if rank is None:
        return []
    loss, missing = curve.losses[rank], curve.whole - rank * curve.cost
    moves: list[tuple[float, float, str, int | None]] = [(loss / missing, missing, key, None)]
    if rank + 1 < len(curve.losses) and curve.cost < missing:
        moves.append(((loss - curve.losses[rank + 1]) / curve.cost, curve.cost, key, rank + 1))
    return moves
