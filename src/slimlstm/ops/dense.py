"""PyTorch's LSTM with hh rebuilt as U V once per call: for training, GPUs and large batches.

The input product stays factored: x Vᵀ is a narrower input, with U as its input matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import reference
from slimlstm.ops.weights import Direction, LayerOutput, Matrix, is_clipped, rebuilt


def layer(x: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, directions: Sequence[Direction]) -> LayerOutput:
    """Run a layer over x [T, B, I], or over packed x [N, I] with ``batch_sizes`` [T]; h0 [D, B, P], c0 [D, B, H].

    Raises:
        SlimLSTMError: the layer clips, which PyTorch's LSTM cannot do.
    """
    if is_clipped(directions):
        raise SlimLSTMError("PyTorch's LSTM cannot clip; use backend='auto' or 'reference' for a layer that does")
    if x.shape[0] == 0:
        return reference.layer(x, batch_sizes, h0, c0, directions)  # PyTorch's LSTM refuses to take no steps.
    x, ih = _thin_input(x, [weights.ih for weights in directions])
    parameters = [
        tensor
        for matrix, weights in zip(ih, directions, strict=True)
        for tensor in (matrix, rebuilt(weights.hh), weights.bias_ih, weights.bias_hh, weights.hr)
        if tensor is not None
    ]
    has_biases, bidirectional = directions[0].bias_ih is not None, len(directions) == 2
    # cuDNN saves the tensors for its backward pass only in training mode. A trace keeps the value for calls to come.
    train = torch.is_grad_enabled() or torch._C._get_tracing_state() is not None  # pyright: ignore
    if batch_sizes is None:
        result = torch.lstm(x, [h0, c0], parameters, has_biases, 1, 0.0, train, bidirectional, False)
    else:
        result = torch.lstm(x, batch_sizes, [h0, c0], parameters, has_biases, 1, 0.0, train, bidirectional)
    return LayerOutput(*result)


def _thin_input(x: Tensor, matrices: list[Matrix]) -> tuple[Tensor, list[Tensor]]:
    """Return an input and dense input matrices [4H, ·] whose products equal the products of x with ``matrices``.

    Two directions share one input, so their thin inputs are concatenated, and each matrix is zero on the other's part.
    If one direction is dense, or both thin inputs together are wider than x, the factors are multiplied instead.
    """
    if any(isinstance(matrix, Tensor) for matrix in matrices):
        return x, [rebuilt(matrix) for matrix in matrices]
    factors = [matrix for matrix in matrices if not isinstance(matrix, Tensor)]
    ranks = [v.shape[0] for _, v in factors]
    if sum(ranks) > x.shape[-1]:
        return x, [rebuilt(matrix) for matrix in matrices]
    thin = linear(x, torch.cat([v for _, v in factors]))
    before = [sum(ranks[:index]) for index in range(len(ranks))]
    return thin, [
        pad(u, (start, sum(ranks) - start - rank)) for (u, _), start, rank in zip(factors, before, ranks, strict=True)
    ]
