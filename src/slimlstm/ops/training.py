"""A loop over time with an explicit backward pass, for training on the CPU.

The forward pass equals :mod:`slimlstm.ops.reference`. In the backward pass, with a' the derivative of a gate's
activation,

δc_t += δh_t ⊙ o ⊙ (1 - tanh² c_t)
δ(i, f, g, o) = (δc ⊙ g ⊙ i', δc ⊙ c_{t-1} ⊙ f', δc ⊙ i ⊙ g', δh ⊙ tanh c_t ⊙ o')
δc_{t-1} = δc_t ⊙ f,  δh_{t-1} = W_hhᵀ δ(i, f, g, o)

Each step computes only the terms that depend on its neighbour: one or two products by PyTorch and one call of
:mod:`slimlstm.ops.elementwise`. The gradients of weights and inputs are products over all steps at once, and hh is never
rebuilt from its factors. Products have the precision of the weights or of autocast, states and activations at least
float32. Gradients of gradients go through the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import reference
from slimlstm.ops.derivatives import Run, gradients_again, is_transformed
from slimlstm.ops.elementwise import Buffers, Cells, cells_for, small_passes
from slimlstm.ops.weights import Direction, LayerOutput, Matrix, first_states, flat, is_clipped, rows, unflattened


def obstacle(batch_sizes: Tensor | None, directions: Sequence[Direction]) -> str | None:
    """Return the feature of a layer that this backend lacks, or None."""
    if batch_sizes is not None:
        return "packed sequences"
    if any(weights.hr is not None for weights in directions):
        return "a projection"
    return "clipping" if is_clipped(directions) else None


def layer(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> LayerOutput:
    """Run a layer over x [T, B, I]; h0 and c0 [D, B, H], or None for zeros.

    Raises:
        SlimLSTMError: x is packed, or the layer projects or clips.
    """
    reason = obstacle(batch_sizes, directions)
    if reason is not None:
        raise SlimLSTMError(f"the training backend cannot do {reason}; use backend='auto'")
    if len(x) == 0:
        return reference.layer(x, None, *first_states(x, None, h0, c0, directions), directions)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    # In small layers, conversions would cost more than narrow products save.
    hidden = rows(directions[0].hh) // 4
    is_wide = dtype == torch.bfloat16 and small_passes(torch.float32, x.device, hidden) is not None
    low = torch.float32 if is_wide else dtype
    parts: list[tuple[Tensor, Tensor]] = []
    with _no_autocast(x.device.type):
        for index, weights in enumerate(directions):
            states = (None, None) if h0 is None or c0 is None else (h0[index], c0[index])
            parts.append(_Direction.apply(index == 1, low, dtype, x, *states, *flat([weights])[:6]))
    ends = [(output[0 if index == 1 else -1], c) for index, (output, c) in enumerate(parts)]
    output = parts[0][0] if len(parts) == 1 else torch.cat([output for output, _ in parts], dim=-1)
    return LayerOutput(output, torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends]))


def recurrence(gates: Tensor, h0: Tensor, c0: Tensor, hh: Matrix, *, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction on ``gates`` = W_ih x + b_ih + b_hh [T, B, 4H]; return output [T, B, H] and the last h, c [B, H].

    Gradients of gradients go through the reference.
    """
    hh_v, hh_u = (None, hh) if isinstance(hh, Tensor) else hh[::-1]
    with _no_autocast(gates.device.type):
        weights = None, None, hh_v, hh_u, None, None
        output, c = _Direction.apply(reverse, gates.dtype, gates.dtype, gates, h0, c0, *weights)
    return output, output[0 if reverse else -1], c


class _Direction(torch.autograd.Function):
    """Function of one direction, from x [T, B, I], h0, c0 and the weights to all h [T, B, H] and the last c [B, H].

    If ih is None, x holds the gates W_ih x + b [T, B, 4H] instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        reverse: bool,
        low: torch.dtype,
        dtype: torch.dtype,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ih_v, ih, hh_v, hh, bias_ih, bias_hh = _converted(weights, low)
        steps, batch, _ = x.shape
        flat_x = x.to(low).flatten(0, 1)
        thin = flat_x if ih_v is None else flat_x @ ih_v.t()
        bias = bias_ih if bias_ih is None or bias_hh is None else bias_ih + bias_hh
        gates = flat_x.clone() if ih is None else _affine(thin, ih, bias)
        at = _buffers(gates.view(steps, batch, len(hh)), h0, c0, steps if reverse else 0)
        factors = [factor.t() for factor in (hh_v, hh) if factor is not None]
        small = small_passes(low, x.device, at.h.shape[2])
        if small is None:
            _advance(at, factors, reverse, h0 is None, cells_for(low, x.device))
        else:
            small.forward(at, factors, reverse, h0 is None)
        ctx.set_materialize_grads(False)
        ctx.reverse, ctx.dtypes = reverse, [None if one is None else one.dtype for one in (x, h0, c0, *weights)]
        ctx.save_for_backward(x, h0, c0, *weights, flat_x, thin, ih_v, ih, hh_v, hh, *at[1:])
        part = slice(0, -1) if reverse else slice(1, None)
        return at.h[part].to(dtype), at.c[0 if reverse else -1].to(dtype)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        # Read once, because activation checkpointing unpacks saved tensors only once.
        tensors = ctx.saved_tensors
        inputs, saved = tensors[:9], tensors[9:]
        wanted: tuple[bool, ...] = ctx.needs_input_grad[3:]
        has_memory = all(one is None or torch._C._has_storage(one) for one in (d_output, d_last))  # pyright: ignore
        if torch.is_grad_enabled() or is_transformed() or not has_memory:  # batched gradients have none
            return None, None, None, *gradients_again(_plain(ctx.reverse), (d_output, d_last), inputs, wanted)
        with _no_autocast(inputs[0].device.type):
            found = _gradients(saved, ctx.reverse, d_output, d_last, wanted)
            found = [one if one is None else one.to(dtype) for one, dtype in zip(found, ctx.dtypes, strict=True)]
        return None, None, None, *found


def _converted(weights: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(None if one is None else one.to(dtype) for one in weights)


def _affine(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b for x [N, n]."""
    return x @ matrix.t() if bias is None else torch.addmm(bias, x, matrix.t())


def _buffers(gates: Tensor, h0: Tensor | None, c0: Tensor | None, first: int) -> Buffers:
    """Return buffers for given gates [T, B, 4H], with the first states at index ``first``."""
    steps, batch, width = gates.shape
    wide = torch.promote_types(gates.dtype, torch.float32)
    is_wide = wide == gates.dtype
    h, c = (gates.new_empty(steps + 1, batch, width // 4, dtype=wide) for _ in "hc")
    at = Buffers(
        gates,
        gates if is_wide else gates.new_empty(gates.shape, dtype=wide),
        c,
        h,
        h if is_wide else gates.new_empty(h.shape),
    )
    for states, state in ((h, h0), (c, c0), *(() if is_wide else ((at.h_low, h0),))):
        if state is None:
            states[first].zero_()
        else:
            states[first] = state
    return at


def _order(steps: int, reverse: bool) -> list[tuple[int, int, int]]:
    """Return each step's index, and the indices of the states before and after it, in the order of the recurrence."""
    return [(t, t + 1, t) for t in reversed(range(steps))] if reverse else [(t, t, t + 1) for t in range(steps)]


def _advance(at: Buffers, factors: list[Tensor], reverse: bool, from_zero: bool, cells: Cells) -> None:
    """Run all steps; ``factors`` are the transposed factors of hh in the order in which they multiply rows of h."""
    gates, states = at.gates.unbind(), at.h_low.unbind()
    is_wide = at.active is at.gates
    recurrent = gates[0] if is_wide or not gates else torch.zeros_like(gates[0])
    *thin, last = factors
    for number, (step, before, after) in enumerate(_order(len(gates), reverse)):
        if number or not from_zero:
            state = states[before]
            for factor in thin:
                state = state @ factor
            if is_wide:
                gates[step].addmm_(state, last)
            else:
                torch.mm(state, last, out=recurrent)
        cells.forward(at, step, before, after, None if is_wide else recurrent)


def _retreat(
    at: Buffers,
    factors: list[Tensor],
    reverse: bool,
    d_output: Tensor | None,
    d_c: Tensor,
    wants_h0: bool,
    d_gates: Tensor,
) -> Tensor | None:
    """Run all steps backward, and return the gradient of h0 if it is wanted; d_c becomes the gradient of c0."""
    gates, cells, d_h = d_gates.unbind(), cells_for(d_gates.dtype, d_gates.device), None
    for number, (step, before, after) in enumerate(reversed(_order(len(gates), reverse))):
        cells.backward(at, step, before, after, d_output, d_h, d_c, d_gates)
        d_h = None
        if number < len(gates) - 1 or wants_h0:
            d_h = gates[step]
            for factor in factors:
                d_h = d_h @ factor
    return d_h


def _gradients(
    saved: Sequence[Any], reverse: bool, d_output: Tensor | None, d_last: Tensor | None, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, h0, c0, ih V and U, hh V and U, and the biases."""
    flat_x, thin, ih_v, ih, hh_v, hh, active, c, h, h_low = saved
    steps, batch, width = active.shape
    at = Buffers(active, active, c, h, h_low)
    d_output = None if d_output is None else d_output.to(h.dtype).contiguous()
    d_c = torch.zeros_like(c[0]) if d_last is None else d_last.to(c.dtype).clone(memory_format=torch.contiguous_format)
    d_gates, factors = flat_x.new_empty(steps, batch, width), [hh] if hh_v is None else [hh, hh_v]
    small = small_passes(flat_x.dtype, flat_x.device, width // 4)
    if small is None:
        d_h0 = _retreat(at, factors, reverse, d_output, d_c, wanted[1], d_gates)
    else:
        d_h0 = torch.empty_like(d_c) if wanted[1] else None
        small.backward(at, factors, reverse, d_output, d_c, d_h0, d_gates)
    d_rows = d_gates.flatten(0, 1)
    states = (h_low[1:] if reverse else h_low[:-1]).flatten(0, 1)
    if ih is None:
        d_thin, d_ih_v, d_ih = d_rows if wanted[0] else None, None, None
    else:
        d_thin, d_ih_v, d_ih = _product_gradients(d_rows, flat_x, thin, ih_v, ih, wanted[0], wanted[3:5])
    _, d_hh_v, d_hh = _product_gradients(d_rows, states, None, hh_v, hh, False, wanted[5:7])
    d_bias = d_rows.sum(0) if wanted[7] or wanted[8] else None
    d_x = None if d_thin is None else d_thin.view(steps, batch, d_thin.shape[1])
    return [d_x, d_h0, d_c if wanted[2] else None, d_ih_v, d_ih, d_hh_v, d_hh, d_bias, d_bias]


def _product_gradients(
    d_rows: Tensor, x: Tensor, thin: Tensor | None, v: Tensor | None, u: Tensor, wants_x: bool, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x [N, n], V and U from ``d_rows``, the gradient of x (U V)ᵀ [N, m].

    Without V, U is the matrix W itself. ``thin`` is x Vᵀ, or None to compute it here.
    """
    if v is None:
        return d_rows @ u if wants_x else None, None, d_rows.t() @ x if wanted[1] else None
    d_u = d_rows.t() @ (x @ v.t() if thin is None else thin) if wanted[1] else None
    if not wants_x and not wanted[0]:
        return None, None, d_u
    d_thin = d_rows @ u
    return d_thin @ v if wants_x else None, d_thin.t() @ x if wanted[0] else None, d_u


def _plain(reverse: bool) -> Run:
    """Return a function from x, h0, c0 and the weights of a direction to all h and the last c, by the reference."""

    def run(inputs: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        x: Any
        x, h0, c0, *weights = inputs
        (one,) = unflattened([*weights, None], ["float32"] * 2, [float("inf")] * 2)
        steps, batch, _ = x.shape
        gates = x.flatten(0, 1) if weights[1] is None else reference.product(x.flatten(0, 1), one.ih, one.bias_ih)
        h0, c0 = (gates.new_zeros(batch, gates.shape[1] // 4) if state is None else state for state in (h0, c0))
        output, _, c = reference.recurrence(gates, [batch] * steps, h0, c0, one, reverse)
        return output.view(steps, batch, c.shape[1]), c

    return run


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    # Entering the context manager takes longer than a small product.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
