"""Magnitude pruning, the paper's baseline: select the largest weights of a matrix and zero all others."""

from __future__ import annotations

from torch import Tensor

from slimlstm.errors import SlimLSTMError


def magnitude_mask(matrix: Tensor, nonzeros: int) -> Tensor:
    """Return a mask that selects the ``nonzeros`` entries of largest magnitude; among equal ones, the first in row order.

    Args:
        matrix: [m, n], of any floating dtype.
        nonzeros: the number of entries to select, from 1 to m n.

    Returns:
        A boolean tensor [m, n], True where an entry is selected.

    Raises:
        SlimLSTMError: ``nonzeros`` is not an int from 1 to m n, or the matrix holds NaN.

    Examples:
        >>> import torch
        >>> magnitude_mask(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), 2)
        tensor([[False,  True],
                [ True, False]])
    """
    size = matrix.numel()
    if bool(matrix.isnan().any()):
        raise SlimLSTMError("the matrix holds NaN, which has no magnitude; check whether training was stable")
    if type(nonzeros) is not int or not 1 <= nonzeros <= size:
        raise SlimLSTMError(f"the nonzeros of a {list(matrix.shape)} matrix must number 1 to {size}, not {nonzeros}")
    magnitudes = matrix.detach().abs().flatten()
    threshold = magnitudes.kthvalue(size - nonzeros + 1).values
    above = magnitudes > threshold
    ties = magnitudes == threshold
    ties &= ties.cumsum(0) <= nonzeros - above.sum()
    return (above | ties).view(matrix.shape)


def nonzeros_at_rank(shape: tuple[int, int], rank: int) -> int:
    """Return the number of weights in the factors of rank r of an m x n matrix: r (m + n), at most m n.

    Examples:
        >>> nonzeros_at_rank((4600, 1150), 10)
        57500
    """
    m, n = shape
    return min(rank * (m + n), m * n)
