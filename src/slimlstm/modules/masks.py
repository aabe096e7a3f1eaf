"""Masks on parameters: masked weights are zero and stay zero, while the others can still be trained."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Mask(nn.Module):
    """A parametrization that multiplies a weight by a 0/1 mask of the same shape, in training too.

    Args:
        mask: boolean, of the weight's shape; True where a weight stays.

    Attributes:
        provenance: the origin of the mask; :func:`slimlstm.compress_` and ``load`` set it.
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
    """Mask the parameter ``name`` of ``module`` from now on, through any training.

    The weights themselves stay in ``module.parametrizations[name].original``. An earlier mask is replaced.

    Args:
        module: the module that owns the parameter.
        name: the parameter's name.
        mask: boolean, of the parameter's shape; True where a weight stays.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> apply_mask(layer, "weight", torch.tensor([[True, False]]))
        >>> (layer.weight != 0).tolist()
        [[True, False]]
    """
    present = mask_of(module, name)
    if present is not None:
        present.mask = mask
    else:
        parametrize.register_parametrization(module, name, Mask(mask))
        if isinstance(module, nn.RNNBase):
            _make_copyable(module)


def mask_of(module: nn.Module, name: str) -> Mask | None:
    """Return the mask on the parameter ``name`` of ``module``, or None.

    Examples:
        >>> print(mask_of(nn.Linear(2, 1), "weight"))
        None
    """
    if not parametrize.is_parametrized(module, name):
        return None
    stack = cast(nn.ModuleDict, module.parametrizations)[name]
    return next((entry for entry in cast(nn.ModuleList, stack) if isinstance(entry, Mask)), None)


def drop_parametrizations(module: nn.Module, name: str) -> None:
    """Remove all parametrizations of the parameter ``name``, if it has any.

    The original parameter returns unchanged. Where several parameters make up the weight, their value becomes a parameter.
    """
    if parametrize.is_parametrized(module, name):
        stack = cast(nn.ModuleDict, module.parametrizations)[name]
        parametrize.remove_parametrizations(module, name, leave_parametrized=not hasattr(stack, "original"))


def _make_copyable(module: nn.RNNBase) -> None:
    """Make ``deepcopy`` work on a masked ``nn.LSTM`` after a forward pass too.

    PyTorch's LSTM caches its weights. Masked weights carry a gradient history, which ``deepcopy`` refuses. ``parametrize``
    made a class for this module alone, so changing the class affects no other module.
    """
    kind = cast(Any, type(module))
    copy = kind.__deepcopy__

    def deepcopy(self: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
        with torch.no_grad():
            self._init_flat_weights()  # pyright: ignore[reportPrivateUsage] (the cache has no public name)
        return copy(self, memo)

    kind.__deepcopy__ = deepcopy
