"""Round matrices and factors to a storage, with the moments where they are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from slimlstm.methods.feedback import DAMPING, inverse_factor, round_columns, round_rows
from slimlstm.methods.storages import Storage, rounded, storage_called


class Rounder:
    """Rounds one matrix, or factors of it, in the metric of its moments. Work that does not depend on the storage or the
    rank is done once.

    Args:
        inputs: A, the second moment of the matrix's inputs, [n, n] or [n]; None rounds everything to nearest.
        gradients: G, the second moment of the gradients at its outputs, [m, m] or [m], or None.
        factor_of: :func:`slimlstm.methods.feedback.inverse_factor`, or a function that remembers its results; several
            matrices may have the same gradients.

    Examples:
        >>> rounder = Rounder(torch.eye(2))
        >>> rounder.matrix(torch.tensor([[0.5, 0.25]]), "int4").shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        inputs: Tensor | None = None,
        gradients: Tensor | None = None,
        factor_of: Callable[[Tensor], Tensor] = inverse_factor,
    ) -> None:
        self._inputs, self._gradients, self._factor_of = inputs, gradients, factor_of

    def at(self, inputs: Tensor) -> Rounder:
        """Return the rounder for other inputs of the same matrix."""
        return Rounder(
            inputs,
            self._gradients,
            lambda moment: self._gradient_factor if moment is self._gradients else inverse_factor(moment),
        )

    def matrix(self, weight: Tensor, storage: str) -> Tensor:
        """Return a float32 matrix [m, n] with the numbers that ``storage`` can hold.

        Low-bit storages with grouped scales are rounded with feedback, if the inputs' moment is known; other storages to
        nearest.

        Raises:
            SlimLSTMError: no storage has that name, or the weight is not float32.
        """
        nearest, bits = rounded(weight, storage), self._feedback_bits(storage)
        if bits is None or self._inputs is None:
            return nearest
        inputs = self._inputs.to(weight.device)
        return _better(weight, nearest, round_columns(weight, inputs, bits, self._input_factor.to(weight.device)), inputs)

    def factors(self, u: Tensor, v: Tensor, matrix: Tensor, storage: str) -> tuple[Tensor, Tensor]:
        """Return factors U [m, r] and V [r, n] of W ``matrix`` with the numbers that ``storage`` can hold.

        For low-bit storages: V is rounded column by column with A as Hessian, U is solved again for the rounded V by least
        squares in the same metric, and then rounded row by row with G as Hessian, or without G column by column with the
        moment of its own inputs, V A Vᵀ.
        """
        bits = self._feedback_bits(storage)
        if bits is None or self._inputs is None:
            return rounded(u, storage), rounded(v, storage)
        moment = (torch.diag(self._inputs) if self._inputs.ndim == 1 else self._inputs).to(u.device, torch.float64)
        v = round_columns(v, moment, bits, self._input_factor.to(u.device))
        wide = v.double()
        own = wide @ moment @ wide.T
        damped = own + DAMPING * float(own.diagonal().mean()) * torch.eye(len(own), dtype=own.dtype, device=own.device)
        # Pull towards the given U where V's rows are nearly dependent.
        pull = damped - own
        solved = torch.linalg.solve(damped, (matrix.double() @ moment @ wide.T + u.double() @ pull).T).T.to(u.dtype)
        if self._gradients is None:
            return round_columns(solved, own, bits), v
        return round_rows(solved, self._gradients, bits, self._gradient_factor.to(u.device)), v

    def _feedback_bits(self, storage: str) -> int | None:
        """Return the bits of a storage whose rounding uses the moments, or None."""
        row: Storage = storage_called(storage)
        return row.bits if row.scales == "group" else None

    @cached_property
    def _input_factor(self) -> Tensor:
        assert self._inputs is not None  # noqa: S101 (checked by the callers)
        return self._factor_of(self._inputs)

    @cached_property
    def _gradient_factor(self) -> Tensor:
        assert self._gradients is not None  # noqa: S101 (checked by the callers)
        return self._factor_of(self._gradients)


def round_matrix(weight: Tensor, storage: str, inputs: Tensor | None = None) -> Tensor:
    """Return :meth:`Rounder.matrix` of one matrix.

    Examples:
        >>> round_matrix(torch.tensor([[0.5, 0.25]]), "int4").shape
        torch.Size([1, 2])
    """
    return Rounder(inputs).matrix(weight, storage)


def round_factors(
    u: Tensor, v: Tensor, matrix: Tensor, storage: str, inputs: Tensor | None = None, gradients: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return :meth:`Rounder.factors` of one matrix W [m, n] and its float32 factors."""
    return Rounder(inputs, gradients).factors(u, v, matrix, storage)


def _better(weight: Tensor, first: Tensor, second: Tensor, inputs: Tensor) -> Tensor:
    """Return the one of two roundings with the smaller loss tr(Δ A Δᵀ)."""
    moment = inputs.to(torch.float64)

    def loss(rounding: Tensor) -> float:
        difference = (weight - rounding).double()
        weighted = difference * moment if moment.ndim == 1 else difference @ moment
        return float((weighted * difference).sum())

    return first if loss(first) < loss(second) else second
