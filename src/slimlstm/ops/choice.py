"""The choice of a backend: the fused kernel wherever it can run, else the fastest of PyTorch's operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from slimlstm.ops import fused, native, training
from slimlstm.ops.weights import CachedLayer, Direction, Matrix, columns, flat, is_clipped, rows

# The interpreter's overhead for a step of the loop over time, in multiply-adds that PyTorch could do instead.
_STEP_OVERHEAD = 1_500_000
# The cost of the loop's unfused activations for each hidden unit and step, in the same unit.
_UNIT_OVERHEAD = 700
# With this many weights in hh or more, and factors of at most this share of them, a loop over thin steps trains faster than
# PyTorch's LSTM with multiplied factors.
_LARGE, _THIN = 2**19, 0.7
# With a dense hh the loop trains faster only below float32, and with this many weights in ih and hh together or more.
_LARGE_TOGETHER = 9 * 2**18

_PARAMETER_TYPES: set[type] = {Parameter, type(None)}


class Choice(NamedTuple):
    """The backend chosen for a layer, and the reason."""

    backend: str
    reason: str


_FUSED = Choice("fused", "the kernel for inference on the CPU")


def choose(x: Tensor, batch_sizes: Tensor | None, directions: Sequence[Direction], states: Sequence[Tensor] = ()) -> Choice:
    """Choose the backend for a layer, its input x and its first ``states``.

    The fused kernel runs wherever it can. Otherwise a loop over time runs if rebuilding hh would cost more than it saves,
    and PyTorch's LSTM if not.

    Example:
        >>> weight = torch.zeros(8, 2)
        >>> directions = [Direction(weight, weight, None, None, None)]
        >>> choose(torch.zeros(3, 1, 2, dtype=torch.float64), None, directions)
        Choice(backend='dense', reason='the input is torch.float64; hh is dense')
    """
    reason = fused.obstacle(x, states, directions)
    if reason is None and are_parameters(directions):
        return _FUSED
    if reason is not None and reason == native.missing:
        native.warn_missing()
    return _choose_without_kernel(x, batch_sizes, directions, reason or "the weights are computed anew for every call")


def are_parameters(directions: Sequence[Direction]) -> bool:
    """Return whether all weights are parameters.

    Packing weights that are computed in every call, such as masked weights, would be wasted. Compilers substitute other
    tensors for parameters, so the answer for them is always yes.
    """
    if type(directions) is CachedLayer or torch.compiler.is_compiling():
        return True
    return set(map(type, flat(directions))) <= _PARAMETER_TYPES


def _choose_without_kernel(x: Tensor, batch_sizes: Tensor | None, directions: Sequence[Direction], reason: str) -> Choice:
    if is_clipped(directions):
        return Choice("reference", f"{reason}; PyTorch's LSTM does not clip")
    if x.device.type != "cpu":
        return Choice("dense", reason)
    if fused.wants_gradients(x, (), directions):
        if training.obstacle(batch_sizes, directions) is None and all(_trains_faster(weights, x) for weights in directions):
            return Choice("training", f"{reason}; with weights so large a loop over time trains faster than PyTorch's LSTM")
        return Choice("dense", reason)
    return _choose_for_inference(x, batch_sizes, directions, reason)


def _choose_for_inference(x: Tensor, batch_sizes: Tensor | None, directions: Sequence[Direction], reason: str) -> Choice:
    factored = [weights.hh for weights in directions if not isinstance(weights.hh, Tensor)]
    if not factored:
        return Choice("dense", f"{reason}; hh is dense")
    steps = x.shape[0] if batch_sizes is None else len(batch_sizes)
    inputs = x.shape[0] * x.shape[1] if batch_sizes is None else x.shape[0]
    rebuild = sum(u.shape[0] * u.shape[1] * v.shape[1] for u, v in factored)
    dense_cost = rebuild + inputs * sum(rows(w) * columns(w) for w in factored)
    loop_cost = steps * len(factored) * _STEP_OVERHEAD + inputs * sum(
        u.numel() + v.numel() + _UNIT_OVERHEAD * (len(u) // 4) for u, v in factored
    )
    if loop_cost < dense_cost:
        return Choice("reference", f"{reason}; rebuilding hh would cost more than {steps} thin steps")
    return Choice("dense", f"{reason}; hh is rebuilt once for {steps} steps")


def _trains_faster(weights: Direction, x: Tensor) -> bool:
    """Return whether a Python loop over time trains faster on the CPU than PyTorch's LSTM with these weights."""
    if torch.compiler.is_compiling():
        return False
    ih, hh = weights.ih, weights.hh
    if isinstance(hh, tuple):
        dense = rows(hh) * columns(hh)
        return dense >= _LARGE and _numbers(hh) <= _THIN * dense
    narrow = torch.is_autocast_enabled("cpu") or x.dtype in (torch.bfloat16, torch.float16)
    return narrow and _numbers(ih) + _numbers(hh) >= _LARGE_TOGETHER


def _numbers(matrix: Matrix) -> int:
    return matrix.numel() if isinstance(matrix, Tensor) else matrix[0].numel() + matrix[1].numel()
