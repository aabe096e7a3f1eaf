"""Check matrices, and compare them with their approximations."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def singular_values(matrix: Tensor) -> Tensor:
    """Return all min(m, n) singular values of a matrix [m, n], largest first, in float64.

    Raises:
        SlimLSTMError: the matrix is empty, not finite or not of a floating-point dtype.

    Examples:
        >>> singular_values(torch.diag(torch.tensor([1.0, 3.0])))
        tensor([3., 1.], dtype=torch.float64)
    """
    check_matrix(matrix)
    return torch.linalg.svdvals(matrix.detach().double())


def relative_error(matrix: Tensor, approximation: Tensor) -> float:
    """Return ‖W - W'‖_F / ‖W‖_F, computed in float64; 0 where both are zero.

    Examples:
        >>> relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
        0.8
    """
    w = matrix.detach().double()
    norm, difference = w.norm(), (w - approximation.detach().double()).norm()
    return 0.0 if float(difference) == 0.0 else float(difference / norm)


def sha256_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's numbers, row by row, in its own dtype (little-endian)."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def damping_of(moment: Tensor, share: float) -> float:
    """Return ``share`` times the mean of the diagonal of a moment, [n, n] or the diagonal [n]; 1 where that is zero.

    Examples:
        >>> damping_of(torch.tensor([1.0, 3.0]), 0.5)
        1.0
    """
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    return share * float(diagonal.mean()) or 1.0


def damped(moment: Tensor, share: float) -> Tensor:
    """Return a moment [n, n] with :func:`damping_of` added to its diagonal, so that rounding leaves it invertible."""
    return moment + damping_of(moment, share) * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def check_matrix(matrix: Tensor) -> None:
    """Raise :class:`SlimLSTMError` unless ``matrix`` is a finite, non-empty, floating-point matrix [m, n]."""
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise SlimLSTMError(f"a matrix [m, n] with m, n >= 1 is needed, not a tensor of shape {list(matrix.shape)}")
    if matrix.is_meta:
        raise SlimLSTMError("the matrix is on the meta device and holds no numbers; load the weights first")
    if matrix.dtype not in _DTYPES:
        raise SlimLSTMError(
            f"a floating-point matrix of at least 16 bits is needed, not {matrix.dtype}; convert or dequantise it first"
        )
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise SlimLSTMError(f"the matrix holds {bad} NaN or infinite numbers of {matrix.numel()}; was training stable?")


def check_rank(matrix: Tensor, rank: int) -> None:
    """Raise :class:`SlimLSTMError` unless ``rank`` is an int in [1, min(m, n)]."""
    m, n = matrix.shape
    if type(rank) is not int or not 1 <= rank <= min(m, n):
        raise SlimLSTMError(f"the rank of a {m} x {n} matrix has to be an int from 1 to {min(m, n)}, not {rank!r}")
