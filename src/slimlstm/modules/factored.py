"""Modules whose matrices are either dense or products of two thin factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import STORAGES, rounded
from slimlstm.ops.dense import rebuilt
from slimlstm.ops.weights import Direction, Layer, Matrix, flat

Provenance = dict[str, str]
"""Where the numbers of a compressed matrix come from: the ``method`` and the ``source_sha256`` of the dense matrix."""


class FactoredModule(nn.Module):
    """Keeps every matrix ``name`` either as one parameter ``name`` or as two, ``name_u`` [m, r] and ``name_v`` [r, n]."""

    matrix_shapes: dict[str, tuple[int, int]]
    """The recurrent matrices that may be factored, and their shapes."""
    provenance: dict[str, Provenance]
    """Where the factors come from, by matrix; filled in by those who compress and save."""
    cell_clip: float | None = None
    proj_clip: float | None = None
    storages: dict[str, str]
    """What the fused kernel keeps a matrix in, by matrix, "float32" where none is given; see :meth:`store`."""

    def matrix(self, name: str) -> Matrix:
        """The matrix ``name`` as it is kept: W, or (U, V). Masks and other parametrizations are applied."""
        if name in self._parameters:
            return self._weight(name)
        if f"{name}_v" in self._parameters or name in self.ranks:
            return self._weight(f"{name}_u"), self._weight(f"{name}_v")
        return getattr(self, name)

    _kept: tuple[list[nn.Parameter], dict[str, str], tuple[float | None, float | None], list[Layer]] | None = None

    def layers(self) -> Sequence[Sequence[Direction]]:
        """The weights of all layers: the same objects as long as the parameters and storages are the same."""
        kept, parameters = self._kept, self._parameters
        if kept is not None and not torch.compiler.is_compiling():
            known, storages, bounds, layers = kept
            same = len(known) == len(parameters) and all(map(is_, known, parameters.values()))
            if same and storages == self.storages and bounds == (self.cell_clip, self.proj_clip):
                return layers
        made, present = self._make_layers(), set(map(id, parameters.values()))
        # What is computed from parameters, as masked weights are, may be another the next time.
        if torch.compiler.is_compiling() or any(
            id(weight) not in present for one in made for weight in flat(one) if weight is not None
        ):
            return made
        layers = [Layer(one) for one in made]
        known = [parameter for parameter in parameters.values() if parameter is not None]
        self._kept = known, dict(self.storages), (self.cell_clip, self.proj_clip), layers
        return layers

    def _make_layers(self) -> list[list[Direction]]:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_kept", None)
        return state

    def _weight(self, name: str) -> Tensor:
        # Every streamed step asks for every weight, and PyTorch's getattr is slow for parameters.
        parameter = self._parameters.get(name)
        return getattr(self, name) if parameter is None else parameter

    def store(self, name: str, storage: str) -> None:
        """Has the fused kernel keep the matrix ``name`` in ``storage``: "float32", "bfloat16" or "int8".

        The parameters stay what they are, rounded to what the storage holds, so that every backend computes with the same
        weights. Of a projected layer, ``weight_hr`` is kept as ``weight_hh``.

        Raises:
            SlimLSTMError: there is no such matrix or storage, or it is not float32 that would be rounded.
        """
        if name not in self.matrix_shapes:
            raise SlimLSTMError(f"there is no matrix {name!r} to store; there are {', '.join(self.matrix_shapes)}")
        with torch.no_grad():
            weights = [(self.original(part), rounded(self._weight(part), storage)) for part in self.stored_parts(name)]
            for original, weight in weights:
                original.copy_(weight)
        self.storages[name] = storage

    def kernel_format(self, name: str) -> str:
        """Return the format that the fused kernel packs the matrix ``name`` in: "float32", "bfloat16" or "int8"."""
        return STORAGES[self.storages.get(name, "float32")].kernel_format

    def stored_parts(self, name: str) -> list[str]:
        """The names of the weights that are kept as the matrix ``name`` is: itself or its factors, and the projection."""
        projection = name.replace("weight_hh", "weight_hr")
        parts = [f"{name}_u", f"{name}_v"] if name in self.ranks else [name]
        return parts + ([projection] if projection != name and projection in self._parameters else [])

    def original(self, name: str) -> Tensor:
        """The parameter that the weight ``name`` is, or that a mask is laid on.

        Raises:
            SlimLSTMError: the weight is computed from several parameters.
        """
        try:
            return self.get_parameter(name if name in self._parameters else f"parametrizations.{name}.original")
        except AttributeError as error:
            raise SlimLSTMError(f"{name} is computed from several parameters; remove its parametrization first") from error

    def product(self, name: str) -> Tensor:
        """The matrix ``name`` [m, n], factors multiplied."""
        return rebuilt(self.matrix(name))

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every factored matrix, by name."""
        factors = {name: getattr(self, f"{name}_v", None) for name in self.matrix_shapes}
        return {name: len(v) for name, v in factors.items() if v is not None}

    def set_factors(self, name: str, u: Tensor, v: Tensor) -> None:
        """Puts U [m, r] and V [r, n] in the place of the matrix ``name``; parameters are taken as they are.

        The kernel keeps them in float32, whatever the matrix was stored in.

        Raises:
            SlimLSTMError: there is no such matrix, or the factors do not multiply to its shape.
        """
        if name not in self.matrix_shapes:
            raise SlimLSTMError(f"there is no matrix {name!r} to factor; there are {', '.join(self.matrix_shapes)}")
        m, n = self.matrix_shapes[name]
        if u.ndim != 2 or v.ndim != 2 or u.shape[0] != m or v.shape[1] != n or not 0 < u.shape[1] == v.shape[0]:
            raise SlimLSTMError(f"factors of {list(u.shape)} and {list(v.shape)} do not make {name}, which is {m} x {n}")
        if nn.utils.parametrize.is_parametrized(self, name):
            nn.utils.parametrize.remove_parametrizations(self, name)
        if hasattr(self, name):
            delattr(self, name)
        for ending, factor in (("_u", u), ("_v", v)):
            self.register_parameter(name + ending, as_parameter(factor))
        self.storages.pop(name, None)

    def reset_parameters(self) -> None:
        """Draws all weights anew: as ``nn.LSTM`` does, factors so that their product has the same variance."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for name, rank in self.ranks.items():
            factor_bound = math.sqrt(bound * math.sqrt(3.0 / rank))
            for factor in (getattr(self, f"{name}_u"), getattr(self, f"{name}_v")):
                nn.init.uniform_(factor, -factor_bound, factor_bound)
        factor_names = {f"{name}_{ending}" for name in self.ranks for ending in "uv"}
        for name, parameter in self.named_parameters():
            if name not in factor_names:
                nn.init.uniform_(parameter, -bound, bound)

    hidden_size: int

    def _allocate(self, name: str, shape: tuple[int, ...], rank: int | None, **factory: Any) -> None:
        if rank is None:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
            return
        m, n = shape
        if not 1 <= rank <= min(m, n):
            raise SlimLSTMError(f"the rank of {name}, {m} x {n}, has to be from 1 to {min(m, n)}, not {rank}")
        self.register_parameter(f"{name}_u", nn.Parameter(torch.empty(m, rank, **factory)))
        self.register_parameter(f"{name}_v", nn.Parameter(torch.empty(rank, n, **factory)))

    def _take_over(self, dense: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]] | None) -> None:
        """Takes the parameters of ``dense`` that are not factored as they are, and the factors of the others."""
        factors = factors or {}
        for name, parameter in dense.named_parameters():
            if name in factors:
                continue
            if name not in self._parameters:
                raise SlimLSTMError(f"{type(dense).__name__} has a parameter {name!r} that a plain LSTM does not have")
            self.register_parameter(name, parameter)
        for name, (u, v) in factors.items():
            self.set_factors(name, u, v)
        self.train(dense.training)

    def _fill(self, dense: nn.Module) -> None:
        """Copies this module's weights into ``dense``, factors multiplied."""
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter.copy_(self.product(name) if name in self.matrix_shapes else getattr(self, name))
        dense.train(self.training)

    def _check_ranks(self, ranks: Mapping[str, int]) -> None:
        unknown = [name for name in ranks if name not in self.matrix_shapes]
        if unknown:
            raise SlimLSTMError(f"ranks name {', '.join(unknown)}, but there are only {', '.join(self.matrix_shapes)}")


def as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().contiguous())
