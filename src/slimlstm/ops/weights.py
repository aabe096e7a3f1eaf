"""What one direction of one LSTM layer consists of.

Dimensions: T time steps, B sequences, D directions, I input size, H hidden size, P what hh acts on (the projection size,
or H), r rank. Gates are stacked in PyTorch's order i, f, g, o.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError

Matrix = Tensor | tuple[Tensor, Tensor]
"""W [m, n], or its factors (U [m, r], V [r, n]) with W ≈ U V."""


class Direction(NamedTuple):
    """The weights of one direction: ih [4H, I], hh [4H, P], biases [4H] or None, projection hr [P, H] or None.

    The storages, "float32", "bfloat16" or "int8", are what the fused kernel keeps ih, and hh with hr, in; see
    :func:`rounded`. Other backends use the weights as they are.
    """

    ih: Matrix
    hh: Matrix
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None
    ih_storage: str = "float32"
    hh_storage: str = "float32"


class LayerOutput(NamedTuple):
    """``output`` [T, B, D P] or packed [N, D P]; the last states ``h`` [D, B, P] and ``c`` [D, B, H]."""

    output: Tensor
    h: Tensor
    c: Tensor


def shape_of(matrix: Matrix) -> tuple[int, int] | None:
    """(m, n), or None for factors that cannot be multiplied."""
    fits = isinstance(matrix, Tensor) or matrix[0].shape[1] == matrix[1].shape[0]
    return (rows(matrix), columns(matrix)) if fits else None


def rows(matrix: Matrix) -> int:
    """m, the number of rows of the matrix or of the product of its factors."""
    return matrix.shape[0] if isinstance(matrix, Tensor) else matrix[0].shape[0]


def columns(matrix: Matrix) -> int:
    """n, the number of columns of the matrix or of the product of its factors."""
    return matrix.shape[1] if isinstance(matrix, Tensor) else matrix[1].shape[1]


STORAGES = ("float32", "bfloat16", "int8")
"""What the fused kernel can keep weights in."""


def rounded(weight: Tensor, storage: str) -> Tensor:
    """The weight [m, n] as ``storage`` keeps it: in int8, every row is integers from -127 to 127 times a scale.

    What is rounded already stays as it is, to the last bit but one of the scale.

    Raises:
        SlimLSTMError: no storage of that name.
    """
    if storage not in STORAGES:
        raise SlimLSTMError(f"no storage is called {storage!r}; there are {', '.join(map(repr, STORAGES))}")
    if storage == "bfloat16":
        return weight.bfloat16().to(weight.dtype)
    if storage == "int8":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return torch.where(scale > 0, (weight / scale).round() * scale, 0.0)
    return weight
