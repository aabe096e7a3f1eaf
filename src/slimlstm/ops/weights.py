"""What one direction of one LSTM layer consists of.

Dimensions: T time steps, B sequences, D directions, I input size, H hidden size, P what hh acts on (the projection size,
or H), r rank. Gates are stacked in PyTorch's order i, f, g, o.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Matrix = Tensor | tuple[Tensor, Tensor]
"""W [m, n], or its factors (U [m, r], V [r, n]) with W ≈ U V."""


class Direction(NamedTuple):
    """The weights of one direction: ih [4H, I], hh [4H, P], biases [4H] or None, projection hr [P, H] or None."""

    ih: Matrix
    hh: Matrix
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None


class LayerOutput(NamedTuple):
    """``output`` [T, B, D P] or packed [N, D P]; the last states ``h`` [D, B, P] and ``c`` [D, B, H]."""

    output: Tensor
    h: Tensor
    c: Tensor


def rows(matrix: Matrix) -> int:
    """m, the number of rows of the matrix or of the product of its factors."""
    return matrix.shape[0] if isinstance(matrix, Tensor) else matrix[0].shape[0]


def columns(matrix: Matrix) -> int:
    """n, the number of columns of the matrix or of the product of its factors."""
    return matrix.shape[1] if isinstance(matrix, Tensor) else matrix[1].shape[1]
