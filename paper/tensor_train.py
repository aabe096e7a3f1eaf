"""Recurrent matrices as tensor trains (Oseledets 2011; for LSTMs, Yang et al. 2017), the paper's TT-LSTM baseline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrize


def three_factors(size: int) -> list[int]:
    """Return three factors of ``size``, as near to each other as possible, largest first.

    Examples:
        >>> three_factors(1150)
        [23, 10, 5]
    """
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    triples = itertools.combinations_with_replacement(divisors, 3)
    return sorted(min((triple for triple in triples if math.prod(triple) == size), key=sum), reverse=True)


class TensorTrain(nn.Module):
    """Parametrization of a matrix [m, n] as the product of three cores [r, m_k, n_k, r'], with weight drop.

    Args:
        shape: m and n.
        share: the cores' share of the matrix's parameters, at most.
        drop: dropout rate of the matrix's entries during training.
    """

    def __init__(self, shape: tuple[int, int], share: float, drop: float) -> None:
        super().__init__()
        (a, b, c), (d, e, f) = map(three_factors, shape)
        # Ranks count twice at the middle core, so small factors there allow high ranks.
        self.shape, self.share, self.drop = (a, c, b, e, f, d), share, drop

    def forward(self, *cores: Tensor) -> Tensor:
        return dropout(_matrix(cores), self.drop, self.training)

    def right_inverse(self, matrix: Tensor) -> list[Tensor]:
        """Return cores whose product approximates ``matrix`` and has its Frobenius norm."""
        cores: Any = _decompose(matrix.reshape(self.shape), self.share)
        # Cores of a random matrix hold little of its norm, but training should start from that norm.
        scale = matrix.norm() / _matrix(cores).norm()
        return [core * scale ** (1 / len(cores)) for core in cores]


def tensor_train_(lstms: Iterable[nn.Module], share: float, weight_drop: float) -> None:
    """Turn the matrices of single-layer LSTMs into tensor trains, in place; ``weight_drop`` applies to hh alone."""
    for lstm in lstms:
        for name, drop in (("weight_ih_l0", 0.0), ("weight_hh_l0", weight_drop)):
            rows, columns = cast(Tensor, getattr(lstm, name)).shape
            parametrize.register_parametrization(lstm, name, TensorTrain((rows, columns), share, drop))


def _decompose(tensor: Tensor, share: float) -> Any:
    import tensorly  # pyright: ignore[reportMissingImports]
    from tensorly.decomposition import tensor_train_matrix  # pyright: ignore[reportMissingImports]

    tensorly.set_backend("pytorch")
    return tensor_train_matrix(tensor, share).factors


def _matrix(cores: Any) -> Tensor:
    from tensorly.tt_matrix import tt_matrix_to_matrix  # pyright: ignore[reportMissingImports]

    return cast(Any, tt_matrix_to_matrix)(cores)
