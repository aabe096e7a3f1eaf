"""The weights of a layer, direction by direction, and its outputs.

Dimensions: T time steps, B sequences, N rows of a packed batch, D directions, I input size, H hidden size, P output size
(the projection size, or H without a projection), r rank. Gates are stacked in PyTorch's order i, f, g, o.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Matrix = Tensor | tuple[Tensor, Tensor]
"""W [m, n], or its factors (U [m, r], V [r, n]) with W ≈ U V."""


def rebuilt(matrix: Matrix) -> Tensor:
    """Return W, or the product U V."""
    return matrix if isinstance(matrix, Tensor) else matrix[0] @ matrix[1]


def parts_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """Return the tensors of a matrix: W alone, or U and V.

    Examples:
        >>> [tuple(part.shape) for part in parts_of((torch.zeros(8, 2), torch.zeros(2, 3)))]
        [(8, 2), (2, 3)]
    """
    return (matrix,) if isinstance(matrix, Tensor) else matrix


class Direction(NamedTuple):
    """The weights of one direction: ih [4H, I], hh [4H, P], biases [4H] or None, projection hr [P, H] or None.

    The storages, "float32", "bfloat16" or "int8", are the fused kernel's formats for ih, and for hh with hr. Other backends
    use the weights as they are. Cells are clipped to [-cell_clip, cell_clip] and projected outputs to
    [-proj_clip, proj_clip]; None means no clipping.
    """

    ih: Matrix
    hh: Matrix
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None
    ih_storage: str = "float32"
    hh_storage: str = "float32"
    cell_clip: float | None = None
    proj_clip: float | None = None


def flat(directions: Sequence[Direction]) -> list[Tensor | None]:
    """Return the weights in the kernel's order, seven for each direction: ih V and U, hh V and U, two biases, hr.

    For a dense matrix, V is None, and the matrix takes the place of U.
    """
    found: list[Tensor | None] = []
    for ih, hh, bias_ih, bias_hh, hr, *_ in directions:
        ih_u, ih_v = ih if isinstance(ih, tuple) else (ih, None)
        hh_u, hh_v = hh if isinstance(hh, tuple) else (hh, None)
        found += (ih_v, ih_u, hh_v, hh_u, bias_ih, bias_hh, hr)
    return found


def unflattened(weights: Sequence[Tensor | None], storages: Sequence[str], clips: Sequence[float]) -> list[Direction]:
    """Return the directions whose :func:`flat` weights, and two storages and two bounds each, are given."""
    directions: list[Direction] = []
    for index in range(len(weights) // 7):
        ih_v, ih, hh_v, hh, bias_ih, bias_hh, hr = weights[7 * index : 7 * index + 7]
        ih_storage, hh_storage = storages[2 * index : 2 * index + 2]
        bounds = [None if math.isinf(bound) else bound for bound in clips[2 * index : 2 * index + 2]]
        matrices = _matrix(ih, ih_v), _matrix(hh, hh_v)
        directions.append(Direction(*matrices, bias_ih, bias_hh, hr, ih_storage, hh_storage, *bounds))
    return directions


def _matrix(u: Tensor | None, v: Tensor | None) -> Any:
    return u if v is None else (u, v)


def wants_gradients(x: Tensor, states: Sequence[Tensor], directions: Sequence[Direction]) -> bool:
    """Return whether PyTorch records gradients of this layer."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in (x, *states, *flat(directions)))


def is_clipped(directions: Sequence[Direction]) -> bool:
    """Return whether any direction clips its cells or its projected outputs."""
    return any(weights.cell_clip is not None or weights.proj_clip is not None for weights in directions)


class CachedLayer(tuple[Direction, ...]):
    """The directions of a layer whose weights are all parameters, and their packed form, which calls reuse."""

    packed: Any = None
    """The :class:`slimlstm.ops.packing.PackedLayer` of these weights, None before the first call."""
    tensors: Sequence[Tensor] = ()
    """The weights that were packed."""
    exposures: int = 1
    """Number of occasions on which somebody may have edited the weights in a way that PyTorch does not count."""
    checked: int = 0
    """The value of ``exposures`` when all weights were last compared with the packed ones."""


class LayerOutput(NamedTuple):
    """``output`` [T, B, D P] or packed [N, D P], and the last states ``h`` [D, B, P] and ``c`` [D, B, H]."""

    output: Tensor
    h: Tensor
    c: Tensor


def first_states(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> tuple[Tensor, Tensor]:
    """Return h0 [D, B, P] and c0 [D, B, H], zeros if they are None."""
    if h0 is not None and c0 is not None:
        return h0, c0
    batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0]) if len(batch_sizes) else 0
    hh, number = directions[0].hh, len(directions)
    return x.new_zeros(number, batch, columns(hh)), x.new_zeros(number, batch, rows(hh) // 4)


def shape_of(matrix: Matrix) -> tuple[int, int] | None:
    """Return (m, n), or None for factors that cannot be multiplied."""
    fits = isinstance(matrix, Tensor) or matrix[0].shape[1] == matrix[1].shape[0]
    return (rows(matrix), columns(matrix)) if fits else None


def rows(matrix: Matrix) -> int:
    """Return m, the number of rows of the matrix or of the product of its factors."""
    return matrix.shape[0] if isinstance(matrix, Tensor) else matrix[0].shape[0]


def columns(matrix: Matrix) -> int:
    """Return n, the number of columns of the matrix or of the product of its factors."""
    return matrix.shape[1] if isinstance(matrix, Tensor) else matrix[1].shape[1]
