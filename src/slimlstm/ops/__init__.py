"""The recurrence of one LSTM layer: one entry point, several backends, and a reason for each choice.

All backends compute the same layer, except for rounding. With int8 weights the difference is visible, because the fused
kernel also rounds their inputs, row by row: to eight bits, or to fifteen where eight could change a gate. If fifteen could
too, PyTorch's operators run in float32. On the embedded language model the fused kernel's logits then differ from the
reference's by less than 0.25% in norm, which is less than the change that int8 weights cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import fused, plain, reference
from slimlstm.ops.choice import are_parameters, choose_backend
from slimlstm.ops.packing import forget
from slimlstm.ops.plain import Backend, Choice
from slimlstm.ops.weights import Direction, LayerOutput, first_states

__all__ = ["BACKENDS", "Choice", "LayerOutput", "cell", "choose_backend", "forget", "layer"]

BACKENDS: dict[str, Backend] = {**plain.BACKENDS, "fused": fused.layer}


def layer(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    directions: Sequence[Direction],
    backend: str = "auto",
    training: bool = False,
) -> LayerOutput:
    """Run one LSTM layer of one or two directions.

    Args:
        x: [T, B, I], or packed [N, I].
        batch_sizes: None, or for packed x the number of sequences at every step, int64 [T] on the CPU.
        h0, c0: the first states, [D, B, P] and [D, B, H], or None for zeros.
        directions: the weights, forward first.
        backend: a key of ``BACKENDS``, or "auto".
        training: whether the module is in training mode. In training mode, where gradients are recorded, the loop over time
            of ``ops.training`` runs where it is faster, and PyTorch's LSTM elsewhere. In evaluation mode the fused kernel
            runs, and a backward pass, if any, recomputes the layer.

    Returns:
        The outputs [T, B, D P], or packed [N, D P], and the last states h [D, B, P] and c [D, B, H].

    Raises:
        SlimLSTMError: no backend has that name, or it cannot run this layer, with the reason.

    Examples:
        >>> import torch
        >>> u, v, x = torch.randn(32, 2), torch.randn(2, 8), torch.randn(5, 1, 3)
        >>> directions = [Direction(torch.randn(32, 3), (u, v), None, None, None)]
        >>> output, h, c = layer(x, None, None, None, directions)
        >>> output.shape, h.shape, c.shape
        (torch.Size([5, 1, 8]), torch.Size([1, 1, 8]), torch.Size([1, 1, 8]))
    """
    if backend == "auto":
        given = () if h0 is None or c0 is None else (h0, c0)
        backend = choose_backend(x, batch_sizes, directions, given, training).backend
        if backend == "fused":
            return fused.run(x, batch_sizes, h0, c0, directions)
    if backend not in BACKENDS:
        raise SlimLSTMError(f"no backend is called {backend!r}; use 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    if backend == "fused":
        return fused.layer(x, batch_sizes, h0, c0, directions, training)
    # The training loop takes None for zero states, and then skips their products.
    states: Any = (h0, c0) if backend == "training" else first_states(x, batch_sizes, h0, c0, directions)
    return BACKENDS[backend](x, batch_sizes, states[0], states[1], directions)


def cell(x: Tensor, h: Tensor, c: Tensor, directions: Sequence[Direction], training: bool = False) -> tuple[Tensor, Tensor]:
    """Return the next h and c: one step of a layer of one direction from x [B, I], h [B, P] and c [B, H].

    Args:
        x: the input of one step.
        h, c: the states before it.
        directions: the weights of the one direction, as a sequence of length 1.
        training: as in :func:`layer`.

    Returns:
        h [B, P] and c [B, H]. The reference computes them where the fused kernel cannot, so that no layer is refused.
    """
    if fused.obstacle(x, (h, c), directions, training) or not are_parameters(directions):
        return reference.cell(x, h, c, directions[0])
    result = fused.run(x[None], None, h[None], c[None], directions)
    return result.h[0], result.c[0]
