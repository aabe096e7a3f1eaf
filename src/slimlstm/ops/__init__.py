"""The recurrence of one LSTM layer: one entry, several backends, and a reason for each choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import dense, reference
from slimlstm.ops.weights import Direction, LayerOutput, columns, rows

BACKENDS: dict[str, Callable[[Tensor, Tensor | None, Tensor, Tensor, Sequence[Direction]], LayerOutput]] = {
    "reference": reference.layer,
    "dense": dense.layer,
}

# What the interpreter spends on a step of the loop over time, in multiply-adds that PyTorch does meanwhile.
_STEP_OVERHEAD = 1_500_000
# What the loop's unfused activations cost per hidden unit and step, likewise.
_UNIT_OVERHEAD = 700


class Choice(NamedTuple):
    """The backend that "auto" stands for, and why."""

    backend: str
    reason: str


def layer(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    directions: Sequence[Direction],
    backend: str = "auto",
) -> LayerOutput:
    """One LSTM layer of one or two directions.

    Args:
        x: [T, B, I], or packed [N, I].
        batch_sizes: None, or for packed x the number of sequences at every step, int64 [T] on the CPU.
        h0, c0: the first states, [D, B, P] and [D, B, H].
        directions: the weights, forward first.
        backend: a key of ``BACKENDS``, or "auto".

    Raises:
        SlimLSTMError: no backend of that name.
    """
    if backend == "auto":
        backend = choose(x, batch_sizes, directions).backend
    if backend not in BACKENDS:
        raise SlimLSTMError(f"no backend is called {backend!r}; there are 'auto', {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[backend](x, batch_sizes, h0, c0, directions)


def choose(x: Tensor, batch_sizes: Tensor | None, directions: Sequence[Direction]) -> Choice:
    """The backend for this layer and input: the loop where rebuilding hh costs more than it saves, dense elsewhere."""
    factored = [weights.hh for weights in directions if not isinstance(weights.hh, Tensor)]
    if not factored:
        return Choice("dense", "hh is dense")
    if x.device.type != "cpu":
        return Choice("dense", f"the input is on {x.device.type}")
    if torch.is_grad_enabled() and (x.requires_grad or any(u.requires_grad or v.requires_grad for u, v in factored)):
        return Choice("dense", "gradients are wanted")
    steps = x.shape[0] if batch_sizes is None else len(batch_sizes)
    inputs = x.shape[0] * x.shape[1] if batch_sizes is None else x.shape[0]
    rebuild = sum(u.shape[0] * u.shape[1] * v.shape[1] for u, v in factored)
    dense_cost = rebuild + inputs * sum(rows(w) * columns(w) for w in factored)
    loop_cost = steps * len(factored) * _STEP_OVERHEAD + inputs * sum(
        u.numel() + v.numel() + _UNIT_OVERHEAD * (len(u) // 4) for u, v in factored
    )
    if loop_cost < dense_cost:
        return Choice("reference", f"rebuilding hh would cost more than {steps} thin steps")
    return Choice("dense", f"hh is rebuilt once for {steps} steps")
