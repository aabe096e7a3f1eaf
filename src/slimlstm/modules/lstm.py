"""A drop-in replacement for ``nn.LSTM`` whose matrices may be products of thin factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from slimlstm import ops
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.factored import FactoredModule, check_dtypes, check_input, check_state
from slimlstm.modules.modes import plain_mode
from slimlstm.modules.shapes import LSTMState, clips, lstm_arguments, lstm_matrix_shapes
from slimlstm.ops.weights import Direction

Input = TypeVar("Input", Tensor, PackedSequence)


class LowRankLSTM(FactoredModule):
    """``nn.LSTM`` with its whole contract, whose matrices may be factored: W ≈ U V.

    The forward pass takes and returns the same as ``nn.LSTM``: [T, B, I], with ``batch_first`` [B, T, I], unbatched [T, I],
    or a ``PackedSequence``; optionally ``(h0, c0)`` of shapes [D L, B, P] and [D L, B, H].

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            as for ``nn.LSTM``.
        ranks: the rank of every matrix that is factored, by its name in ``nn.LSTM``; all others are dense. A factored
            ``weight_hh_l0_reverse``, for instance, is two parameters, ``weight_hh_l0_reverse_u`` and ``..._v``.
        backend: the implementation of the recurrence; see :mod:`slimlstm.ops`. It may be set at any time.
        cell_clip, proj_clip: bounds on cells and on projected outputs, as in ELMo (Peters et al. 2018).

    Raises:
        SlimLSTMError: sizes, ranks or inputs do not fit.

    Examples:
        >>> lstm = LowRankLSTM(3, 4, ranks={"weight_hh_l0": 2})
        >>> output, (h, c) = lstm(torch.randn(5, 2, 3))
        >>> tuple(output.shape), sorted(name for name, _ in lstm.named_parameters())
        ((5, 2, 4), ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0_u', 'weight_hh_l0_v', 'weight_ih_l0'])
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
            raise SlimLSTMError("proj_clip bounds projected outputs, but proj_size is 0; leave proj_clip out")
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
    @plain_mode()
    def from_dense(cls, lstm: nn.LSTM, factors: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> LowRankLSTM:
        """Build the same layers, with the (U, V) in ``factors`` instead of the matrices that they name.

        Parameters that stay dense are shared with ``lstm``, not copied. Without factors, the result computes the same as
        ``lstm``.

        Args:
            lstm: the dense module; it does not change.
            factors: U [m, r] and V [r, n] by the name of the matrix [m, n] that they replace.

        Raises:
            SlimLSTMError: a name or shape in ``factors`` does not fit, or ``lstm`` has parameters that a plain LSTM does
                not have.

        Examples:
            >>> u, v = torch.randn(16, 2), torch.randn(2, 4)
            >>> LowRankLSTM.from_dense(nn.LSTM(3, 4), {"weight_hh_l0": (u, v)}).ranks
            {'weight_hh_l0': 2}
        """
        module = cls(**lstm_arguments(lstm), **clips(lstm), device="meta")
        module._share_parameters(lstm, factors)
        return module

    @plain_mode()
    def to_dense(self) -> nn.LSTM:
        """Build an ``nn.LSTM`` with the same weights, factors multiplied and masks applied.

        Raises:
            SlimLSTMError: this module clips, which ``nn.LSTM`` cannot do.
        """
        if any(bound is not None for bound in clips(self).values()):
            raise SlimLSTMError("nn.LSTM does not clip cells or projections; set cell_clip and proj_clip to None first")
        some = next(self.parameters())
        lstm = nn.LSTM(**lstm_arguments(self), device=some.device, dtype=some.dtype)
        self._copy_weights_to(lstm)
        return lstm

    @property
    def mode(self) -> str:
        """``"LSTM"``, as in ``nn.LSTM``."""
        return "LSTM"

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The dense weights by layer and direction, in the order of ``nn.LSTM.all_weights``; factors are multiplied."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _all_weights(self) -> list[list[str]]:
        kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        kinds += ["weight_hr"] if self.proj_size else []
        suffixes = [suffix for layer in range(self.num_layers) for suffix in self._suffixes(layer)]
        return [[kind + suffix for kind in kinds] for suffix in suffixes]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [weight for weights in self.all_weights for weight in weights]

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: self._directions]

    def flatten_parameters(self) -> None:
        """Do nothing; ``nn.LSTM`` needs it for cuDNN."""

    def extra_repr(self) -> str:
        settings = [f"{self.input_size}, {self.hidden_size}", f"num_layers={self.num_layers}"]
        settings += [name for name in ("batch_first", "bidirectional") if getattr(self, name)]
        settings += [f"{name}={getattr(self, name)}" for name in ("dropout", "proj_size") if getattr(self, name)]
        settings += [f"{name}={bound}" for name, bound in clips(self).items() if bound is not None]
        settings += [] if self.bias else ["bias=False"]
        settings += [f"storages={self.storages}"] if self.storages else []
        return ", ".join([*settings, f"ranks={self.ranks}"])

    def direction(self, suffix: str) -> Direction:
        """Return the weights of the layer and direction that ``suffix`` names, such as ``"_l0_reverse"``."""
        return Direction(
            self.matrix(f"weight_ih{suffix}"),
            self.matrix(f"weight_hh{suffix}"),
            self._weight(f"bias_ih{suffix}") if self.bias else None,
            self._weight(f"bias_hh{suffix}") if self.bias else None,
            self._weight(f"weight_hr{suffix}") if self.proj_size else None,
            self.kernel_format(f"weight_ih{suffix}"),
            self.kernel_format(f"weight_hh{suffix}"),
            self.cell_clip,
            self.proj_clip,
        )

    def _make_layers(self) -> list[list[Direction]]:
        return [[self.direction(suffix) for suffix in self._suffixes(layer)] for layer in range(self.num_layers)]

    def forward(self, input: Input, hx: LSTMState | None = None) -> tuple[Input, LSTMState]:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        check_input(input)
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

    def _forward_packed(self, packed: PackedSequence, hx: LSTMState | None) -> tuple[PackedSequence, LSTMState]:
        if packed.data.ndim != 2 or packed.data.shape[-1] != self.input_size:
            raise SlimLSTMError(f"the input has to be packed [N, {self.input_size}], not {list(packed.data.shape)}")
        if len(packed.batch_sizes) == 0:
            raise SlimLSTMError("the packed input has no batch sizes; pack at least one sequence")
        if hx is not None:
            self._check_states(hx, (int(packed.batch_sizes[0]),))
        order, inverse = packed.sorted_indices, packed.unsorted_indices
        if order is not None and hx is not None:
            hx = hx[0].index_select(1, order), hx[1].index_select(1, order)
        data, state = self._run(packed.data, packed.batch_sizes, hx)
        if inverse is not None:
            state = (state[0].index_select(1, inverse), state[1].index_select(1, inverse))
        return PackedSequence(data, packed.batch_sizes, order, inverse), state

    def _run(self, x: Tensor, batch_sizes: Tensor | None, hx: LSTMState | None) -> tuple[Tensor, LSTMState]:
        layers = self._current_layers()
        check_dtypes(layers[0][0], x, *(hx or ()))
        if len(layers) == 1:
            h0, c0 = (None, None) if hx is None else hx
            output, h, c = ops.layer(x, batch_sizes, h0, c0, layers[0], self.backend, self.training)
            return output, (h, c)
        last: list[ops.LayerOutput] = []
        directions = self._directions
        for layer, weights in enumerate(layers):
            if layer > 0 and self.dropout > 0.0:
                x = dropout(x, self.dropout, self.training)
            part = slice(layer * directions, (layer + 1) * directions)
            h0, c0 = (None, None) if hx is None else (hx[0][part], hx[1][part])
            last.append(ops.layer(x, batch_sizes, h0, c0, weights, self.backend, self.training))
            x = last[-1].output
        return x, (torch.cat([result.h for result in last]), torch.cat([result.c for result in last]))

    def _check_states(self, hx: LSTMState, batch: tuple[int, ...]) -> None:
        """Reject states of another shape; ``batch`` is (B,), or () for unbatched input."""
        check_state(hx)
        count = self.num_layers * self._directions
        shapes = (count, *batch, self.proj_size or self.hidden_size), (count, *batch, self.hidden_size)
        h0, c0 = hx
        if h0.shape == shapes[0] and c0.shape == shapes[1]:
            return
        for name, state, shape in zip("hc", hx, shapes, strict=True):
            if state.shape != shape:
                raise SlimLSTMError(f"{name}0 has to be {list(shape)} for this input, not {list(state.shape)}")
