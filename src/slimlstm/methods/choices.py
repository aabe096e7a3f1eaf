"""Choose one of several sizes for every matrix, within one budget in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slimlstm.errors import SlimLSTMError


@dataclass(frozen=True)
class Option:
    """One way to keep a matrix.

    Attributes:
        rank: the rank of the factors; None for a dense matrix.
        storage: a key of :data:`slimlstm.methods.STORAGES`.
        bytes: the bytes in a file, scales included.
        loss: the loss of keeping the matrix like this, in one unit for all matrices.
    """

    rank: int | None
    storage: str
    bytes: int
    loss: float


def efficient(options: Sequence[Option]) -> list[Option]:
    """Return the options that no other beats in both bytes and loss, by increasing bytes.

    Examples:
        >>> options = [Option(1, "int8", 10, 5.0), Option(2, "int8", 20, 6.0), Option(None, "int8", 30, 1.0)]
        >>> [option.bytes for option in efficient(options)]
        [10, 30]
    """
    found: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if not found or option.loss < found[-1].loss:
            found.append(option)
    return found


def choose_options(matrices: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """Return one option for every matrix, such that all bytes fit into ``budget`` and the sum of losses is small.

    Greedily take the largest loss reduction per byte along the lower convex hull of every matrix's options, as in the
    multiple-choice knapsack problem (Sinha and Zoltners 1979, Operations Research 27(3)). Spend the bytes that remain on
    the options that the hull omits.

    Args:
        matrices: the options of every matrix, by any key.
        budget: the most bytes that all matrices may take together.

    Raises:
        SlimLSTMError: the smallest options together take more than the budget.

    Examples:
        >>> small, large = Option(1, "int4", 10, 5.0), Option(2, "int4", 20, 1.0)
        >>> found = choose_options({"a": [small, large], "b": [small, Option(2, "int4", 20, 4.0)]}, budget=30)
        >>> found["a"].rank, found["b"].rank
        (2, 1)
    """
    curves = {key: efficient(options) for key, options in matrices.items()}
    chosen = {key: curve[0] for key, curve in curves.items()}
    left = budget - sum(option.bytes for option in chosen.values())
    if left < 0:
        raise SlimLSTMError(f"a budget of {budget:,} bytes is too small; the smallest plan takes {budget - left:,}")
    for hull_only in (True, False):
        steps = {key: _hull(curve) if hull_only else curve for key, curve in curves.items()}
        while True:
            moves = [
                ((chosen[key].loss - option.loss) / (option.bytes - chosen[key].bytes), key, option)
                for key, curve in steps.items()
                for option in _next(curve, chosen[key], left, first_only=hull_only)
            ]
            if not moves:
                break
            _, key, option = max(moves, key=lambda move: move[0])
            left -= option.bytes - chosen[key].bytes
            chosen[key] = option
    return chosen


def _next(curve: Sequence[Option], now: Option, left: int, *, first_only: bool) -> list[Option]:
    """Return the larger options of an efficient curve that fit; only the next one where ``first_only``."""
    larger = [option for option in curve if option.bytes > now.bytes and option.loss < now.loss]
    return [option for option in (larger[:1] if first_only else larger) if option.bytes - now.bytes <= left]


def _hull(curve: Sequence[Option]) -> list[Option]:
    """Return the lower convex hull of an efficient curve."""
    hull: list[Option] = []
    for option in curve:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(first: Option, second: Option) -> float:
    """Return the loss reduction per byte from one option to a larger one."""
    return (first.loss - second.loss) / (second.bytes - first.bytes)
