"""The fused layer as one PyTorch operator, ``slimlstm::layer``, for ``torch.compile`` and ``torch.export``.

Its gradients come from :mod:`slimlstm.ops.recompute`, by the operator ``slimlstm::layer_backward``.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from slimlstm.ops import cpu, recompute
from slimlstm.ops.packing import clips_of, storages_of
from slimlstm.ops.weights import Direction, LayerOutput, first_states, flat, unflattened


def run(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> LayerOutput:
    """Run a layer as :func:`slimlstm.ops.cpu.run` does, recorded by a compiler as one operator."""
    h0, c0 = first_states(x, batch_sizes, h0, c0, directions)
    return LayerOutput(*layer(x, batch_sizes, h0, c0, *arguments(directions)))


def arguments(directions: Sequence[Direction]) -> tuple[list[Tensor], list[bool], str, list[float]]:
    """Return the arguments ``weights``, ``present``, ``storages`` and ``clips`` of :func:`layer`."""
    weights = flat(directions)
    present = [weight is not None for weight in weights]
    storages = ",".join(storages_of(directions))
    return [weight for weight in weights if weight is not None], present, storages, clips_of(directions)


@torch.library.custom_op("slimlstm::layer", mutates_args=(), device_types="cpu")
def layer(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    present: Sequence[bool],
    storages: str,
    clips: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer.

    Args:
        x, batch_sizes, h0, c0: as for :func:`slimlstm.ops.cpu.run`.
        weights: the weights that are not None, in the order of :func:`slimlstm.ops.weights.flat`.
        present: for every weight in this order, whether it is not None.
        storages: two storages for every direction, separated by commas.
        clips: two bounds for every direction, infinity for no bound.

    Returns:
        The outputs and the last h and c; see :class:`slimlstm.ops.weights.LayerOutput` for the shapes.
    """
    directions = unflattened(_with_absent(weights, present), storages.split(","), clips)
    result = cpu.run(x, batch_sizes, h0, c0, directions)
    return result.output, result.h, result.c


@layer.register_fake
def _(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    present: Sequence[bool],
    storages: str,
    clips: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], h0.shape[0] * h0.shape[2])), torch.empty_like(h0), torch.empty_like(c0)


@torch.library.custom_op("slimlstm::layer_backward", mutates_args=(), device_types="cpu")
def layer_backward(
    d_output: Tensor,
    d_h: Tensor,
    d_c: Tensor,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    present: Sequence[bool],
    storages: str,
    clips: Sequence[float],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of the inputs of :func:`layer` that are wanted.

    Args:
        d_output, d_h, d_c: the gradients of the outputs of :func:`layer`.
        x, batch_sizes, h0, c0, weights, present, storages, clips: as for :func:`layer`.
        wanted: for x, h0, c0 and each of ``weights``, whether to return its gradient.
    """
    inputs = [x, h0, c0, *_with_absent(weights, present)]
    flags = iter(wanted)
    needed = [tensor is not None and next(flags) for tensor in inputs]
    with _autograd():
        found = recompute.gradients((d_output, d_h, d_c), batch_sizes, inputs, storages.split(","), clips, needed)
    # Operators must not return views of their inputs or of each other.
    return [
        torch.zeros_like(tensor) if gradient is None else gradient.clone()
        for tensor, gradient, is_needed in zip(inputs, found, needed, strict=True)
        if is_needed and tensor is not None
    ]


@layer_backward.register_fake
def _(
    d_output: Tensor,
    d_h: Tensor,
    d_c: Tensor,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    present: Sequence[bool],
    storages: str,
    clips: Sequence[float],
    wanted: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor, needed in zip([x, h0, c0, *weights], wanted, strict=True) if needed]


def _with_absent(weights: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    left = iter(weights)
    return [next(left) if is_present else None for is_present in present]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    x, batch_sizes, h0, c0, weights, *ctx.settings = inputs
    ctx.save_for_backward(x, batch_sizes, h0, c0, *weights)


def _backward(ctx: Any, d_output: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Any, ...]:
    x, batch_sizes, h0, c0, *weights = ctx.saved_tensors
    x_wanted, _, h0_wanted, c0_wanted, weights_wanted, *_ = ctx.needs_input_grad
    wanted = [x_wanted, h0_wanted, c0_wanted, *weights_wanted]
    found = iter(layer_backward(d_output, d_h, d_c, x, batch_sizes, h0, c0, weights, *ctx.settings, wanted))
    d_x, d_h0, d_c0, *d_weights = [next(found) if needed else None for needed in wanted]
    return d_x, None, d_h0, d_c0, d_weights, None, None, None


layer.register_autograd(_backward, setup_context=_setup_context)


@contextmanager
def _autograd() -> Generator[None]:
    """Record gradients within an operator, where PyTorch excludes its autograd keys from dispatch."""
    keys, kinds = torch._C._dispatch_tls_local_exclude_set(), torch._C.DispatchKey  # pyright: ignore
    for key in (kinds.AutogradFunctionality, kinds.AutogradOther, kinds.AutogradCPU, kinds.ADInplaceOrView):
        keys = keys.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), keys):  # pyright: ignore
        yield
