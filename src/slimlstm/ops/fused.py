"""The fused CPU kernel as a backend, and the reasons why it cannot run a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import cpu, native, operator, recompute
from slimlstm.ops.derivatives import is_transformed
from slimlstm.ops.packing import PLAIN_TYPES
from slimlstm.ops.weights import Direction, LayerOutput, wants_gradients


def obstacle(x: Tensor, states: Sequence[Tensor], directions: Sequence[Direction], training: bool = False) -> str | None:
    """Return why the fused kernel cannot run this layer, or None if it can.

    ``training`` as in :func:`slimlstm.ops.layer`.
    """
    reason = None
    if not x.is_cpu:
        reason = f"the input is on {x.device.type}"
    elif x.dtype != torch.float32:
        reason = f"the input is {x.dtype}"
    elif states and not all(state.is_cpu and state.dtype == torch.float32 for state in states):
        reason = "the states are not of the input's device and dtype"
    elif training and not _is_exporting() and wants_gradients(x, states, directions):
        reason = "the module is in training mode and gradients are on"
    elif torch.is_autocast_enabled("cpu"):
        reason = "autocast wants another precision"
    elif native.missing:
        reason = native.missing
    elif torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        reason = "torch.onnx.export knows only PyTorch's operators; slimlstm.export_onnx keeps factors and low bits"
    elif torch.compiler.is_compiling():
        pass  # compilers record one operator and cannot trace the checks that follow
    elif type(x) not in PLAIN_TYPES or is_transformed():
        reason = "the input is not a plain tensor"
    elif torch._C._get_tracing_state() is not None:  # pyright: ignore
        reason = "the call is being traced"
    elif forward_ad._current_level >= 0:  # pyright: ignore[reportPrivateUsage]
        reason = "forward-mode differentiation is on"
    return reason


def layer(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    directions: Sequence[Direction],
    training: bool = False,
) -> LayerOutput:
    """Run a layer over x [T, B, I], or over packed x [N, I] with ``batch_sizes`` [T]; h0 [D, B, P], c0 [D, B, H] or zeros.

    Raises:
        SlimLSTMError: the kernel is missing or cannot run this layer, with the reason.
    """
    reason = obstacle(x, () if h0 is None or c0 is None else (h0, c0), directions, training)
    if reason:
        raise SlimLSTMError(f"the fused kernel cannot run: {reason}; use backend='auto' to let slimlstm choose")
    return run(x, batch_sizes, h0, c0, directions)


def run(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> LayerOutput:
    """Run a layer as :func:`layer` does, without checking for obstacles."""
    if torch.compiler.is_compiling():
        return operator.run(x, batch_sizes, h0, c0, directions)
    if wants_gradients(x, () if h0 is None or c0 is None else (h0, c0), directions):
        return recompute.run(x, batch_sizes, h0, c0, directions)
    return cpu.run(x, batch_sizes, h0, c0, directions)


def _is_exporting() -> bool:
    """Return whether ``torch.export`` is running, whose programs are for inference although it records gradients."""
    is_exporting: Any = getattr(torch.compiler, "is_exporting", None)  # PyTorch 2.7 and later
    return is_exporting is not None and is_exporting()
