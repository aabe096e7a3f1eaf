"""A drop-in replacement for ``nn.LSTMCell`` whose matrices may be products of thin factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slimlstm import ops
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.factored import FactoredModule, check_dtypes, check_input, check_state
from slimlstm.modules.modes import plain_mode
from slimlstm.modules.shapes import LSTMState, cell_matrix_shapes
from slimlstm.ops.weights import Direction


class LowRankLSTMCell(FactoredModule):
    """``nn.LSTMCell`` with its whole contract, whose matrices may be factored: W ≈ U V.

    The forward pass takes [B, I] or [I], and optionally ``(h, c)`` of shape [B, H] or [H]; it returns ``(h, c)``.

    Args:
        input_size, hidden_size, bias, device, dtype: as for ``nn.LSTMCell``.
        ranks: the rank of every matrix that is factored, by its name, ``"weight_ih"`` or ``"weight_hh"``.

    Raises:
        SlimLSTMError: sizes, ranks or inputs do not fit.

    Examples:
        >>> cell = LowRankLSTMCell(3, 4, ranks={"weight_hh": 2})
        >>> h, c = cell(torch.randn(2, 3))
        >>> tuple(h.shape)
        (2, 4)
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
    @plain_mode()
    def from_dense(cls, cell: nn.LSTMCell, factors: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> LowRankLSTMCell:
        """Build the same cell, with the (U, V) in ``factors`` instead of the matrices that they name.

        Parameters that stay dense are shared with ``cell``. Arguments and errors are as of :meth:`LowRankLSTM.from_dense`.
        """
        module = cls(cell.input_size, cell.hidden_size, cell.bias, device="meta")
        module._share_parameters(cell, factors)
        return module

    @plain_mode()
    def to_dense(self) -> nn.LSTMCell:
        """Build an ``nn.LSTMCell`` with the same weights, factors multiplied and masks applied."""
        some = next(self.parameters())
        cell = nn.LSTMCell(self.input_size, self.hidden_size, self.bias, device=some.device, dtype=some.dtype)
        self._copy_weights_to(cell)
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
            self.kernel_format("weight_ih"),
            self.kernel_format("weight_hh"),
        )
        return [[weights]]

    def forward(self, input: Tensor, hx: LSTMState | None = None) -> LSTMState:
        check_input(input)
        if input.ndim not in (1, 2) or input.shape[-1] != self.input_size:
            size = self.input_size
            raise SlimLSTMError(f"the input has to be [B, {size}] or [{size}], not {list(input.shape)}")
        shape = (*input.shape[:-1], self.hidden_size)
        if hx is None:
            hx = input.new_zeros(shape), input.new_zeros(shape)
        else:
            check_state(hx)
        for name, state in zip("hc", hx, strict=True):
            if state.shape != shape:
                raise SlimLSTMError(f"{name} has to be {list(shape)} for this input, not {list(state.shape)}")
        weights = self._current_layers()[0]
        if input.ndim == 2:
            return self._step(input, *hx, weights)
        h, c = self._step(input[None], hx[0][None], hx[1][None], weights)
        return h[0], c[0]

    def _step(self, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Direction]) -> LSTMState:
        check_dtypes(weights[0], x, h, c)
        return ops.cell(x, h, c, weights, self.training)
