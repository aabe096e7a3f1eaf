"""Matrix to factors: W [m, n] ≈ U [m, r] V [r, n]. Knows no modules.

Every solver computes in float64 and returns factors in the matrix's own dtype, on its device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError

_DIRECTION_STEPS = 500
_SMALLEST_ENTRY = 0.05

DAMPING = 1e-3
"""Of :class:`WeightedSVD`."""

OnIteration = Callable[[int, int], None]
"""Called as ``(iterations done, most iterations)`` while an iterative solver runs."""


@dataclass(frozen=True)
class Factors:
    """What a solver found: W ≈ ``u`` [m, r] ``v`` [r, n], and how it went.

    ``residual`` is ‖W - U V‖_F / ‖W‖_F of the factors as returned, rounding to their dtype included (0 where W = 0).
    ``converged`` is False where an iterative solver ran out of iterations; a direct one has 0 ``iterations``.
    """

    u: Tensor
    v: Tensor
    residual: float
    iterations: int = 0
    converged: bool = True

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.u.shape[1]


def svd(matrix: Tensor, rank: int, on_iteration: OnIteration | None = None) -> Factors:
    """The best rank-r approximation in the Frobenius norm: ‖W - U V‖² = Σ_{i>r} σ_i² (Eckart and Young 1936).

    The singular values are shared out evenly, U = U_r Σ_r^½ and V = Σ_r^½ V_rᵀ, so that both factors have the same
    scale when they are trained further or quantised. ``on_iteration`` is never called.

    Raises:
        SlimLSTMError: the matrix is not a finite, non-empty, floating-point one, or the rank is not in [1, min(m, n)].
    """
    check_matrix(matrix)
    check_rank(matrix, rank)
    solve = _truncated_svd if matrix.dtype == torch.float64 else _truncated_svd_by_gram
    return _result(matrix, *solve(matrix.detach().double(), rank))


def semi_nmf(
    matrix: Tensor,
    rank: int,
    on_iteration: OnIteration | None = None,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 500,
) -> Factors:
    """Semi-NMF: W ≈ U V with V ≥ 0 and U free (Ding, Li, Jordan 2010, TPAMI 32(1), equations 11 and 12).

    Starts from an SVD that was turned into a semi-NMF without loss (Gillis and Kumar 2015), and then alternates the exact
    least-squares U with multiplicative updates of V, neither of which can raise the error. So the error at rank r is
    never above that of the SVD at rank r - 1, up to the rounding of the factors, which in bfloat16 and float16 is much:
    non-negative rows that stand for signed ones cancel each other out. For the same reason gradient descent needs small
    steps along them; :func:`svd` of U V gives factors that train well. It stops when an iteration lowers the squared error
    by less than ``tolerance`` times itself.

    Raises:
        SlimLSTMError: as :func:`svd`.
    """
    check_matrix(matrix)
    check_rank(matrix, rank)
    w = matrix.detach().double()
    # With U = W Vᵀ (V Vᵀ)⁻¹ everything that an iteration needs follows from WᵀW [n, n], which is smaller than W.
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
    return _result(matrix, *_balanced(u, best), iterations, converged)


class WeightedSVD:
    """Every rank's best approximation W' of W [m, n] where the loss of W' is tr((W - W')ᵀ G (W - W') A).

    With A = R Rᵀ that is ‖G^½ (W - W') R‖_F², and W' = W R V_r V_rᵀ R⁻¹ with V_r the leading eigenvectors of (W R)ᵀ G W R:
    what G^½ W R keeps when its SVD is truncated, with the weights taken off again (for A alone DRONE, Chen et al. 2021).
    G need not be invertible.

    Args:
        matrix: W [m, n].
        inputs: A, the second moment of W's inputs: [n, n] or, of a diagonal A, [n].
        gradients: G, that of the gradients at W's outputs: [m, m] or [m]; None for the identity.

    Where no input ever went A says nothing, and W' would be free to be anything; so λ = ``DAMPING`` times the mean of A's
    diagonal is added to it.

    Raises:
        SlimLSTMError: as :func:`svd`, and moments that do not fit the matrix or are not finite.
    """

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
        root, self._unroot = _roots(inputs.to(matrix.device, torch.float64))
        self._weighted = _times(matrix.detach().double(), root)
        outer = self._weighted
        if gradients is not None:
            outer = _times(outer.T, gradients.to(matrix.device, torch.float64)).T
        values, vectors = torch.linalg.eigh(self._weighted.T @ outer)
        self.losses = values.flip(0).clamp_min(0.0)[: min(m, n)]
        """[min(m, n)]: how much leaving out each direction adds to the loss, largest first."""
        self._directions = vectors.flip(1)

    def factors(self, rank: int) -> Factors:
        """W' = U V of this rank.

        Raises:
            SlimLSTMError: the rank is not in [1, min(m, n)].
        """
        check_rank(self.matrix, rank)
        directions = self._directions[:, :rank]
        u, v = self._weighted @ directions, _times(directions.T, self._unroot)
        return _result(self.matrix, *_balanced(u, v))


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """A^½ and A^-½ of a damped A, [n, n] or [n]."""
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    damping = DAMPING * float(diagonal.mean()) or 1.0
    if moment.ndim == 1:
        root = (moment + damping).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh(moment)
    root = (values.clamp_min(0.0) + damping).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


def _times(matrix: Tensor, moment: Tensor) -> Tensor:
    """matrix · moment, the latter full or diagonal."""
    return matrix * moment if moment.ndim == 1 else matrix @ moment


SOLVERS: dict[str, Callable[[Tensor, int, OnIteration | None], Factors]] = {"svd": svd, "semi-nmf": semi_nmf}
"""Every method that needs nothing but the matrix, by the name that plans use."""


def singular_values(matrix: Tensor) -> Tensor:
    """All min(m, n) singular values, largest first, in float64.

    Raises:
        SlimLSTMError: the matrix is not a finite, non-empty, floating-point one.
    """
    check_matrix(matrix)
    return torch.linalg.svdvals(matrix.detach().double())


def relative_error(matrix: Tensor, approximation: Tensor) -> float:
    """‖W - W'‖_F / ‖W‖_F in float64; 0 where both are zero."""
    w = matrix.detach().double()
    norm, difference = w.norm(), (w - approximation.detach().double()).norm()
    return 0.0 if float(difference) == 0.0 else float(difference / norm)


def check_matrix(matrix: Tensor) -> None:
    """Raises :class:`SlimLSTMError` unless ``matrix`` is a finite, non-empty, floating-point [m, n] matrix."""
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise SlimLSTMError(f"a matrix [m, n] with m, n >= 1 is needed, not a tensor of shape {list(matrix.shape)}")
    if matrix.is_meta:
        raise SlimLSTMError("the matrix is on the meta device and holds no numbers; load the weights first")
    if not matrix.is_floating_point():
        raise SlimLSTMError(f"a floating-point matrix is needed, not {matrix.dtype}; dequantise it first")
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise SlimLSTMError(f"the matrix holds {bad} NaN or infinite numbers of {matrix.numel()}; was training stable?")


def check_rank(matrix: Tensor, rank: int) -> None:
    """Raises :class:`SlimLSTMError` unless ``rank`` is an int in [1, min(m, n)]."""
    m, n = matrix.shape
    if type(rank) is not int or not 1 <= rank <= min(m, n):
        raise SlimLSTMError(f"the rank of a {m} x {n} matrix has to be an int from 1 to {min(m, n)}, not {rank!r}")


def _truncated_svd(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _truncated_svd_by_gram(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same several times faster, through the eigenvectors of WᵀW or WWᵀ, whichever is smaller.

    In float64 it resolves singular values down to 1e-8 of the largest, less than what rounding W to float32 blurs.
    """
    if w.shape[0] < w.shape[1]:
        v, u = _truncated_svd_by_gram(w.T, rank)
        return u.T, v.T
    v = _leading_eigenvectors(w.T @ w, rank)
    u = w @ v
    root = u.norm(dim=0).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    return u * inverse, root[:, None] * v.T


def _leading_eigenvectors(gram: Tensor, count: int) -> Tensor:
    """Eigenvectors [n, count] of a symmetric [n, n] matrix, largest eigenvalue first."""
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]


def _nonnegative_start(gram: Tensor, rank: int) -> Tensor:
    """V ≥ 0 [r, n] whose row space holds a positive direction p and the best r - 1 directions beside it.

    Any rows b_i become non-negative as b_i + x_i p, which p itself, as one more row, can undo: that is how Gillis and
    Kumar (2015, theorem 1) make a semi-NMF of rank r from an SVD of rank r - 1, with p constant. A p close to the
    leading r singular vectors costs least; it is found by projecting in turn on their span and on the positive orthant.
    """
    n = len(gram)
    leading = _leading_eigenvectors(gram, rank)
    p = gram.new_ones(n)
    for _ in range(_DIRECTION_STEPS):
        projected = (leading @ (leading.T @ p)).clamp_min(0.0)
        if float(projected.norm()) == 0.0:
            break
        p = projected / projected.norm()
    # Entries near zero would need large shifts x_i, and U and V would cancel each other out in low precision.
    p = p.clamp_min(_SMALLEST_ENTRY / n**0.5)
    p = p / p.norm()
    gram_p = gram @ p
    deflated = gram - torch.outer(p, gram_p) - torch.outer(gram_p, p) + torch.outer(p, p) * (p @ gram_p)
    rows = _leading_eigenvectors(deflated, rank - 1).T
    shifts = (-rows / p).max(dim=1, keepdim=True).values
    return torch.cat([(rows + shifts * p).clamp_min(0.0), p[None]])


def _update_nonnegative(v: Tensor, utw: Tensor, utu: Tensor) -> Tensor:
    """V ⊙ √(((UᵀW)⁺ + (UᵀU)⁻ V) / ((UᵀW)⁻ + (UᵀU)⁺ V)), equation 12; a zero stays zero, as does a 0/0."""
    positive = utw.clamp_min(0.0) + (-utu).clamp_min(0.0) @ v
    negative = (-utw).clamp_min(0.0) + utu.clamp_min(0.0) @ v
    ratio = torch.where(negative > 0, positive / negative.clamp_min(torch.finfo(v.dtype).tiny), 1.0)
    return v * ratio.sqrt()


def _solve_psd(a: Tensor, b: Tensor) -> Tensor:
    """A⁺ B for a positive semi-definite A: Cholesky where A is well conditioned, the pseudo-inverse elsewhere."""
    factor, info = torch.linalg.cholesky_ex(a)
    pivots = factor.diagonal()
    if int(info) == 0 and float(pivots.min()) > 1e-6 * float(pivots.max()):
        return torch.cholesky_solve(b, factor)
    return torch.linalg.pinv(a, hermitian=True) @ b


def _balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with ‖u_i‖ = ‖v_i‖ for every column of U and row of V, as :func:`svd` has it."""
    left, right = u.norm(dim=0), v.norm(dim=1)
    scale = torch.where((left > 0) & (right > 0), (left / right).sqrt(), 1.0)
    return u / scale, scale[:, None] * v


def _result(matrix: Tensor, u: Tensor, v: Tensor, iterations: int = 0, converged: bool = True) -> Factors:
    u, v = u.to(matrix.dtype), v.to(matrix.dtype)
    residual = relative_error(matrix, u.double() @ v.double())
    return Factors(u.contiguous(), v.contiguous(), residual, iterations, converged)
