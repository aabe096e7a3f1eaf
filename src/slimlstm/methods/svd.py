"""Truncated singular value decomposition."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slimlstm.methods.factors import Factors, as_factors
from slimlstm.methods.matrices import check_matrix, check_rank


def svd(matrix: Tensor, rank: int) -> Factors:
    """Return the best rank-r approximation of W [m, n] in the Frobenius norm: ‖W - U V‖² = Σ_{i>r} σ_i².

    Source: Eckart and Young 1936. The singular values are split evenly, U = U_r Σ_r^½ and V = Σ_r^½ V_rᵀ, so that both
    factors have the same scale in further training and in quantisation.

    Args:
        matrix: W [m, n], of any floating-point dtype; the factors have the same dtype.
        rank: r, from 1 to min(m, n).

    Raises:
        SlimLSTMError: the matrix is empty, not finite or not of a floating-point dtype, or the rank is not in
            [1, min(m, n)].

    Examples:
        >>> factors = svd(torch.diag(torch.tensor([4.0, 3.0])), rank=1)
        >>> factors.rank, round(factors.residual, 3)
        (1, 0.6)
    """
    check_matrix(matrix)
    check_rank(matrix, rank)
    solve = _truncated_svd if matrix.dtype == torch.float64 else _truncated_svd_by_gram
    u, v, losses = solve(matrix.detach().double(), rank)
    return replace(as_factors(matrix, u, v), losses=losses)


def leading_eigenvectors(gram: Tensor, count: int) -> Tensor:
    """Return the eigenvectors [n, count] of the largest eigenvalues of a symmetric [n, n] matrix, largest first."""
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]


def _truncated_svd(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank], values.square()


def _truncated_svd_by_gram(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same factors several times faster, from the eigenvectors of WᵀW or WWᵀ, whichever is smaller.

    In float64 this resolves singular values down to 1e-8 of the largest, which is finer than the rounding of W to float32.
    """
    if w.shape[0] < w.shape[1]:
        v, u, losses = _truncated_svd_by_gram(w.T, rank)
        return u.T, v.T, losses
    values, vectors = torch.linalg.eigh(w.T @ w)
    v = vectors.flip(1)[:, :rank]
    u = w @ v
    root = u.norm(dim=0).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    return u * inverse, root[:, None] * v.T, values.flip(0).clamp_min(0.0)
