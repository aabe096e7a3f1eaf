"""Modules whose matrices are either dense or products of two thin factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from sys import getrefcount
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from slimlstm.errors import SlimLSTMError, described
from slimlstm.methods import STORAGES, rounded
from slimlstm.modules.masks import drop_parametrizations, mask_of
from slimlstm.modules.modes import plain_mode
from slimlstm.ops.packing import is_foreign, is_private
from slimlstm.ops.weights import CachedLayer, Direction, Matrix, flat, parts_of, rebuilt

_WIDEST_INT8 = (2**31 - 1) // (127 * 128)
"""Columns whose products of int8 numbers surely fit into 32 bits."""

Provenance = dict[str, str]
"""The origin of a compressed matrix: the ``method``, and the ``source_sha256`` of the dense matrix."""


@dataclass(frozen=True)
class _LayerCache:
    """The layers of a module, and everything they were made from. Copies get none: the kernel packs each module's weights
    anew."""

    parameters: list[nn.Parameter | None]
    storages: dict[str, str]
    bounds: tuple[float | None, float | None]
    layers: list[CachedLayer]
    is_foreign: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class FactoredModule(nn.Module):
    """Base of modules that hold every matrix ``name`` as one parameter or as factors.

    A dense matrix is the parameter ``name`` [m, n]. A factored one is two parameters, ``name_u`` [m, r] and ``name_v``
    [r, n]; the attribute ``name`` then returns their product and cannot be set.

    Attributes:
        matrix_shapes: the shape (m, n) of every matrix that may be factored, by name.
        provenance: the origin of compressed matrices, by name; :func:`slimlstm.compress_` and ``load`` set it.
        storages: the storage of every rounded matrix, by name; see :meth:`store`.
        cell_clip, proj_clip: bounds on cells and projected outputs, or None.

    Examples:
        >>> from slimlstm import LowRankLSTM
        >>> lstm = LowRankLSTM(3, 4, ranks={"weight_hh_l0": 2})
        >>> lstm.ranks, [tuple(factor.shape) for factor in lstm.matrix("weight_hh_l0")]
        ({'weight_hh_l0': 2}, [(16, 2), (2, 4)])
    """

    matrix_shapes: dict[str, tuple[int, int]]
    provenance: dict[str, Provenance]
    storages: dict[str, str]
    cell_clip: float | None = None
    proj_clip: float | None = None
    hidden_size: int
    _layer_cache: _LayerCache | None = None
    _is_exposed: bool = True
    """Whether someone may hold a parameter, or may have held one since the last call."""

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every factored matrix, by name."""
        factors = {name: getattr(self, f"{name}_v", None) for name in self.matrix_shapes}
        return {name: len(v) for name, v in factors.items() if v is not None}

    def matrix(self, name: str) -> Matrix:
        """Return the matrix ``name``: W [m, n], or its factors (U, V). Masks and other parametrizations are applied."""
        own = self._own_parameters
        if name in own:
            return self._weight(name)
        if f"{name}_v" in own or name in self.ranks:
            return self._weight(f"{name}_u"), self._weight(f"{name}_v")
        return getattr(self, name)

    def product(self, name: str) -> Tensor:
        """Return the matrix ``name`` [m, n], factors multiplied."""
        return rebuilt(self.matrix(name))

    def set_factors(self, name: str, u: Tensor, v: Tensor) -> None:
        """Replace the matrix ``name`` by factors. Its parametrizations and its storage are dropped.

        Args:
            name: a matrix of this module.
            u, v: U [m, r] and V [r, n]. Parameters are registered as they are; other tensors become new parameters.

        Raises:
            SlimLSTMError: no matrix has that name, or U V does not have its shape.
        """
        self._check_name(name)
        m, n = self.matrix_shapes[name]
        if u.ndim != 2 or v.ndim != 2 or u.shape[0] != m or v.shape[1] != n or not 0 < u.shape[1] == v.shape[0]:
            raise SlimLSTMError(
                f"factors of {list(u.shape)} and {list(v.shape)} do not make {name}, which is {m} x {n}; give U [{m}, r] "
                f"and V [r, {n}]"
            )
        for old in (name, f"{name}_u", f"{name}_v"):
            drop_parametrizations(self, old)
        self._parameters.pop(name, None)
        vars(self).pop(name, None)
        for ending, factor in (("_u", u), ("_v", v)):
            self.register_parameter(name + ending, as_parameter(factor))
        self.storages.pop(name, None)

    @plain_mode()
    def store(self, name: str, storage: str) -> None:
        """Round the matrix ``name`` to ``storage``, and let the fused kernel read it in the storage's format.

        The parameters are rounded in place and keep their dtype, so that every backend computes with the same weights. The
        projection ``weight_hr`` of a projected layer is rounded together with its ``weight_hh``.

        Args:
            name: a matrix of this module.
            storage: a key of :data:`slimlstm.methods.STORAGES`, such as ``"int8"``.

        Raises:
            SlimLSTMError: no matrix or storage has that name, or the matrix is not float32.
        """
        self._check_name(name)
        with torch.no_grad():
            weights = [(self.original(part), rounded(self._weight(part), storage)) for part in self.stored_parts(name)]
            for original, weight in weights:
                original.copy_(weight)
        self.storages[name] = storage

    def kernel_format(self, name: str) -> str:
        """Return the format that the fused kernel packs the matrix ``name`` in: "float32", "bfloat16" or "int8".

        Products of very wide matrices in int8 could exceed the kernel's 32-bit integers, so these are packed in float32.
        """
        found = STORAGES[self.storages.get(name, "float32")].kernel_format
        return "float32" if found == "int8" and self.matrix_shapes[name][1] > _WIDEST_INT8 else found

    def stored_parts(self, name: str) -> list[str]:
        """Return the names of the weights that have the storage of the matrix ``name``: itself or its factors, and for hh
        the projection."""
        projection = name.replace("weight_hh", "weight_hr")
        parts = [f"{name}_u", f"{name}_v"] if name in self.ranks else [name]
        return parts + ([projection] if projection != name and projection in self._parameters else [])

    def original(self, name: str) -> Tensor:
        """Return the parameter behind the weight ``name``: the weight itself, or the weight below a mask.

        Raises:
            SlimLSTMError: the weight is computed from several parameters.
        """
        try:
            return self.get_parameter(name if name in self._parameters else f"parametrizations.{name}.original")
        except AttributeError as error:
            raise SlimLSTMError(f"{name} is computed from several parameters; remove its parametrization first") from error

    def layers(self) -> Sequence[Sequence[Direction]]:
        """Return the weights of all layers, for each layer the weights of its directions."""
        return self._make_layers()

    def _current_layers(self) -> Sequence[Sequence[Direction]]:
        """Return :meth:`layers`, and the same objects again as long as parameters, storages and clips are the same."""
        if torch.compiler.is_compiling():
            return self._make_layers()
        cache, parameters = self._layer_cache, self._own_parameters
        if cache is not None:
            same = len(cache.parameters) == len(parameters) and all(map(is_, cache.parameters, parameters.values()))
            if same and cache.storages == self.storages and cache.bounds == (self.cell_clip, self.proj_clip):
                if self._is_exposed:
                    self._note_exposure(cache)
                return cache.layers
        made, present = self._make_layers(), set(map(id, parameters.values()))
        # Weights that are computed from parameters, such as masked ones, may differ at the next call.
        if any(id(weight) not in present for one in made for weight in flat(one) if weight is not None):
            return made
        layers = [CachedLayer(one) for one in made]
        held = list(parameters.values())
        bounds, is_foreign_memory = (self.cell_clip, self.proj_clip), is_foreign([one for one in held if one is not None])
        self._layer_cache = _LayerCache(held, dict(self.storages), bounds, layers, is_foreign_memory)
        self.__dict__["_is_exposed"] = True
        return layers

    def _note_exposure(self, cache: _LayerCache) -> None:
        """Make this call compare all weights, and the next one too if someone holds a parameter."""
        for layer in cache.layers:
            layer.exposures += 1
        self.__dict__["_is_exposed"] = False
        for layer in cache.layers:  # again, because other threads may have edited parameters meanwhile
            layer.exposures += 1
        # This module, the method that calls this one and getrefcount hold the dictionary.
        is_held = self.training or cache.is_foreign or getrefcount(self.__dict__["_parameters"]) > 3
        present = [parameter for parameter in cache.parameters if parameter is not None]
        if is_held or not is_private(present, cache.layers, outside=2):
            self.__dict__["_is_exposed"] = True

    @property
    def _own_parameters(self) -> dict[str, nn.Parameter | None]:
        """The parameters by name, for use within this class: unlike ``_parameters``, reading it exposes nothing."""
        return self.__dict__["_parameters"]

    def reset_parameters(self) -> None:
        """Draw all weights anew: dense ones as in ``nn.LSTM``, factors so that their product has the same variance."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for name, rank in self.ranks.items():
            factor_bound = math.sqrt(bound * math.sqrt(3.0 / rank))
            for factor in (getattr(self, f"{name}_u"), getattr(self, f"{name}_v")):
                nn.init.uniform_(factor, -factor_bound, factor_bound)
        factor_names = {f"{name}_{ending}" for name in self.ranks for ending in "uv"}
        for name, parameter in self.named_parameters():
            if name not in factor_names:
                nn.init.uniform_(parameter, -bound, bound)

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:  # pyright: ignore
        """PyTorch's dictionary of parameters. Whoever reads it may edit them through ``.data`` or NumPy."""
        if not torch.compiler.is_compiling():
            self.__dict__["_is_exposed"] = True
        return self.__dict__["_parameters"]

    @_parameters.setter
    def _parameters(self, value: dict[str, nn.Parameter | None]) -> None:  # pyright: ignore
        self.__dict__["_parameters"] = value

    def __getattr__(self, name: str) -> Any:
        parameters: Mapping[str, nn.Parameter | None] = self.__dict__.get("_parameters", {})
        if name in parameters:
            if not torch.compiler.is_compiling():
                self.__dict__["_is_exposed"] = True
            return parameters[name]
        if name in self.__dict__.get("matrix_shapes", ()) and name in self.ranks:
            return self.product(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("matrix_shapes", ()) and name in self.ranks:
            raise SlimLSTMError(
                f"{name} is the product of {name}_u and {name}_v, and cannot be set; set the factors with set_factors"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:  # pyright: ignore
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        errors: list[str] = arguments[-1]
        for name in self.ranks:
            if prefix + name in state_dict and f"{prefix}{name}_v" not in state_dict:
                errors.append(
                    f"{prefix}{name} is dense in the state dict but factored in the model, whose weights would stay as "
                    "they were; load the state dict into the dense model, and compress that"
                )

    def __prepare_scriptable__(self) -> nn.Module:
        raise SlimLSTMError(
            f"a {type(self).__name__} cannot be scripted; trace the model by torch.jit.trace, export it by torch.export or "
            "slimlstm.export_onnx, or script to_dense(), which has the same weights multiplied"
        )

    def __getstate__(self) -> dict[str, Any]:
        self.__dict__["_is_exposed"] = True  # a shallow copy shares the parameters
        state = self.__dict__.copy()
        state.pop("_layer_cache", None)
        state.pop("_is_exposed", None)
        return state

    def _make_layers(self) -> list[list[Direction]]:
        raise NotImplementedError

    def _weight(self, name: str) -> Tensor:
        # Every streamed step reads every weight, and PyTorch's getattr is slow for parameters.
        parameter = self._own_parameters.get(name)
        return getattr(self, name) if parameter is None else parameter

    def _allocate(self, name: str, shape: tuple[int, ...], rank: int | None, **factory: Any) -> None:
        """Register an uninitialised weight, or uninitialised factors of a rank."""
        if rank is None:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
            return
        m, n = shape
        if not 1 <= rank <= min(m, n):
            raise SlimLSTMError(f"the rank of {name}, {m} x {n}, has to be from 1 to {min(m, n)}, not {rank}")
        self.register_parameter(f"{name}_u", nn.Parameter(torch.empty(m, rank, **factory)))
        self.register_parameter(f"{name}_v", nn.Parameter(torch.empty(rank, n, **factory)))

    def _share_parameters(self, dense: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]] | None) -> None:
        """Register the parameters of ``dense`` as this module's own, with ``factors`` instead of the matrices they name."""
        factors = factors or {}
        for name, parameter in dense.named_parameters():
            if name in factors:
                continue
            if name not in self._parameters:
                raise SlimLSTMError(
                    f"{type(dense).__name__} has a parameter {name!r} that a plain LSTM does not have; use compress_, "
                    "which keeps such parameters"
                )
            self.register_parameter(name, parameter)
        for name, (u, v) in factors.items():
            self.set_factors(name, u, v)
        self.train(dense.training)

    @plain_mode()
    def _copy_weights_to(self, dense: nn.Module) -> None:
        """Copy this module's weights into ``dense``, factors multiplied and masks applied."""
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter.copy_(self.product(name) if name in self.matrix_shapes else getattr(self, name))
        dense.train(self.training)

    def _check_name(self, name: str) -> None:
        if name not in self.matrix_shapes:
            raise SlimLSTMError(f"no matrix is called {name!r}; the matrices are {', '.join(self.matrix_shapes)}")

    def _check_ranks(self, ranks: Mapping[str, int]) -> None:
        unknown = [name for name in ranks if name not in self.matrix_shapes]
        if unknown:
            raise SlimLSTMError(
                f"ranks name {', '.join(unknown)}, but the only matrices are {', '.join(self.matrix_shapes)}"
            )


def check_dtypes(weights: Direction, *tensors: Tensor) -> None:
    """Reject inputs and states whose dtype is not the weights', unless autocast converts them.

    Raises:
        SlimLSTMError: a dtype differs.
    """
    dtype = parts_of(weights.ih)[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise SlimLSTMError(
                f"an input or state is {tensor.dtype}, but the weights are {dtype}; convert it with .to({dtype}), or the "
                f"module with .to({tensor.dtype})"
            )


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """Return a parameter as it is, or a parameter with the numbers of another tensor.

    Examples:
        >>> type(as_parameter(torch.ones(2, 3))).__name__
        'Parameter'
    """
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().contiguous())


def check_input(value: object) -> None:
    """Reject inputs that are no tensors, among them the symbols of ``torch.fx``, which have no number of dimensions.

    Raises:
        SlimLSTMError: the input is no tensor.
    """
    if isinstance(value, Tensor):
        return
    if isinstance(value, Proxy):
        raise SlimLSTMError(
            "torch.fx.symbolic_trace cannot look into a compressed layer; use a torch.fx.Tracer whose is_leaf_module "
            "returns True for slimlstm's modules, or torch.export"
        )
    raise SlimLSTMError(f"the input is {described(value)}, not a tensor; convert it, for example with torch.as_tensor")


def check_state(hx: object) -> None:
    """Reject a state that is not h and c, such as h alone, which takes the state of a GRU.

    Raises:
        SlimLSTMError: it is no pair of tensors.
    """
    pair = cast("Sequence[object]", hx) if isinstance(hx, tuple | list) else ()
    if len(pair) != 2 or not isinstance(pair[0], Tensor) or not isinstance(pair[1], Tensor):
        found = described(hx) if not pair else f"a {type(pair).__name__} of {', '.join(map(described, pair))}"
        raise SlimLSTMError(f"the state is {found}, not (h, c); give a tuple of two tensors")


def provenance_of(module: nn.Module, name: str) -> Provenance:
    """Return the origin of the factors or the mask of a matrix; empty where it has neither.

    Examples:
        >>> provenance_of(nn.LSTM(3, 4), "weight_hh_l0")
        {}
    """
    mask = mask_of(module, name)
    if mask is not None:
        return mask.provenance
    return module.provenance.get(name, {}) if isinstance(module, FactoredModule) else {}
