"""Round matrices and factors to a storage, with the moments where they are known."""

from __future__ import annotations

import torch
from torch import Tensor

from slimlstm.methods.feedback import DAMPING, round_columns, round_rows
from slimlstm.methods.storages import rounded, storage_called


def round_matrix(weight: Tensor, storage: str, inputs: Tensor | None = None) -> Tensor:
    """Return a float32 matrix [m, n] with the numbers that ``storage`` can hold.

    Low-bit storages with grouped scales are rounded with feedback, if the inputs' moment is known; other storages to
    nearest.

    Args:
        weight: W [m, n].
        storage: a key of :data:`slimlstm.methods.STORAGES`.
        inputs: A, the second moment of the inputs, [n, n] or [n].

    Raises:
        SlimLSTMError: no storage has that name, or the weight is not float32.

    Examples:
        >>> round_matrix(torch.tensor([[0.5, 0.25]]), "int4").shape
        torch.Size([1, 2])
    """
    nearest = rounded(weight, storage)
    row = storage_called(storage)
    if row.scales != "group" or row.bits is None or inputs is None:
        return nearest
    return _better(weight, nearest, round_columns(weight, inputs.to(weight.device), row.bits), inputs)


def round_factors(
    u: Tensor, v: Tensor, matrix: Tensor, storage: str, inputs: Tensor | None = None, gradients: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return factors U [m, r] and V [r, n] of W with the numbers that ``storage`` can hold.

    For low-bit storages: V is rounded column by column with the inputs' moment A as Hessian, U is solved again for the
    rounded V by least squares in the same metric, and then rounded row by row with the gradients' moment G as Hessian.

    Args:
        u, v: float32 factors.
        matrix: W [m, n], which they approximate.
        storage: a key of :data:`slimlstm.methods.STORAGES`.
        inputs: A [n, n] or [n], or None: then both factors are rounded to nearest.
        gradients: G [m, m] or [m], or None: then U is rounded with the moment of its own inputs, V A Vᵀ.
    """
    row = storage_called(storage)
    if row.scales != "group" or row.bits is None or inputs is None:
        return rounded(u, storage), rounded(v, storage)
    moment = (torch.diag(inputs) if inputs.ndim == 1 else inputs).to(u.device, torch.float64)
    v = round_columns(v, moment, row.bits)
    wide = v.double()
    own = wide @ moment @ wide.T
    damped = own + DAMPING * float(own.diagonal().mean()) * torch.eye(len(own), dtype=own.dtype, device=own.device)
    # Pull towards the given U where V's rows are nearly dependent.
    pull = damped - own
    solved = torch.linalg.solve(damped, (matrix.double() @ moment @ wide.T + u.double() @ pull).T).T.to(u.dtype)
    if gradients is None:
        return round_columns(solved, own, row.bits), v
    return round_rows(solved, gradients.to(u.device), row.bits), v


def _better(weight: Tensor, first: Tensor, second: Tensor, inputs: Tensor) -> Tensor:
    """Return the one of two roundings with the smaller loss tr(Δ A Δᵀ)."""
    moment = inputs.to(weight.device, torch.float64)

    def loss(rounding: Tensor) -> float:
        difference = (weight - rounding).double()
        weighted = difference * moment if moment.ndim == 1 else difference @ moment
        return float((weighted * difference).sum())

    return first if loss(first) < loss(second) else second
