"""A loop over time with an explicit backward pass, for training on the CPU.

The forward pass equals :mod:`slimlstm.ops.reference`. In the backward pass, with a' the derivative of a gate's
activation,

δc_t += δh_t ⊙ o ⊙ (1 - tanh² c_t)
δ(i, f, g, o) = (δc ⊙ g ⊙ i', δc ⊙ c_{t-1} ⊙ f', δc ⊙ i ⊙ g', δh ⊙ tanh c_t ⊙ o')
δc_{t-1} = δc_t ⊙ f,  δh_{t-1} = W_hhᵀ δ(i, f, g, o)

The gradients of weights and inputs are products over all steps at once, and hh is never rebuilt from its factors. Products
and h have the precision of the weights or of autocast. c and all sums between two products have at least float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimlstm.errors import SlimLSTMError
from slimlstm.ops.reference import product
from slimlstm.ops.weights import Direction, LayerOutput, Matrix, is_clipped

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


def obstacle(batch_sizes: Tensor | None, directions: Sequence[Direction]) -> str | None:
    """Return the feature that this backend cannot run, or None."""
    if batch_sizes is not None:
        return "packed sequences"
    if any(weights.hr is not None for weights in directions):
        return "a projection"
    return "clipping" if is_clipped(directions) else None


def layer(x: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, directions: Sequence[Direction]) -> LayerOutput:
    """Run a layer over x [T, B, I]; h0 and c0 [D, B, H]. Second derivatives are not available.

    Raises:
        SlimLSTMError: x is packed, or the layer projects or clips.
    """
    reason = obstacle(batch_sizes, directions)
    if reason is not None:
        raise SlimLSTMError(f"the training backend cannot do {reason}; use backend='auto'")
    parts = [_direction(x, h0[index], c0[index], weights, reverse=index == 1) for index, weights in enumerate(directions)]
    output, h, c = zip(*parts, strict=True)
    return LayerOutput(torch.cat(output, dim=-1), torch.stack(h), torch.stack(c))


def _direction(x: Tensor, h0: Tensor, c0: Tensor, weights: Direction, *, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return output [T, B, H] and the last h and c [B, H] of one direction."""
    bias = weights.bias_ih if weights.bias_ih is None or weights.bias_hh is None else weights.bias_ih + weights.bias_hh
    return recurrence(product(x, weights.ih, bias), h0, c0, weights.hh, reverse=reverse)


def recurrence(gates: Tensor, h0: Tensor, c0: Tensor, hh: Matrix, *, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction on ``gates`` = W_ih x + b_ih + b_hh [T, B, 4H]; return output [T, B, H] and the last h, c [B, H].

    Second derivatives are not available.
    """
    dtype, device = gates.dtype, gates.device.type
    wide = torch.promote_types(dtype, torch.float32)
    factors = hh if isinstance(hh, tuple) else (hh,)
    if torch.is_autocast_enabled(device):
        factors = tuple(factor.to(torch.get_autocast_dtype(device)) for factor in factors)
    gates = gates.flip(0) if reverse else gates
    with torch.autocast(device, enabled=False):
        output, c = _Recurrence.apply(gates, h0.to(dtype), c0.to(wide), *factors)
    h, output = output[-1], output.flip(0) if reverse else output
    return output, h, c.to(dtype)


class _Recurrence(torch.autograd.Function):
    """The recurrence from W_ih x + b [T, B, 4H], h0 and c0 [B, H], and hh or its factors, to all h and the last c.

    Everything between two products is computed in at least float32, on tensors of one step, which fit into the cache.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, h0: Tensor, c0: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
        steps, batch, width = gates.shape
        size = width // 4
        active, h = gates.new_empty(gates.shape, dtype=c0.dtype), gates.new_empty(steps + 1, batch, size)
        c = c0.new_empty(steps + 1, batch, size)
        h[0], c[0] = h0, c0
        transposed = [factor.t() for factor in reversed(factors)]
        for step in range(steps):
            recurrent = h[step]
            for factor in transposed:
                recurrent = recurrent @ factor
            here = active[step].copy_(gates[step]).add_(recurrent)
            here[:, : 2 * size].sigmoid_()
            here[:, 2 * size : 3 * size].tanh_()
            here[:, 3 * size :].sigmoid_()
            i, f, g, o = here.chunk(4, dim=1)
            torch.mul(f, c[step], out=c[step + 1]).addcmul_(i, g)
            torch.mul(o, c[step + 1].tanh(), out=h[step + 1])
        ctx.save_for_backward(active, h, c, *factors)
        return h[1:], c[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        active, h, c, *factors = ctx.saved_tensors
        with torch.autocast(active.device.type, enabled=False):
            d_gates = h.new_empty(active.shape)
            d_h, d_c = torch.zeros_like(c[0]), d_last.clone()
            for step in reversed(range(len(active))):
                d_h += d_output[step]
                i, f, g, o = active[step].chunk(4, dim=1)
                tanh_c = c[step + 1].tanh()
                d_c += tanh_backward(d_h * o, tanh_c)
                parts = (
                    sigmoid_backward(d_c * g, i),
                    sigmoid_backward(d_c * c[step], f),
                    tanh_backward(d_c * i, g),
                    sigmoid_backward(d_h * tanh_c, o),
                )
                back = torch.cat(parts, dim=1, out=d_gates[step])
                d_c *= f
                for factor in factors:
                    back = back @ factor
                d_h.copy_(back)
            flat, before = d_gates.flatten(0, 1), h[:-1].flatten(0, 1)
            wanted = ctx.needs_input_grad[3:]
            if len(factors) == 1:
                d_factors = [flat.t() @ before if wanted[0] else None]
            else:
                u, v = factors
                d_factors = [
                    flat.t() @ (before @ v.t()) if wanted[0] else None,
                    (flat @ u).t() @ before if wanted[1] else None,
                ]
        return d_gates, d_h, d_c, *d_factors
