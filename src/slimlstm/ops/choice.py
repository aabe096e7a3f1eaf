"""Choose a backend: the fused kernel wherever it can run, else the fastest of PyTorch's operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from slimlstm.ops import fused, native, plain
from slimlstm.ops.plain import Choice
from slimlstm.ops.weights import CachedLayer, Direction, flat

_PARAMETER_TYPES: set[type] = {Parameter, type(None)}
_FUSED = Choice("fused", "the kernel for evaluation on the CPU")


def choose_backend(
    x: Tensor,
    batch_sizes: Tensor | None,
    directions: Sequence[Direction],
    states: Sequence[Tensor] = (),
    training: bool = False,
) -> Choice:
    """Choose the backend for a layer, its input x and its first ``states``.

    The fused kernel runs wherever it can. Otherwise a loop over time runs if rebuilding hh would cost more than it saves,
    and PyTorch's LSTM if not.

    Args:
        x, batch_sizes, directions, training: as for :func:`slimlstm.ops.layer`.
        states: h0 and c0, or nothing.

    Examples:
        >>> weight = torch.zeros(8, 2)
        >>> directions = [Direction(weight, weight, None, None, None)]
        >>> choose_backend(torch.zeros(3, 1, 2, dtype=torch.float64), None, directions)
        Choice(backend='dense', reason='the input is torch.float64; hh is dense')
    """
    reason = fused.obstacle(x, states, directions, training)
    if reason is None and are_parameters(directions):
        return _FUSED
    if reason is not None and reason == native.missing:
        native.warn_missing()
    return plain.choose_plain_backend(x, batch_sizes, directions, reason or "the weights are computed anew for every call")


def are_parameters(directions: Sequence[Direction]) -> bool:
    """Return whether all weights are parameters.

    Weights that are computed in every call, such as masked weights, are not worth packing. Compilers substitute other
    tensors for parameters, so within a compiler the answer is always yes.
    """
    if type(directions) is CachedLayer or torch.compiler.is_compiling():
        return True
    return set(map(type, flat(directions))) <= _PARAMETER_TYPES
