"""Low-rank approximation weighted by second moments of inputs and gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods.factors import Factors, as_factors, balanced
from slimlstm.methods.matrices import check_matrix, check_rank, damping_of

MOMENT_DAMPING = 1e-3
"""Damping of the inputs' moment, as a fraction of its mean diagonal."""


class WeightedSVD:
    """Best approximations W' of W [m, n] at every rank, for the loss tr((W - W')ᵀ G (W - W') A).

    With A = R Rᵀ the loss is ‖G^½ (W - W') R‖_F². Its minimum is W' = W R V_r V_rᵀ R⁻¹, where V_r holds the leading
    eigenvectors of (W R)ᵀ G W R: truncate the SVD of G^½ W R, and remove the weights again. With G = I this is DRONE (Chen
    et al. 2021). G need not be invertible. Where A is singular, W' would be undetermined, so λ = ``MOMENT_DAMPING`` times
    the mean of A's diagonal is added to the diagonal.

    Args:
        matrix: W [m, n].
        inputs: A, the second moment of the inputs of W: [n, n], or [n] for a diagonal A.
        gradients: G, the second moment of the gradients at the outputs of W: [m, m] or [m]; None for the identity.

    Attributes:
        losses: [min(m, n)], the loss of leaving out each direction, largest first.

    Raises:
        SlimLSTMError: the matrix is empty or not finite, or the moments do not fit it or are not finite.

    Examples:
        >>> weighted = WeightedSVD(torch.diag(torch.tensor([2.0, 1.0])), inputs=torch.tensor([0.01, 1.0]))
        >>> weighted.factors(rank=1).v.abs().argmax().item()  # the larger weight hardly ever sees an input
        1
    """

    losses: Tensor

    def __init__(self, matrix: Tensor, inputs: Tensor, gradients: Tensor | None = None) -> None:
        check_matrix(matrix)
        m, n = matrix.shape
        for name, moment, size in (("inputs", inputs, n), ("gradients", gradients, m)):
            if moment is not None and moment.shape not in ((size,), (size, size)):
                raise SlimLSTMError(
                    f"{name} of a {m} x {n} matrix are [{size}, {size}] or [{size}], not {list(moment.shape)}"
                )
            if moment is not None and not bool(torch.isfinite(moment).all()):
                raise SlimLSTMError(f"the moments of the {name} hold NaN or infinite numbers; were the batches finite?")
        self.matrix = matrix
        unit, size = _unit(inputs.to(matrix.device, torch.float64))
        root, self._unroot = _roots(unit)
        self._weighted = _times(matrix.detach().double(), root)
        outer = self._weighted
        if gradients is not None:
            unit, size_of_gradients = _unit(gradients.to(matrix.device, torch.float64))
            outer, size = _times(outer.T, unit).T, size * size_of_gradients
        values, vectors = torch.linalg.eigh(self._weighted.T @ outer)
        self.losses = (values.flip(0).clamp_min(0.0)[: min(m, n)] * size).clamp_max(torch.finfo(torch.float64).max)
        self._directions = vectors.flip(1)

    def factors(self, rank: int) -> Factors:
        """Return W' = U V of rank r.

        Raises:
            SlimLSTMError: the rank is not in [1, min(m, n)].
        """
        check_rank(self.matrix, rank)
        directions = self._directions[:, :rank]
        u, v = self._weighted @ directions, _times(directions.T, self._unroot)
        return replace(as_factors(self.matrix, *balanced(u, v)), losses=self.losses)


def _unit(moment: Tensor) -> tuple[Tensor, float]:
    """Return a moment divided by its largest magnitude, and this magnitude, on which the factors do not depend."""
    size = float(moment.abs().max())
    return (moment / size, size) if size > 0.0 else (moment, 1.0)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return A^½ and A^-½ of the damped A, [n, n] or [n]."""
    damping = damping_of(moment, MOMENT_DAMPING)
    if moment.ndim == 1:
        root = (moment + damping).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh(moment)
    root = (values.clamp_min(0.0) + damping).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


def _times(matrix: Tensor, moment: Tensor) -> Tensor:
    """Return matrix · moment for a full or a diagonal moment."""
    return matrix * moment if moment.ndim == 1 else matrix @ moment
