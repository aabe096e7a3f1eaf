"""The fused kernel with gradients on: the forward pass runs the kernel, a backward pass recomputes the layer.

The forward pass saves only its inputs. The backward pass, if any, runs the layer again with PyTorch's operators and
backpropagates through them. With int8 weights, the outputs therefore come from the kernel, which rounds its inputs, and the
gradients from the same layer without this rounding. Gradients of gradients go through the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimlstm.ops import cpu, plain
from slimlstm.ops.derivatives import gradients_again
from slimlstm.ops.packing import clips_of, storages_of
from slimlstm.ops.weights import Direction, LayerOutput, first_states, flat, unflattened


def run(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> LayerOutput:
    """Run a layer as :func:`slimlstm.ops.cpu.run` does, and record gradients."""
    return LayerOutput(*_Layer.apply(batch_sizes, directions, x, h0, c0, *flat(directions)))


class _Layer(torch.autograd.Function):
    """The kernel in the forward pass, :func:`gradients` in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        batch_sizes: Tensor | None,
        directions: Sequence[Direction],
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, x, h0, c0, *weights)
        ctx.storages, ctx.clips = storages_of(directions), clips_of(directions)
        output, h, c = cpu.run(x, batch_sizes, h0, c0, directions)
        return output, h, c

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        batch_sizes, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        return None, None, *gradients(d_outputs, batch_sizes, inputs, ctx.storages, ctx.clips, wanted)


def gradients(
    d_outputs: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    inputs: Sequence[Tensor | None],
    storages: Sequence[str],
    clips: Sequence[float],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of a layer's inputs, computed by PyTorch's operators.

    They are differentiable if gradients are on, as in a backward pass with ``create_graph=True``.

    Args:
        d_outputs: the gradients of output, h and c; None for zero.
        batch_sizes: as for the layer.
        inputs: x, h0, c0 and the flat weights.
        storages, clips: two storages and two bounds for every direction.
        wanted: for each input, whether to return its gradient; None is returned otherwise.
    """
    create_graph = torch.is_grad_enabled()

    def run(aliases: Sequence[Tensor | None]) -> LayerOutput:
        return _plain_layer(aliases, batch_sizes, storages, clips, differentiable=create_graph)

    return gradients_again(run, d_outputs, inputs, wanted)


def _plain_layer(
    inputs: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    storages: Sequence[str],
    clips: Sequence[float],
    *,
    differentiable: bool,
) -> LayerOutput:
    x: Any
    x, h0, c0, *weights = inputs
    directions = unflattened(weights, storages, clips)
    states = first_states(x, batch_sizes, h0, c0, directions)
    backend = "reference" if differentiable else plain.choose_plain_backend(x, batch_sizes, directions, "").backend
    return plain.BACKENDS[backend](x, batch_sizes, *states, directions)
