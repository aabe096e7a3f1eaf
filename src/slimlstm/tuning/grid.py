"""Train weights that have a storage such as int8, so that the model always computes with numbers that it can hold.

Gradients are taken at the rounded weights and applied to exact copies (straight-through estimator: Bengio, Léonard,
Courville 2013, arXiv 1308.3432). In this way, steps smaller than the distance of two codes add up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimlstm.methods import rounded
from slimlstm.modules.factored import FactoredModule


class Grid:
    """The trained parameters that have a storage.

    Args:
        model: the model, whose modules record the storages.
        trained: its trained parameters, by name.

    Attributes:
        exact: the unrounded weights, by name.

    Examples:
        >>> import slimlstm
        >>> model = nn.Sequential(nn.LSTM(8, 16))
        >>> _ = slimlstm.compress_(model, slimlstm.Quantize("int8", target="hh"))
        >>> list(Grid(model, dict(model.named_parameters())).exact)
        ['0.weight_hh_l0']
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        storages = {
            id(module.original(part)): storage
            for module in model.modules()
            if isinstance(module, FactoredModule)
            for name, storage in module.storages.items()
            if storage != "float32"
            for part in module.stored_parts(name)
        }
        self._trained = {
            name: (parameter, storages[id(parameter)])
            for name, parameter in trained.items()
            # Weights of another dtype cannot be rounded, and save refuses them.
            if id(parameter) in storages and parameter.dtype == torch.float32
        }
        self.exact: dict[str, Tensor] = {name: entry[0].detach().clone() for name, entry in self._trained.items()}

    @torch.no_grad()
    def leave(self) -> None:
        """Give the parameters their exact weights, for the optimizer to change."""
        for name, (parameter, _) in self._trained.items():
            parameter.copy_(self.exact[name])

    @torch.no_grad()
    def enter(self) -> None:
        """Copy the parameters' weights to ``exact``, and round the parameters."""
        for name, (parameter, storage) in self._trained.items():
            self.exact[name].copy_(parameter)
            parameter.copy_(rounded(self.exact[name], storage))
