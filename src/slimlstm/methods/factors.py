"""Factors U [m, r] and V [r, n] of a matrix W [m, n], and how they were found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlstm.methods.matrices import relative_error

OnIteration = Callable[[int, int], None]
"""A callback for iterative solvers: ``(iterations done, largest number of iterations)``."""


@dataclass(frozen=True)
class Factors:
    """Factors W ≈ ``u`` [m, r] ``v`` [r, n] in the matrix's dtype.

    Attributes:
        residual: ‖W - U V‖_F / ‖W‖_F, rounding to the dtype included; 0 where W = 0.
        iterations: number of iterations; 0 for a direct solver.
        converged: False where an iterative solver reached its limit of iterations.
        losses: [k], the loss of leaving out each direction, largest first; None where the solver does not compute it.
    """

    u: Tensor
    v: Tensor
    residual: float
    iterations: int = 0
    converged: bool = True
    losses: Tensor | None = None

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.u.shape[1]


def as_factors(matrix: Tensor, u: Tensor, v: Tensor, iterations: int = 0, converged: bool = True) -> Factors:
    """Return the factors in the dtype of ``matrix``, with their residual."""
    u, v = u.to(matrix.dtype), v.to(matrix.dtype)
    residual = relative_error(matrix, u.double() @ v.double())
    return Factors(u.contiguous(), v.contiguous(), residual, iterations, converged)


def balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with the same product and ‖u_i‖ = ‖v_i‖ for every column of U and row of V."""
    left, right = u.norm(dim=0), v.norm(dim=1)
    scale = torch.where((left > 0) & (right > 0), (left / right).sqrt(), 1.0)
    return u / scale, scale[:, None] * v
