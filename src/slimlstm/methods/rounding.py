"""Round matrices and factors to a storage, in the metric of their moments where these are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from slimlstm.methods.feedback import ROUNDING_DAMPING, inverse_factor, round_with_feedback
from slimlstm.methods.matrices import damped
from slimlstm.methods.storages import Storage, rounded, storage_called
from slimlstm.methods.weighted import MOMENT_DAMPING

_LEAST = 1e-8
"""Lower bound on the squared norms of U's columns and V's rows, as a share of the largest one."""


class Rounder:
    """Rounds one matrix, or factors of it, in the metric of its moments.

    Work that does not depend on the storage or the rank is done once.

    Args:
        inputs: A, the second moment of the matrix's inputs, [n, n] or [n]; None rounds everything to nearest.
        gradients: G, the second moment of the gradients at its outputs, [m, m] or [m], or None.
        factor_of: :func:`slimlstm.methods.feedback.inverse_factor`, or a version of it that remembers results, because
            several matrices may have the same gradients.

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
        """Return a float32 matrix [m, n], rounded to numbers that ``storage`` can hold.

        Rounding to low-bit storages with grouped scales uses feedback if the inputs' moment is known. Otherwise it is to
        nearest.

        Raises:
            SlimLSTMError: no storage has that name, or the weight is not float32.
        """
        nearest, bits = rounded(weight, storage), self._feedback_bits(storage)
        if bits is None or self._inputs is None:
            return nearest
        found = round_with_feedback(weight, self._input_factor.to(weight.device), self._down(weight), bits)
        return min(nearest, found, key=lambda after: self._loss(weight - after))

    def factors(self, u: Tensor, v: Tensor, matrix: Tensor, storage: str) -> tuple[Tensor, Tensor]:
        """Return factors U [m, r] and V [r, n] of W ``matrix`` [m, n], rounded to numbers that ``storage`` can hold.

        For low-bit storages with grouped scales, a change of basis comes first. V is rounded with A and UᵀGU as moments, U
        is solved again for the rounded V by least squares in the metric A, and then rounded with V A Vᵀ and G.

        Raises:
            SlimLSTMError: no storage has that name, or the factors are not float32.
        """
        nearest, bits = (rounded(u, storage), rounded(v, storage)), self._feedback_bits(storage)
        if bits is None or self._inputs is None:
            return nearest
        full = torch.diag(self._inputs) if self._inputs.ndim == 1 else self._inputs
        # Rounding errors must leave no negative eigenvalue.
        moment = damped(full.to(u.device, torch.float64), MOMENT_DAMPING)
        u, v = self._mixed(u, v, moment)
        down = inverse_factor(self._by_gradients(u.double()))
        v = round_with_feedback(v, self._input_factor.to(u.device), down, bits)
        wide = v.double()
        own = wide @ moment @ wide.T
        damped_own = damped(own, ROUNDING_DAMPING)
        # Pull towards the given U where V's rows are nearly dependent.
        pull = damped_own - own
        solved = torch.linalg.solve(damped_own, (matrix.double() @ moment @ wide.T + u.double() @ pull).T).T.to(u.dtype)
        return round_with_feedback(solved, inverse_factor(own), self._down(u), bits), v

    def _mixed(self, u: Tensor, v: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors with the same product U V, in a basis in which rounding loses little.

        Every column of U and its row of V get equal norms in the metrics G and A, so that neither side's errors weigh more.
        Then a rotation spreads large and small columns evenly, since the weights of a group share one scale, and all rows
        of V have equally many bits.
        """
        left, right = self._by_gradients(u.double()).diagonal(), ((v.double() @ moment) * v.double()).sum(dim=1)
        # Directions without a gradient lose nothing, and must not be scaled up without bounds.
        left, right = (sizes.clamp_min(_LEAST * float(sizes.max()) or 1.0) for sizes in (left, right))
        scale = (right / left) ** 0.25
        rotation = _rotation(len(v)).to(u.device)
        return (u * scale @ rotation).to(u.dtype), (rotation.T @ (v / scale[:, None])).to(v.dtype)

    def _by_gradients(self, u: Tensor) -> Tensor:
        """Return UᵀGU for U [m, r]."""
        return u.T @ self._weighed(u)

    def _weighed(self, u: Tensor) -> Tensor:
        """Return G U for U [m, r]."""
        if self._gradients is None:
            return u
        gradients = self._gradients.to(u)
        return gradients[:, None] * u if gradients.ndim == 1 else gradients @ u

    def _loss(self, difference: Tensor) -> float:
        """Return tr(Δᵀ G Δ A) for Δ [m, n]."""
        assert self._inputs is not None  # noqa: S101 (checked by the caller)
        wide = difference.double()
        inputs = self._inputs.to(wide)
        return float(((wide @ inputs if inputs.ndim == 2 else wide * inputs) * self._weighed(wide)).sum())

    def _down(self, weight: Tensor) -> Tensor | None:
        return None if self._gradients is None else self._gradient_factor.to(weight.device)

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


def _rotation(size: int) -> Tensor:
    """Return an orthogonal matrix [r, r] in float64, always the same."""
    draw = torch.Generator("cpu").manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, device="cpu", generator=draw))[0]
