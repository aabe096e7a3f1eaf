"""Drop-in replacements for ``nn.LSTM`` and ``nn.LSTMCell`` whose matrices may be products of thin factors.

They take factors; they know no solver. Dimensions as in :mod:`slimlstm.ops.weights`; L layers, D directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from slimlstm import ops
from slimlstm.errors import SlimLSTMError
from slimlstm.ops.dense import rebuilt
from slimlstm.ops.weights import Direction, Layer, Matrix, flat, rounded

State = tuple[Tensor, Tensor]
Provenance = dict[str, str]
"""Where the numbers of a compressed matrix come from: the ``method`` and the ``source_sha256`` of the dense matrix."""
Input = TypeVar("Input", Tensor, PackedSequence)


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
            self.register_parameter(name + ending, _as_parameter(factor))
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


class LowRankLSTM(FactoredModule):
    """``nn.LSTM`` with its whole contract, whose matrices may be factored: W ≈ U V.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            as of ``nn.LSTM``.
        ranks: the rank of every matrix to be kept as factors, by the name it has in ``nn.LSTM``
            (``weight_hh_l0_reverse`` is then kept as ``weight_hh_l0_reverse_u`` and ``..._v``); the others are dense.
        backend: which implementation of the recurrence runs; see :mod:`slimlstm.ops`. It may be set at any time.
        cell_clip, proj_clip: bounds that cells, and projected outputs, are clipped to, as in ELMo (Peters et al. 2018).

    The forward pass takes and returns what that of ``nn.LSTM`` does: [T, B, I], with ``batch_first`` [B, T, I],
    unbatched [T, I], or a ``PackedSequence``; optionally ``(h0, c0)`` of shapes [D L, B, P] and [D L, B, H].

    Raises:
        SlimLSTMError: sizes, ranks or inputs that do not fit.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ranks: Mapping[str, int] | None = None,
        backend: str = "auto",
        cell_clip: float | None = None,
        proj_clip: float | None = None,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size, num_layers) < 1 or not 0 <= proj_size < hidden_size:
            raise SlimLSTMError(
                "input_size, hidden_size and num_layers have to be at least 1 and proj_size below hidden_size, not "
                f"{input_size}, {hidden_size}, {num_layers} and {proj_size}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise SlimLSTMError(f"dropout is a probability in [0, 1], not {dropout}")
        for name, bound in (("cell_clip", cell_clip), ("proj_clip", proj_clip)):
            if bound is not None and not bound > 0.0:
                raise SlimLSTMError(f"{name} is a bound above zero, or None for no bound, not {bound}")
        if proj_clip is not None and not proj_size:
            raise SlimLSTMError("proj_clip bounds what a projection gives, but proj_size is 0")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size, self.backend = bidirectional, proj_size, backend
        self.cell_clip, self.proj_clip = cell_clip, proj_clip
        self.matrix_shapes = lstm_matrix_shapes(**lstm_arguments(self))
        self.provenance, self.storages = {}, {}
        ranks = ranks or {}
        self._check_ranks(ranks)
        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                for kind in ("weight_ih", "weight_hh"):
                    name = kind + suffix
                    self._allocate(name, self.matrix_shapes[name], ranks.get(name), device=device, dtype=dtype)
                for kind in ("bias_ih", "bias_hh") if bias else ():
                    self._allocate(kind + suffix, (4 * hidden_size,), None, device=device, dtype=dtype)
                if proj_size:
                    self._allocate(f"weight_hr{suffix}", (proj_size, hidden_size), None, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, lstm: nn.LSTM, factors: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> LowRankLSTM:
        """The same layers with the matrices named in ``factors`` replaced by their (U, V).

        Parameters that stay dense are shared with ``lstm``, not copied. Without factors the result computes what
        ``lstm`` computes, and can be given to ``compress_``.

        Raises:
            SlimLSTMError: a name or shape in ``factors`` does not fit, or ``lstm`` has parameters of its own.
        """
        module = cls(**lstm_arguments(lstm), **clips(lstm), device="meta")
        module._take_over(lstm, factors)
        return module

    def to_dense(self) -> nn.LSTM:
        """An ``nn.LSTM`` with the same weights, factors multiplied and masks applied.

        Raises:
            SlimLSTMError: this module clips, which ``nn.LSTM`` cannot.
        """
        if any(bound is not None for bound in clips(self).values()):
            raise SlimLSTMError("nn.LSTM does not clip cells or projections; set cell_clip and proj_clip to None first")
        some = next(self.parameters())
        lstm = nn.LSTM(**lstm_arguments(self), device=some.device, dtype=some.dtype)
        self._fill(lstm)
        return lstm

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: self._directions]

    def flatten_parameters(self) -> None:
        """Does nothing; ``nn.LSTM`` has it for cuDNN."""

    def extra_repr(self) -> str:
        settings = [f"{self.input_size}, {self.hidden_size}", f"num_layers={self.num_layers}"]
        settings += [name for name in ("batch_first", "bidirectional") if getattr(self, name)]
        settings += [f"{name}={getattr(self, name)}" for name in ("dropout", "proj_size") if getattr(self, name)]
        settings += [f"{name}={bound}" for name, bound in clips(self).items() if bound is not None]
        settings += [] if self.bias else ["bias=False"]
        settings += [f"storages={self.storages}"] if self.storages else []
        return ", ".join([*settings, f"ranks={self.ranks}"])

    def direction(self, suffix: str) -> Direction:
        """The weights of the layer and direction that ``suffix`` names, such as ``"_l0_reverse"``."""
        return Direction(
            self.matrix(f"weight_ih{suffix}"),
            self.matrix(f"weight_hh{suffix}"),
            self._weight(f"bias_ih{suffix}") if self.bias else None,
            self._weight(f"bias_hh{suffix}") if self.bias else None,
            self._weight(f"weight_hr{suffix}") if self.proj_size else None,
            self.storages.get(f"weight_ih{suffix}", "float32"),
            self.storages.get(f"weight_hh{suffix}", "float32"),
            self.cell_clip,
            self.proj_clip,
        )

    def _make_layers(self) -> list[list[Direction]]:
        return [[self.direction(suffix) for suffix in self._suffixes(layer)] for layer in range(self.num_layers)]

    def forward(self, input: Input, hx: State | None = None) -> tuple[Input, State]:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        shape = input.shape
        if len(shape) not in (2, 3) or shape[-1] != self.input_size:
            raise SlimLSTMError(
                f"the input has to be [T, B, {self.input_size}] (batch_first: [B, T, {self.input_size}]) or unbatched "
                f"[T, {self.input_size}], not {list(shape)}"
            )
        if hx is not None:
            self._check_states(hx, () if len(shape) == 2 else (shape[0 if self.batch_first else 1],))
        if len(shape) == 2:
            if hx is not None:
                hx = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
            output, state = self._run(input[:, None], None, hx)
            return output[:, 0], (state[0][:, 0], state[1][:, 0])
        output, state = self._run(input.transpose(0, 1) if self.batch_first else input, None, hx)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _forward_packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        if packed.data.ndim != 2 or packed.data.shape[-1] != self.input_size:
            raise SlimLSTMError(f"the input has to be packed [N, {self.input_size}], not {list(packed.data.shape)}")
        if hx is not None:
            self._check_states(hx, (int(packed.batch_sizes[0]),))
        order, inverse = packed.sorted_indices, packed.unsorted_indices
        if order is not None and hx is not None:
            hx = hx[0].index_select(1, order), hx[1].index_select(1, order)
        data, state = self._run(packed.data, packed.batch_sizes, hx)
        if inverse is not None:
            state = (state[0].index_select(1, inverse), state[1].index_select(1, inverse))
        return PackedSequence(data, packed.batch_sizes, order, inverse), state

    def _run(self, x: Tensor, batch_sizes: Tensor | None, hx: State | None) -> tuple[Tensor, State]:
        layers = self.layers()
        if len(layers) == 1:
            h0, c0 = (None, None) if hx is None else hx
            output, h, c = ops.layer(x, batch_sizes, h0, c0, layers[0], self.backend)
            return output, (h, c)
        last: list[ops.LayerOutput] = []
        directions = self._directions
        for layer, weights in enumerate(layers):
            if layer > 0 and self.dropout > 0.0:
                x = dropout(x, self.dropout, self.training)
            part = slice(layer * directions, (layer + 1) * directions)
            h0, c0 = (None, None) if hx is None else (hx[0][part], hx[1][part])
            last.append(ops.layer(x, batch_sizes, h0, c0, weights, self.backend))
            x = last[-1].output
        return x, (torch.cat([result.h for result in last]), torch.cat([result.c for result in last]))

    def _check_states(self, hx: State, batch: tuple[int, ...]) -> None:
        """``batch`` is (B,), or () for unbatched input."""
        count = self.num_layers * self._directions
        shapes = (count, *batch, self.proj_size or self.hidden_size), (count, *batch, self.hidden_size)
        h0, c0 = hx
        if h0.shape == shapes[0] and c0.shape == shapes[1]:
            return
        for name, state, shape in zip("hc", hx, shapes, strict=True):
            if state.shape != shape:
                raise SlimLSTMError(f"{name}0 has to be {list(shape)} for this input, not {list(state.shape)}")


class LowRankLSTMCell(FactoredModule):
    """``nn.LSTMCell`` with its whole contract, whose matrices may be factored.

    Args:
        input_size, hidden_size, bias, device, dtype: as of ``nn.LSTMCell``.
        ranks: the rank of ``weight_ih`` and of ``weight_hh``, where they are to be kept as factors.

    The forward pass takes [B, I] or [I], and optionally ``(h, c)`` of [B, H] or [H]; it returns ``(h, c)``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size) < 1:
            raise SlimLSTMError(f"sizes have to be at least 1, not {input_size} and {hidden_size}")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.matrix_shapes = cell_matrix_shapes(input_size, hidden_size)
        self.provenance, self.storages = {}, {}
        ranks = ranks or {}
        self._check_ranks(ranks)
        for name, shape in self.matrix_shapes.items():
            self._allocate(name, shape, ranks.get(name), device=device, dtype=dtype)
        for name in ("bias_ih", "bias_hh") if bias else ():
            self._allocate(name, (4 * hidden_size,), None, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, cell: nn.LSTMCell, factors: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> LowRankLSTMCell:
        """The same cell with the matrices named in ``factors`` replaced; see :meth:`LowRankLSTM.from_dense`."""
        module = cls(cell.input_size, cell.hidden_size, cell.bias, device="meta")
        module._take_over(cell, factors)
        return module

    def to_dense(self) -> nn.LSTMCell:
        """An ``nn.LSTMCell`` with the same weights, factors multiplied and masks applied."""
        some = next(self.parameters())
        cell = nn.LSTMCell(self.input_size, self.hidden_size, self.bias, device=some.device, dtype=some.dtype)
        self._fill(cell)
        return cell

    def extra_repr(self) -> str:
        bias = "" if self.bias else ", bias=False"
        storages = f", storages={self.storages}" if self.storages else ""
        return f"{self.input_size}, {self.hidden_size}{bias}{storages}, ranks={self.ranks}"

    def _make_layers(self) -> list[list[Direction]]:
        weights = Direction(
            self.matrix("weight_ih"),
            self.matrix("weight_hh"),
            self._weight("bias_ih") if self.bias else None,
            self._weight("bias_hh") if self.bias else None,
            None,
            self.storages.get("weight_ih", "float32"),
            self.storages.get("weight_hh", "float32"),
        )
        return [[weights]]

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        if input.ndim not in (1, 2) or input.shape[-1] != self.input_size:
            size = self.input_size
            raise SlimLSTMError(f"the input has to be [B, {size}] or [{size}], not {list(input.shape)}")
        shape = (*input.shape[:-1], self.hidden_size)
        if hx is None:
            hx = input.new_zeros(shape), input.new_zeros(shape)
        for name, state in zip("hc", hx, strict=True):
            if state.shape != shape:
                raise SlimLSTMError(f"{name} has to be {list(shape)} for this input, not {list(state.shape)}")
        weights = self.layers()[0]
        if input.ndim == 2:
            return self._step(input, *hx, weights)
        h, c = self._step(input[None], hx[0][None], hx[1][None], weights)
        return h[0], c[0]

    def _step(self, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Direction]) -> State:
        return ops.cell(x, h, c, weights)


def lstm_matrix_shapes(
    input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, proj_size: int, **_: Any
) -> dict[str, tuple[int, int]]:
    """Names and shapes of the recurrent matrices of an ``nn.LSTM``: ih [4H, I], hh [4H, P]."""
    shapes: dict[str, tuple[int, int]] = {}
    outputs, endings = proj_size or hidden_size, ("", "_reverse") if bidirectional else ("",)
    for layer in range(num_layers):
        inputs = input_size if layer == 0 else outputs * len(endings)
        for ending in endings:
            shapes[f"weight_ih_l{layer}{ending}"] = (4 * hidden_size, inputs)
            shapes[f"weight_hh_l{layer}{ending}"] = (4 * hidden_size, outputs)
    return shapes


def cell_matrix_shapes(input_size: int, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the recurrent matrices of an ``nn.LSTMCell``."""
    return {"weight_ih": (4 * hidden_size, input_size), "weight_hh": (4 * hidden_size, hidden_size)}


def lstm_arguments(lstm: nn.RNNBase | LowRankLSTM) -> dict[str, Any]:
    """What an ``nn.LSTM`` like this one is made with, device and dtype aside."""
    names: Sequence[str] = (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    )
    return {name: getattr(lstm, name, 0) for name in names}


def clips(lstm: nn.Module) -> dict[str, Any]:
    """The bounds that an LSTM clips its cells and projections to, None where it does not."""
    return {name: getattr(lstm, name, None) for name in ("cell_clip", "proj_clip")}


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().contiguous())
