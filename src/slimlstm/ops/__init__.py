"""The recurrence of one LSTM layer: one entry, several backends, and a reason for each choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import cpu, dense, reference, training
from slimlstm.ops.weights import Direction, Layer, LayerOutput, Matrix, columns, first_states, flat, is_clipped, rows

BACKENDS: dict[str, Callable[[Tensor, Tensor | None, Tensor, Tensor, Sequence[Direction]], LayerOutput]] = {
    "reference": reference.layer,
    "dense": dense.layer,
    "training": training.layer,
    "fused": cpu.layer,
}

# What the interpreter spends on a step of the loop over time, in multiply-adds that PyTorch does meanwhile.
_STEP_OVERHEAD = 1_500_000
# What the loop's unfused activations cost per hidden unit and step, likewise.
_UNIT_OVERHEAD = 700
# From so many weights of hh on, a loop over thin steps trains faster than PyTorch's LSTM with factors multiplied, if they
# hold at most this share of those weights.
_LARGE, _THIN = 2**19, 0.7
# With dense hh it does below float32 only, from so many weights of ih and hh together on.
_LARGE_TOGETHER = 9 * 2**18

_KEPT: set[type] = {Parameter, type(None)}


class Choice(NamedTuple):
    """The backend that "auto" stands for, and why."""

    backend: str
    reason: str


_FUSED = Choice("fused", "the kernel for inference on the CPU")


def layer(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    directions: Sequence[Direction],
    backend: str = "auto",
) -> LayerOutput:
    """One LSTM layer of one or two directions.

    Args:
        x: [T, B, I], or packed [N, I].
        batch_sizes: None, or for packed x the number of sequences at every step, int64 [T] on the CPU.
        h0, c0: the first states, [D, B, P] and [D, B, H], or None for zeros.
        directions: the weights, forward first.
        backend: a key of ``BACKENDS``, or "auto".

    Raises:
        SlimLSTMError: no backend of that name, or one that cannot run this, with the reason.
    """
    if backend == "auto":
        backend = choose(x, batch_sizes, directions, () if h0 is None or c0 is None else (h0, c0)).backend
        if backend == "fused":
            return cpu.run(x, batch_sizes, h0, c0, directions)
    if backend not in BACKENDS:
        raise SlimLSTMError(f"no backend is called {backend!r}; there are 'auto', {', '.join(map(repr, BACKENDS))}")
    if backend == "fused":
        return cpu.layer(x, batch_sizes, h0, c0, directions)
    h0, c0 = first_states(x, batch_sizes, h0, c0, directions)
    return BACKENDS[backend](x, batch_sizes, h0, c0, directions)


def cell(x: Tensor, h: Tensor, c: Tensor, directions: Sequence[Direction]) -> tuple[Tensor, Tensor]:
    """One step of a layer of one direction from x [B, I], h [B, P] and c [B, H]: the next h and c."""
    if cpu.obstacle(x, (h, c), directions) or not _are_parameters(directions):
        return reference.cell(x, h, c, directions[0])
    result = cpu.run(x[None], None, h[None], c[None], directions)
    return result.h[0], result.c[0]


def choose(x: Tensor, batch_sizes: Tensor | None, directions: Sequence[Direction], states: Sequence[Tensor] = ()) -> Choice:
    """The backend for this layer, input x and first ``states``: the fused kernel wherever it can run.

    Elsewhere a loop over time where rebuilding hh costs more than it saves, and dense where it does not.
    """
    reason = cpu.obstacle(x, states, directions)
    if reason is None and _are_parameters(directions):
        return _FUSED
    if reason == cpu.missing and reason is not None:
        cpu.tell_missing()
    return _choose_without_kernel(x, batch_sizes, directions, reason or "the weights are made anew for every call")


def _are_parameters(directions: Sequence[Direction]) -> bool:
    """Whether no weight is the result of a computation, as masked weights are; packing such would be wasted.

    Compilers put something else in the place of parameters, and are believed.
    """
    return type(directions) is Layer or torch.compiler.is_compiling() or set(map(type, flat(directions))) <= _KEPT


def _choose_without_kernel(x: Tensor, batch_sizes: Tensor | None, directions: Sequence[Direction], reason: str) -> Choice:
    if is_clipped(directions):
        return Choice("reference", f"{reason}; PyTorch's LSTM does not clip")
    if x.device.type != "cpu":
        return Choice("dense", reason)
    factored = [weights.hh for weights in directions if not isinstance(weights.hh, Tensor)]
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, *flat(directions))):
        if training.obstacle(batch_sizes, directions) is None and all(_trains_faster(weights, x) for weights in directions):
            return Choice("training", f"{reason}; with weights so large a loop over time trains faster than PyTorch's LSTM")
        return Choice("dense", reason)
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
    """Whether steps with these weights, written out in Python, take less time than those of PyTorch's LSTM, on the CPU."""
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
