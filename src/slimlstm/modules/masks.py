"""Masks on parameters: weights that are zero for good, also while the others are trained."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


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
