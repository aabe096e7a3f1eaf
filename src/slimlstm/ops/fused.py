"""The fused CPU kernel as a backend: when it can run, and why not otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import cpu, native, operator
from slimlstm.ops.packing import PLAIN_TYPES
from slimlstm.ops.weights import Direction, LayerOutput, flat


def obstacle(x: Tensor, states: Sequence[Tensor], directions: Sequence[Direction]) -> str | None:
    """Return why the fused kernel cannot run this layer, or None if it can."""
    reason = None
    if not x.is_cpu:
        reason = f"the input is on {x.device.type}"
    elif x.dtype != torch.float32:
        reason = f"the input is {x.dtype}"
    elif states and not all(state.is_cpu and state.dtype == torch.float32 for state in states):
        reason = "the states are not of the input's device and dtype"
    elif not _is_exporting() and wants_gradients(x, states, directions):
        reason = "gradients are wanted"
    elif torch.is_autocast_enabled("cpu"):
        reason = "autocast wants another precision"
    elif native.missing:
        reason = native.missing
    elif torch.compiler.is_compiling():
        pass  # compilers record one operator and cannot trace the checks that follow
    elif type(x) not in PLAIN_TYPES or torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        reason = "the input is not a plain tensor"
    elif torch._C._get_tracing_state() is not None:  # pyright: ignore
        reason = "the call is being traced"
    return reason


def wants_gradients(x: Tensor, states: Sequence[Tensor], directions: Sequence[Direction]) -> bool:
    """Return whether PyTorch records gradients of this layer."""
    tensors = (x, *states, *flat(directions))
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def layer(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> LayerOutput:
    """Run a layer over x [T, B, I], or over packed x [N, I] with ``batch_sizes`` [T]; h0 [D, B, P], c0 [D, B, H] or zeros.

    Raises:
        SlimLSTMError: the kernel is missing or cannot run this layer, with the reason.
    """
    reason = obstacle(x, () if h0 is None or c0 is None else (h0, c0), directions)
    if reason:
        raise SlimLSTMError(f"the fused kernel cannot run: {reason}; use backend='auto' to let slimlstm choose")
    return run(x, batch_sizes, h0, c0, directions)


def run(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> LayerOutput:
    """Run a layer as :func:`layer` does, without checking for obstacles."""
    backend = operator if torch.compiler.is_compiling() else cpu
    return backend.run(x, batch_sizes, h0, c0, directions)


def _is_exporting() -> bool:
    """Return whether ``torch.export`` is running, whose programs are for inference although it records gradients."""
    is_exporting: Any = getattr(torch.compiler, "is_exporting", None)  # PyTorch 2.7 and later
    return is_exporting is not None and is_exporting()
