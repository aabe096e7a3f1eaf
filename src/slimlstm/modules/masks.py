"""Magnitude masks, the paper's baseline: the largest weights stay, the others are zero for good."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimlstm.errors import SlimLSTMError


class Mask(nn.Module):
    """A parametrization that multiplies a weight with a 0/1 mask of the same shape, also while it is trained.

    ``provenance`` says where the mask comes from; those who compress and save fill it in.
    """

    mask: Tensor
    provenance: dict[str, str]

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.provenance = {}

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def magnitude_mask(matrix: Tensor, kept: int) -> Tensor:
    """A boolean mask that keeps the ``kept`` entries of largest magnitude; of equal ones, the first in row order.

    Raises:
        SlimLSTMError: ``kept`` is not an int in [1, number of entries], or the matrix holds NaN.
    """
    size = matrix.numel()
    if bool(matrix.isnan().any()):
        raise SlimLSTMError("the matrix holds NaN, which has no magnitude; was training stable?")
    if type(kept) is not int or not 1 <= kept <= size:
        raise SlimLSTMError(f"between 1 and {size} weights of a {list(matrix.shape)} matrix can be kept, not {kept}")
    magnitudes = matrix.detach().abs().flatten()
    threshold = magnitudes.kthvalue(size - kept + 1).values
    above = magnitudes > threshold
    ties = magnitudes == threshold
    ties &= ties.cumsum(0) <= kept - above.sum()
    return (above | ties).view(matrix.shape)


def nonzeros_at_rank(shape: tuple[int, int], rank: int) -> int:
    """How many weights the factors of rank r of an m x n matrix hold: r (m + n), at most m n."""
    m, n = shape
    return min(rank * (m + n), m * n)


def apply_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Lets ``module`` see its parameter ``name`` only through ``mask``, from now on and through any training.

    The weights themselves stay in ``module.parametrizations[name].original``; a mask that is already there is replaced.
    """
    present = mask_of(module, name)
    if present is not None:
        present.mask = mask
    else:
        parametrize.register_parametrization(module, name, Mask(mask))
        if isinstance(module, nn.RNNBase):
            _let_copy(module)


def mask_of(module: nn.Module, name: str) -> Mask | None:
    """The mask of ``module``'s parameter ``name``, or None where it has none."""
    if not parametrize.is_parametrized(module, name):
        return None
    stack = cast(nn.ModuleDict, module.parametrizations)[name]
    return next((entry for entry in cast(nn.ModuleList, stack) if isinstance(entry, Mask)), None)


def _let_copy(module: nn.RNNBase) -> None:
    """Lets a masked ``nn.LSTM`` be deep-copied after a forward pass too.

    It caches its weights, and those that a mask gave carry a gradient history, which cannot be copied. ``parametrize`` made
    a class for this very module, so that no other is touched.
    """
    kind = cast(Any, type(module))
    copy = kind.__deepcopy__

    def deepcopy(self: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
        with torch.no_grad():
            self._init_flat_weights()  # pyright: ignore[reportPrivateUsage] (the cache has no public name)
        return copy(self, memo)

    kind.__deepcopy__ = deepcopy
