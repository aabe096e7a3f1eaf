"""Read the recurrent matrices of one module.

A *host* is a module that holds sites: ``nn.LSTM`` and ``nn.LSTMCell``, with or without weight drop or other
parametrizations, and every :class:`slimlstm.modules.FactoredModule`. A subclass of ``nn.LSTM`` with an attribute
``cell_clip`` or ``proj_clip`` that is not None is assumed to clip its cells or its projected outputs to this bound, as
ELMo's LSTMs do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimlstm.modules.factored import FactoredModule, Provenance, provenance_of
from slimlstm.modules.masks import Mask, mask_of
from slimlstm.modules.modes import evaluation_mode, plain_mode
from slimlstm.modules.shapes import cell_matrix_shapes, lstm_arguments, lstm_matrix_shapes
from slimlstm.modules.sites import SITE_NAME, Site
from slimlstm.modules.weight_drop import RAW
from slimlstm.ops.weights import Matrix, rebuilt


@dataclass
class Host:
    """A module that holds sites.

    Attributes:
        paths: all dotted paths of ``module`` in the model.
        module: the module that compression replaces: ``lstm``, or the weight-drop wrapper around it.
        lstm: the module that holds the matrices.
        problem: why its matrices cannot be compressed, or None.
        notes: what compression changes beside the matrices, in words.
    """

    paths: list[str]
    module: nn.Module
    lstm: nn.Module
    problem: str | None = None
    notes: list[str] = field(default_factory=list[str])

    def sites(self) -> list[Site]:
        """Return the host's sites, in the order of its parameters."""
        ranks = self.lstm.ranks if isinstance(self.lstm, FactoredModule) else {}
        return [
            Site(
                self.paths[0],
                name,
                shape,
                ranks.get(name),
                self._nonzeros(name),
                self.problem,
                self._storage(name),
                self.origin(name).get("method"),
            )
            for name, shape in matrix_shapes(self.lstm).items()
        ]

    def origin(self, name: str) -> Provenance:
        """Return the origin of the factors or the mask of a matrix; empty where it has neither."""
        return provenance_of(self.lstm, name)

    @plain_mode()
    def matrix(self, name: str) -> Tensor:
        """Return the matrix [m, n] that inference uses: factors multiplied, masks applied, nothing dropped."""
        return rebuilt(self.weight(name))

    @plain_mode()
    def weight(self, name: str) -> Matrix:
        """Return the matrix [m, n] that inference uses, or its factors where it is factored."""
        with torch.no_grad(), evaluation_mode(self.module):
            lstm = self.lstm
            matrix = lstm.matrix(name) if isinstance(lstm, FactoredModule) else self._weight(name)
        return matrix.detach() if isinstance(matrix, Tensor) else (matrix[0].detach(), matrix[1].detach())

    def projection(self, name: str) -> Tensor | None:
        """Return the projection weight_hr [P, H] that has the storage of the matrix ``name``, or None."""
        found = getattr(self.lstm, name.replace("weight_hh", "weight_hr"), None) if "weight_hh" in name else None
        return found.detach() if isinstance(found, Tensor) else None

    def parameter(self, name: str) -> Tensor:
        """Return the parameter of a weight; the first one where it is computed from several; U where it is factored."""
        if isinstance(self.lstm, FactoredModule) and name in self.lstm.ranks:
            return getattr(self.lstm, f"{name}_u")
        if self._parametrizations(name):
            originals = self.lstm.get_submodule(f"parametrizations.{name}")
            return getattr(originals, "original" if hasattr(originals, "original") else "original0")
        return self._weight(name)

    @plain_mode()
    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of an equivalent ``nn.LSTM``, by name.

        These are the host's own parameters where they are the weights themselves, or the weights below a mask. Elsewhere
        they are new parameters with the weights that inference uses.
        """
        parameters: dict[str, nn.Parameter] = {}
        with torch.no_grad(), evaluation_mode(self.module):
            for name in parameter_names(self.lstm):
                own = self.parameter(name)
                if self.is_computed(name) or not isinstance(own, nn.Parameter):
                    own = nn.Parameter(self._weight(name).detach().clone(), self.is_trained(name))
                parameters[name] = own
        return parameters

    def identity(self, name: str) -> int:
        """Return a number that is equal for two sites that share one parameter."""
        if self._parametrizations(name):
            originals = self.lstm.get_submodule(f"parametrizations.{name}")
            return id(getattr(originals, "original", originals))
        return id(self.parameter(name))

    def mask(self, name: str) -> Mask | None:
        """Return the magnitude mask on a weight, or None."""
        return mask_of(self.lstm, name)

    def is_computed(self, name: str) -> bool:
        """Return whether weight drop, or a parametrization other than a mask, computes a weight from its parameters."""
        if self._raw(name) is not None:
            return True
        return any(not isinstance(entry, Mask) for entry in self._parametrizations(name))

    def is_plain(self, name: str) -> bool:
        """Return whether a weight should be a parameter of its own name: no weight drop and no parametrization holds it."""
        return self._raw(name) is None and not self._parametrizations(name)

    def is_trained(self, name: str) -> bool:
        """Return whether any parameter of a weight requires gradients."""
        if self._parametrizations(name):
            originals = self.lstm.get_submodule(f"parametrizations.{name}").parameters(recurse=False)
            return any(parameter.requires_grad for parameter in originals)
        return self.parameter(name).requires_grad

    def _storage(self, name: str) -> str | None:
        storage = self.lstm.storages.get(name) if isinstance(self.lstm, FactoredModule) else None
        return None if storage == "float32" else storage

    def _nonzeros(self, name: str) -> int | None:
        mask = self.mask(name)
        return None if mask is None else int(mask.mask.sum())

    def _raw(self, name: str) -> Tensor | None:
        candidates = (getattr(owner, name + RAW, None) for owner in (self.module, self.lstm))
        return next((raw for raw in candidates if isinstance(raw, Tensor)), None)

    def _weight(self, name: str) -> Tensor:
        raw = self._raw(name)
        return getattr(self.lstm, name) if raw is None else raw

    def _parametrizations(self, name: str) -> list[nn.Module]:
        if not parametrize.is_parametrized(self.lstm, name):
            return []
        return list(self.lstm.get_submodule(f"parametrizations.{name}").children())


def matrix_shapes(lstm: nn.Module) -> Mapping[str, tuple[int, int]]:
    """Return the shapes of one module's recurrent matrices by name.

    Examples:
        >>> matrix_shapes(nn.LSTMCell(3, 4))
        {'weight_ih': (16, 3), 'weight_hh': (16, 4)}
    """
    if isinstance(lstm, FactoredModule):
        return lstm.matrix_shapes
    if isinstance(lstm, torch.jit.ScriptModule):
        found = ((name, tuple(parameter.shape)) for name, parameter in lstm.named_parameters())
        return {name: (shape[0], shape[1]) for name, shape in found if SITE_NAME.fullmatch(name)}
    if hasattr(lstm, "num_layers"):
        return lstm_matrix_shapes(**lstm_arguments(cast(nn.LSTM, lstm)))
    return cell_matrix_shapes(int(getattr(lstm, "input_size")), int(getattr(lstm, "hidden_size")))


def parameter_names(lstm: nn.Module) -> list[str]:
    """Return the names of all parameters of an ``nn.LSTM`` or ``nn.LSTMCell`` like this one.

    Examples:
        >>> parameter_names(nn.LSTM(3, 4, bias=False))
        ['weight_ih_l0', 'weight_hh_l0']
    """
    suffixes = [name.removeprefix("weight_ih") for name in matrix_shapes(lstm) if name.startswith("weight_ih")]
    kinds = ["weight_ih", "weight_hh"]
    kinds += ["bias_ih", "bias_hh"] if getattr(lstm, "bias", True) else []
    kinds += ["weight_hr"] if getattr(lstm, "proj_size", 0) else []
    return [kind + suffix for suffix in suffixes for kind in kinds]
