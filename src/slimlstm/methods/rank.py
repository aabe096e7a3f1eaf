"""Ranks: break-even, by a fraction of the parameters or of the energy, and by a budget that several matrices share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError

RANKS_OF_SPECTRUM = 32
"""Number of equal steps, from rank 0 to the full rank, at which reports give a spectrum."""


def break_even_rank(shape: tuple[int, int]) -> float:
    """Return mn / (m + n): at or above this rank the factors of an m x n matrix are no smaller than the matrix.

    Examples:
        >>> break_even_rank((4600, 1150))
        920.0
    """
    m, n = shape
    return m * n / (m + n)


def is_smaller(shape: tuple[int, int], rank: int) -> bool:
    """Return whether the factors of rank r of an m x n matrix hold fewer numbers than the matrix: r (m + n) < m n."""
    m, n = shape
    return rank * (m + n) < m * n


def rank_for_fraction(shape: tuple[int, int], keep: float) -> int:
    """Return the largest rank whose factors hold at most ``keep`` of the m n parameters, at least 1.

    Examples:
        >>> rank_for_fraction((400, 100), keep=0.25)
        20
    """
    # Tolerate rounding just below an integer.
    return max(1, math.floor(keep * break_even_rank(shape) * (1 + 1e-12)))


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """Return the smallest rank r with Σ_{i≤r} σ_i² ≥ energy · Σ σ_i²; ``singular_values`` [k], largest first.

    Raises:
        SlimLSTMError: ``energy`` is not in (0, 1].
    """
    if not 0.0 < energy <= 1.0:
        raise SlimLSTMError(f"energy is a fraction of the squared singular values in (0, 1], not {energy!r}")
    return rank_for_share(singular_values.double().square(), energy)


def rank_for_share(parts: Tensor, fraction: float) -> int:
    """Return the smallest r with Σ_{i≤r} p_i ≥ fraction · Σ p_i for p [k] ≥ 0, largest first; at least 1."""
    if float(parts.sum()) == 0.0:
        return 1
    cumulative = parts.double().cumsum(0) / parts.double().sum()
    return min(int(torch.searchsorted(cumulative, fraction)) + 1, len(parts))


def shares_left_out(losses: Tensor, rank: int | None = None) -> tuple[tuple[int, float], ...]:
    """Return pairs (rank, share of all losses that the directions beyond this rank hold), at some ranks from 0 to k.

    Args:
        losses: [k], the loss of leaving out each direction, largest first.
        rank: a rank to include, in addition to at most :data:`RANKS_OF_SPECTRUM` + 1 evenly spaced ones.

    Examples:
        >>> shares_left_out(torch.tensor([3.0, 1.0]))
        ((0, 1.0), (1, 0.25), (2, 0.0))
    """
    count = len(losses)
    left = losses_of_ranks(losses.double()).tolist()
    ranks = {round(index * count / RANKS_OF_SPECTRUM) for index in range(RANKS_OF_SPECTRUM + 1)} | {rank or 0}
    return tuple((at, left[at] / (left[0] or 1.0)) for at in sorted(ranks))


def losses_of_ranks(losses: Tensor) -> Tensor:
    """Return [k + 1], the losses of ranks 0, 1, ..., k: the sums of the losses of all directions beyond each rank.

    Args:
        losses: [k], the loss of leaving out each direction, largest first.

    Examples:
        >>> losses_of_ranks(torch.tensor([3.0, 1.0]))
        tensor([4., 1., 0.])
    """
    return torch.cat([losses.flip(0).cumsum(0).flip(0), losses.new_zeros(1)])


@dataclass(frozen=True)
class RankCosts:
    """Loss and cost of every rank of one matrix, for :func:`allocate`.

    Attributes:
        losses: [k + 1], the losses of ranks 0, 1, ..., k; decreasing and convex, as sums of the smallest σ² are.
        cost: the cost of one rank more, in the unit of the budget.
        whole: the cost of the matrix as it is, which loses nothing; without ``fixed``.
        fixed: a further cost that is the same at every rank and for the matrix as it is.
    """

    losses: Sequence[float]
    cost: float
    whole: float
    fixed: float = 0.0


def allocate(matrices: Mapping[str, RankCosts], budget: float) -> dict[str, int | None]:
    """Return ranks with a small sum of losses whose costs fit into ``budget``; None where a matrix stays whole.

    Greedily take the largest loss reduction per unit of cost, as long as it fits: one rank more for a matrix, which alone
    is optimal for convex losses (Fox 1966, Operations Research 14(2)), or a whole matrix instead of its factors. Every
    matrix gets at least rank 1. Ranks at or above break-even, and ranks that reduce no loss, are never taken.

    Args:
        matrices: losses and costs of every matrix, by any key.
        budget: the most that all matrices may cost together, in the unit of the costs.

    Raises:
        SlimLSTMError: rank 1 for every matrix costs more than the budget.

    Examples:
        >>> steep, flat = RankCosts([9.0, 4.0, 0.0], 1, 3), RankCosts([9.0, 1.0, 0.5], 1, 3)
        >>> allocate({"steep": steep, "flat": flat}, budget=3)
        {'steep': 2, 'flat': 1}
    """
    ranks = {key: 1 if costs.cost < costs.whole else None for key, costs in matrices.items()}
    left = budget - sum(costs.fixed + min(costs.cost, costs.whole) for costs in matrices.values())
    if left < 0:
        raise SlimLSTMError(
            f"a budget of {budget:g} is too small for rank 1 at every matrix, which takes {budget - left:g}"
        )
    while True:
        moves = [move for key, costs in matrices.items() for move in _moves(key, costs, ranks[key]) if move[1] <= left]
        gain, cost, key, rank = max(moves, default=(0.0, 0.0, "", None), key=lambda move: move[0])
        if gain <= 0.0:
            return ranks
        ranks[key], left = rank, left - cost


def _moves(key: str, costs: RankCosts, rank: int | None) -> list[tuple[float, float, str, int | None]]:
    """Return the possible next steps for one matrix, as (loss reduction per unit of cost, cost, key, new rank)."""
    if rank is None:
        return []
    loss, missing = costs.losses[rank], costs.whole - rank * costs.cost
    moves: list[tuple[float, float, str, int | None]] = [(loss / missing, missing, key, None)]
    if rank + 1 < len(costs.losses) and costs.cost < missing:
        moves.append(((loss - costs.losses[rank + 1]) / costs.cost, costs.cost, key, rank + 1))
    return moves
