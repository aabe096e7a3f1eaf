"""Semi-nonnegative matrix factorisation: W ≈ U V with V ≥ 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimlstm.methods.factors import Factors, OnIteration, as_factors, balanced
from slimlstm.methods.matrices import check_matrix, check_rank
from slimlstm.methods.svd import leading_eigenvectors

_DIRECTION_STEPS = 500
"""Number of alternating projections that find the positive direction."""
_SMALLEST_ENTRY = 0.05
"""Smallest entry of the positive direction, relative to its root mean square."""


def semi_nmf(
    matrix: Tensor,
    rank: int,
    on_iteration: OnIteration | None = None,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 500,
) -> Factors:
    """Return a semi-NMF of W [m, n]: W ≈ U V with V ≥ 0 and U free.

    Source: Ding, Li and Jordan 2010, TPAMI 32(1), equations 11 and 12, started from an SVD that is turned into a semi-NMF
    without loss (Gillis and Kumar 2015). Exact least-squares solutions for U alternate with multiplicative updates of V;
    neither raises the error. The error at rank r is therefore never above the error of the SVD at rank r - 1, except for
    the rounding of the factors. In bfloat16 and float16 that rounding is large, because non-negative rows that represent
    signed ones cancel. For the same reason gradient descent needs small steps; ``svd(u @ v, rank)`` gives factors that
    train well.

    Args:
        matrix: W [m, n].
        rank: r, from 1 to min(m, n).
        on_iteration: called after each iteration.
        tolerance: stop when an iteration lowers the squared error by less than this fraction of it.
        max_iterations: stop after this many iterations.

    Raises:
        SlimLSTMError: the matrix is empty, not finite or not of a floating-point dtype, or the rank does not fit.

    Examples:
        >>> import torch
        >>> factors = semi_nmf(torch.tensor([[1.0, 2.0], [-2.0, -4.0]]), rank=1)
        >>> bool((factors.v >= 0).all()), round(factors.residual, 6)
        (True, 0.0)
    """
    check_matrix(matrix)
    check_rank(matrix, rank)
    w = matrix.detach().double()
    # With U = W Vᵀ (V Vᵀ)⁻¹ an iteration needs only WᵀW [n, n], which is smaller than W.
    gram = w.T @ w
    total = float(gram.trace())
    v = best = _nonnegative_start(gram, rank)
    best_error, iterations, converged = math.inf, 0, False
    while not converged and iterations < max_iterations:
        normal = v @ v.T
        utw = _solve_psd(normal, v @ gram)
        utu = _solve_psd(normal, v @ utw.T)
        error = max(total - float((utw * v).sum()), 0.0)
        converged = best_error - error <= tolerance * best_error < math.inf or error <= 1e-14 * total
        if error < best_error:
            best, best_error = v, error
        v = _update_nonnegative(v, utw, (utu + utu.T) / 2)
        iterations += 1
        if on_iteration is not None:
            on_iteration(iterations, max_iterations)
    u = _solve_psd(best @ best.T, best @ w.T).T
    return as_factors(matrix, *balanced(u, best), iterations, converged)


def _nonnegative_start(gram: Tensor, rank: int) -> Tensor:
    """Return V ≥ 0 [r, n] whose rows span a positive direction p and the best r - 1 directions beside it.

    Any rows b_i become non-negative as b_i + x_i p, and p itself, as one more row, undoes the shift: Gillis and Kumar
    (2015, theorem 1) make a semi-NMF of rank r from an SVD of rank r - 1 in this way, with a constant p. A p near the
    span of the leading r singular vectors costs least; alternating projections on that span and on the positive orthant
    find it.
    """
    n = len(gram)
    leading = leading_eigenvectors(gram, rank)
    p = gram.new_ones(n)
    for _ in range(_DIRECTION_STEPS):
        projected = (leading @ (leading.T @ p)).clamp_min(0.0)
        if float(projected.norm()) == 0.0:
            break
        p = projected / projected.norm()
    # Entries near zero would need large shifts x_i, and U V would cancel in low precision.
    p = p.clamp_min(_SMALLEST_ENTRY / n**0.5)
    p = p / p.norm()
    gram_p = gram @ p
    deflated = gram - torch.outer(p, gram_p) - torch.outer(gram_p, p) + torch.outer(p, p) * (p @ gram_p)
    rows = leading_eigenvectors(deflated, rank - 1).T
    shifts = (-rows / p).max(dim=1, keepdim=True).values
    return torch.cat([(rows + shifts * p).clamp_min(0.0), p[None]])


def _update_nonnegative(v: Tensor, utw: Tensor, utu: Tensor) -> Tensor:
    """Return V ⊙ √(((UᵀW)⁺ + (UᵀU)⁻ V) / ((UᵀW)⁻ + (UᵀU)⁺ V)), equation 12; zeros and 0/0 stay zero."""
    positive = utw.clamp_min(0.0) + (-utu).clamp_min(0.0) @ v
    negative = (-utw).clamp_min(0.0) + utu.clamp_min(0.0) @ v
    ratio = torch.where(negative > 0, positive / negative.clamp_min(torch.finfo(v.dtype).tiny), 1.0)
    return v * ratio.sqrt()


def _solve_psd(a: Tensor, b: Tensor) -> Tensor:
    """Return A⁺ B for a positive semi-definite A: by Cholesky, or by the pseudo-inverse where A is ill conditioned."""
    factor, info = torch.linalg.cholesky_ex(a)
    pivots = factor.diagonal()
    if int(info) == 0 and float(pivots.min()) > 1e-6 * float(pivots.max()):
        return torch.cholesky_solve(b, factor)
    return torch.linalg.pinv(a, hermitian=True) @ b
