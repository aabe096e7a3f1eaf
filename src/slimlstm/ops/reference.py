"""The recurrence as a plain loop over time: the specification, and for few steps the fastest way in plain PyTorch.

(i, f, g, o) = (σ, σ, tanh, σ)(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
c_t = clip(f ⊙ c_{t-1} + i ⊙ g)
h_t = clip(W_hr (o ⊙ tanh c_t))

Without a projection, W_hr is left out; without a bound, clip is left out. Factors are applied one after the other:
W x = U (V x).

Source: Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000); projection: Sak et al. (2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from slimlstm.ops.weights import Direction, LayerOutput, Matrix


def product(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b for x [..., n] and W [m, n] or its factors."""
    if isinstance(matrix, Tensor):
        return linear(x, matrix, bias)
    u, v = matrix
    return linear(linear(x, v), u, bias)


def step(gates: Tensor, c: Tensor, weights: Direction) -> tuple[Tensor, Tensor]:
    """Return h [B, P] and c [B, H] after one step, from the gates' pre-activations [B, 4H] and the last c [B, H]."""
    i, f, g, o = gates.chunk(4, dim=-1)
    c = _clip(f.sigmoid() * c + i.sigmoid() * g.tanh(), weights.cell_clip)
    h = o.sigmoid() * c.tanh()
    return h if weights.hr is None else _clip(linear(h, weights.hr), weights.proj_clip), c


def _clip(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)


def cell(x: Tensor, h: Tensor, c: Tensor, weights: Direction) -> tuple[Tensor, Tensor]:
    """Return the next h [B, P] and c [B, H], one step from x [B, I], h and c."""
    gates = product(x, weights.ih, weights.bias_ih) + product(h, weights.hh, weights.bias_hh)
    return step(gates, c, weights)


def layer(x: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, directions: Sequence[Direction]) -> LayerOutput:
    """Run a layer over x [T, B, I], or over packed x [N, I] with ``batch_sizes`` [T]; h0 [D, B, P], c0 [D, B, H].

    No steps give no outputs, and the first states as the last ones.
    """
    if len(x) == 0:
        empty = x[..., :1].expand(*x.shape[:-1], h0.shape[0] * h0.shape[2])
        return LayerOutput(empty.clone(), h0.clone(), c0.clone())
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else [int(size) for size in batch_sizes]
    packed = x.flatten(0, 1) if batch_sizes is None else x
    parts = [
        recurrence(product(packed, weights.ih, weights.bias_ih), sizes, h0[index], c0[index], weights, reverse=index == 1)
        for index, weights in enumerate(directions)
    ]
    output = torch.cat([part[0] for part in parts], dim=-1)
    if batch_sizes is None:
        output = output.unflatten(0, x.shape[:2])
    return LayerOutput(output, torch.stack([part[1] for part in parts]), torch.stack([part[2] for part in parts]))


def recurrence(
    gates: Tensor, sizes: list[int], h: Tensor, c: Tensor, weights: Direction, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction on ``gates`` = W_ih x + b_ih [N, 4H], packed; return output [N, P] and the last h [B, P], c [B, H].

    Sequences are sorted by length, longest first. Forward, sequences that have ended keep their last states; backward,
    sequences that have not begun keep their first states.
    """
    gates_of_x = gates.split(sizes)
    # Under autocast products have a lower precision than the states; nn.LSTM returns that precision too.
    h, c = h.to(gates_of_x[0].dtype), c.to(gates_of_x[0].dtype)
    outputs: list[Tensor] = []
    for gates_at in reversed(gates_of_x) if reverse else gates_of_x:
        active = len(gates_at)
        recurrent = product(h[:active], weights.hh, weights.bias_hh)
        new_h, new_c = step(gates_at + recurrent, c[:active], weights)
        outputs.append(new_h)
        h, c = torch.cat([new_h, h[active:]]), torch.cat([new_c, c[active:]])
    return torch.cat(outputs[::-1] if reverse else outputs), h, c
