"""Numbers about matrices and results: norms, spectra, energy, salient lines, efficiency. Draws nothing.

Equations are those of Winata et al. (2019, arXiv 1908.09982); W is an [m, n] matrix with entries w_ij.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import check_matrix, singular_values


@dataclass(frozen=True)
class Norms:
    """Norms of one matrix, from its column sums L_j = Σ_i |w_ij| and its singular values s_k.

    Attributes:
        l1: ‖W‖₁ = max_j L_j.
        l1_std: σ(‖W‖₁) = √(1/n Σ_j (L_j - L̄)²), the standard deviation of the column sums.
        l1_spread: Σ_j (L_j - L̄)², as the paper prints it, without 1/n and root.
        nuclear: ‖W‖_Nuc = Σ_k s_k.
    """

    l1: float
    l1_std: float
    l1_spread: float
    nuclear: float


def norms(matrix: Tensor) -> Norms:
    """The norms of a matrix [m, n], computed in float64.

    Raises:
        SlimLSTMError: the matrix is not a finite, non-empty, floating-point one.
    """
    check_matrix(matrix)
    sums = matrix.detach().double().abs().sum(0)
    spread = (sums - sums.mean()).square().sum()
    return Norms(
        l1=float(sums.max()),
        l1_std=float((spread / len(sums)).sqrt()),
        l1_spread=float(spread),
        nuclear=float(singular_values(matrix).sum()),
    )


def energy(spectrum: Tensor) -> Tensor:
    """What part of ‖W‖_F² the first r singular values hold, for r = 1, 2, ...: Σ_{k≤r} s_k² / Σ_k s_k².

    Args:
        spectrum: singular values [min(m, n)], largest first, from
            :func:`slimlstm.methods.singular_values`.

    Raises:
        SlimLSTMError: the spectrum is empty or holds only zeros.
    """
    squares = spectrum.double().square().cumsum(0)
    if len(squares) == 0 or float(squares[-1]) == 0.0:
        raise SlimLSTMError("a spectrum without a positive value has no energy to be shared out")
    return squares / squares[-1]


def block_maxima(matrix: Tensor, rows: int, columns: int, groups: int = 4) -> Tensor:
    """A matrix [m, n] to a picture of |W|: the largest entry of every block, in float32.

    Blocks are as alike in size as can be, neighbours sharing a line where they do not come out even, and none reaches over
    the border between two of the ``groups`` of m / groups rows, such as an LSTM's gates.

    Args:
        rows, columns: of the picture, at most; ``rows`` is rounded down to a multiple of ``groups``.

    Returns:
        [rows, columns], fewer where the matrix has fewer.

    Raises:
        SlimLSTMError: the matrix is not a finite, non-empty, floating-point one, the groups do not divide its rows, or the
            picture has fewer rows than groups or no columns.
    """
    check_matrix(matrix)
    m, n = matrix.shape
    if groups < 1 or m % groups or rows < groups or columns < 1:
        raise SlimLSTMError(f"{m} rows in {groups} groups cannot be drawn as {rows} rows and {columns} columns")
    size = (min(rows, m) // groups, min(columns, n))
    blocks = adaptive_max_pool2d(matrix.detach().float().abs().reshape(groups, m // groups, n), size)
    return blocks.flatten(0, 1)


@dataclass(frozen=True)
class Salient:
    """The rows and columns of a matrix that hold most of Σ |w|, largest first, and what part of it they hold."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    rows_hold: float
    columns_hold: float


def salient_lines(matrix: Tensor, share: float = 0.05) -> Salient:
    """The rows and columns with the largest sums of |w|, ``share`` of each, at least one.

    Where all entries are alike they hold ``share`` of the whole; the more, the more the matrix is made of lines.

    Raises:
        SlimLSTMError: the matrix is not a finite, non-empty, floating-point one, or holds only zeros; no share in (0, 1].
    """
    check_matrix(matrix)
    magnitudes = matrix.detach().double().abs()
    total = float(magnitudes.sum())
    if not 0.0 < share <= 1.0 or total == 0.0:
        raise SlimLSTMError(f"a share of {share} of the lines of a matrix with sum {total} has no largest ones")
    (rows_hold, rows), (columns_hold, columns) = (
        magnitudes.sum(1 - dim).topk(max(1, round(share * matrix.shape[dim]))) for dim in (0, 1)
    )
    return Salient(
        tuple(rows.tolist()), tuple(columns.tolist()), float(rows_hold.sum()) / total, float(columns_hold.sum()) / total
    )


def efficiency(metric: float, metric_dense: float, parameters: int, parameters_dense: int, lower: bool = False) -> float:
    """E(r), the loss of quality for every part of the parameters saved; lower is better, negative means improved.

    E = R(M, M') / R(P, P') where R(M, M') ≥ 0, else R(M, M') / (1 - R(P, P')). R(P, P') = (P - P') / P of the whole model's
    parameters, and R(M, M') = (M - M') / M, or (M' - M) / M where a ``lower`` metric is better, such as perplexity.

    Raises:
        SlimLSTMError: the dense value is not positive, or the parameters are not fewer, or none.
    """
    if metric_dense <= 0.0:
        raise SlimLSTMError(f"a relative loss needs a positive dense value, not {metric_dense}")
    if not 0 < parameters < parameters_dense:
        what = "none is left" if parameters <= 0 else "none is saved"
        raise SlimLSTMError(
            f"of {parameters_dense} parameters {what}, with {parameters}; E(r) is of models between the two"
        )
    saved = (parameters_dense - parameters) / parameters_dense
    loss = (metric - metric_dense if lower else metric_dense - metric) / metric_dense
    return loss / saved if loss >= 0.0 else loss / (1.0 - saved)
