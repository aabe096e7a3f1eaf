"""Numbers about matrices and results: norms, energy, salient lines, efficiency.

Equations are from Winata et al. (2019, arXiv 1908.09982); W is an [m, n] matrix with entries w_ij.
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
    """Return the norms of a matrix [m, n], computed in float64.

    Raises:
        SlimLSTMError: the matrix is empty, not finite or not of a floating-point dtype.

    Examples:
        >>> import torch
        >>> norms(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).l1
        4.0
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
    """Return the fraction of ‖W‖_F² in the first r singular values, for r = 1, 2, ...: Σ_{k≤r} s_k² / Σ_k s_k².

    Args:
        spectrum: singular values [min(m, n)], largest first, from
            :func:`slimlstm.methods.singular_values`.

    Raises:
        SlimLSTMError: the spectrum is empty or holds only zeros.

    Examples:
        >>> import torch
        >>> [round(value, 2) for value in energy(torch.tensor([2.0, 1.0])).tolist()]
        [0.8, 1.0]
    """
    squares = spectrum.double().square().cumsum(0)
    if len(squares) == 0 or float(squares[-1]) == 0.0:
        raise SlimLSTMError(
            "a spectrum without a positive value has no energy; give the singular values of a matrix that is not zero"
        )
    return squares / squares[-1]


def block_maxima(matrix: Tensor, rows: int, columns: int, groups: int = 4) -> Tensor:
    """Return a picture of |W|, W [m, n]: the largest entry of every block, in float32.

    Blocks differ in size by at most one line; neighbours overlap by a line where the division leaves a remainder. No block
    crosses the border between two ``groups`` of m / groups rows, such as an LSTM's gates.

    Args:
        matrix: W.
        rows, columns: largest size of the picture; ``rows`` is rounded down to a multiple of ``groups``.
        groups: of rows.

    Returns:
        The picture [rows, columns], smaller if the matrix is.

    Raises:
        SlimLSTMError: the matrix is empty, not finite or not of a floating-point dtype; the groups do not divide its rows;
            or the picture has fewer rows than groups, or no columns.

    Examples:
        >>> import torch
        >>> block_maxima(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), rows=1, columns=2, groups=1).tolist()
        [[1.0, 3.0]]
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
    """Rows and columns of a matrix with the largest sums of |w|, largest first, and their fractions of Σ |w|."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    rows_hold: float
    columns_hold: float


def salient_lines(matrix: Tensor, share: float = 0.05) -> Salient:
    """Return the rows and columns with the largest sums of |w|, the fraction ``share`` of each, at least one.

    In a matrix of equal entries they hold ``share`` of the whole; the more they hold, the more the weights gather in lines.

    Raises:
        SlimLSTMError: the matrix is empty, not finite, not of a floating-point dtype, or zero; or the share is not in
            (0, 1].

    Examples:
        >>> import torch
        >>> salient_lines(torch.tensor([[1.0, 1.0], [1.0, 5.0]]), share=0.5).rows
        (1,)
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
    """Return E(r), the relative loss of quality per fraction of parameters saved; negative means improved.

    E = R(M, M') / R(P, P') where R(M, M') ≥ 0, else R(M, M') / (1 - R(P, P')). R(P, P') = (P - P') / P of the whole model's
    parameters, and R(M, M') = (M - M') / M, or (M' - M) / M if ``lower`` values of the metric are better, such as
    perplexity's.

    Raises:
        SlimLSTMError: the dense value is not positive, or the parameters are none, or not fewer.

    Examples:
        >>> round(efficiency(80.0, 100.0, 60, 100), 3)
        0.5
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
