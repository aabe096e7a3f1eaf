"""Compression methods of the paper and those beyond it, and what recipes do with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

import slimlstm as sl
from slimlstm.methods import calibrated_methods
from slimlstm.modules.lstm import LowRankLSTM

PAPER = ("svd", "semi-nmf", "prune")
"""The methods that the paper compares."""
BEYOND = ("activation", "fisher")
"""Calibrated methods of this library, shown beside them."""
TUNABLE = PAPER
"""The methods whose result is fine-tuned."""
LABELS = {"activation": "activation", "fisher": "fisher"}


def compression_of(method: str, *, rank: int, target: Literal["ih", "hh", "both"], **options: Any) -> sl.LowRank | sl.Prune:
    """Return the configuration of a method at a rank; pruning leaves as many weights as factors of that rank have.

    Example:
        >>> compression_of("prune", rank=4, target="hh").rank
        4
    """
    if method == "prune":
        return sl.Prune(rank=rank, target=target, **options)
    return sl.LowRank(method, rank=rank, target=target, **options)


def is_calibrated(method: str) -> bool:
    """Return whether the method needs calibration batches."""
    return method in calibrated_methods()


def factors_by_svd_(lstms: Iterable[nn.Module]) -> None:
    """Replace factors by those of their product's SVD, in place; products stay the same.

    Non-negative rows that represent signed rows are long and nearly parallel, so a small step changes the product much.
    Factors from the SVD tolerate the learning rates of other models.
    """
    from slimlstm.methods.svd import svd

    for lstm in lstms:
        if isinstance(lstm, LowRankLSTM):
            for name, rank in lstm.ranks.items():
                factors = svd(lstm.product(name), rank)
                lstm.set_factors(name, factors.u, factors.v)
