"""Choose among the backends that use PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import dense, native, reference, training
from slimlstm.ops.derivatives import is_transformed
from slimlstm.ops.packing import PLAIN_TYPES
from slimlstm.ops.weights import Direction, LayerOutput, Matrix, columns, is_clipped, parts_of, rows, wants_gradients

Backend = Callable[[Tensor, Tensor | None, Tensor, Tensor, Sequence[Direction]], LayerOutput]

BACKENDS: dict[str, Backend] = {"reference": reference.layer, "dense": dense.layer, "training": training.layer}

# The interpreter's overhead for a step of the loop over time, in multiply-adds that PyTorch could do instead.
_STEP_OVERHEAD = 1_500_000
# The cost of the loop's unfused activations for each hidden unit and step, in the same unit.
_UNIT_OVERHEAD = 700
# Training without the compiled kernel: a loop that multiplies by factors is faster than PyTorch's LSTM with their product
# if hh has at least so many weights, and its factors have at most this share of them.
_LARGE, _THIN = 2**19, 0.7
# Training without the compiled kernel and with a dense hh: the loop is faster only in a precision below float32, and if ih
# and hh together have at least so many weights.
_LARGE_TOGETHER = 9 * 2**18
# Training dense matrices in float32: oneDNN, which packs the weights in every call, is faster if hh has at least so many
# weights, and the call at least so many inputs.
_LARGE_FOR_ONEDNN, _MANY_FOR_ONEDNN = 2**20, 512


class Choice(NamedTuple):
    """The backend chosen for a layer, and the reason."""

    backend: str
    reason: str


def choose_plain_backend(x: Tensor, batch_sizes: Tensor | None, directions: Sequence[Direction], reason: str) -> Choice:
    """Choose among PyTorch's operators for a layer that the fused kernel cannot run for the given ``reason``.

    A loop over time runs if rebuilding hh would cost more than it saves, and PyTorch's LSTM if not.

    Raises:
        SlimLSTMError: the call is being traced, and the layer clips.
    """
    if torch._C._get_tracing_state() is not None and not torch.compiler.is_compiling():  # pyright: ignore
        if is_clipped(directions):
            raise SlimLSTMError(
                "a layer that clips cannot be traced: its loop would keep this input's number of steps and sequences; use "
                "torch.export or slimlstm.export_onnx"
            )
        return Choice("dense", f"{reason}; a loop would keep this input's number of steps")
    if is_clipped(directions):
        return Choice("reference", f"{reason}; PyTorch's LSTM does not clip")
    if forward_ad._current_level >= 0:  # pyright: ignore[reportPrivateUsage]
        return Choice("reference", f"{reason}; PyTorch's LSTM has no forward-mode derivatives in float32")
    if x.device.type != "cpu":
        return Choice("dense", reason)
    if wants_gradients(x, (), directions):
        if training.obstacle(batch_sizes, directions) is None and all(_trains_faster(weights, x) for weights in directions):
            return Choice("training", f"{reason}; a loop over time trains faster than PyTorch's LSTM")
        return Choice("dense", reason)
    return _choose_for_inference(x, batch_sizes, directions, reason)


def _choose_for_inference(x: Tensor, batch_sizes: Tensor | None, directions: Sequence[Direction], reason: str) -> Choice:
    factored = [weights.hh for weights in directions if not isinstance(weights.hh, Tensor)]
    if not factored:
        return Choice("dense", f"{reason}; hh is dense")
    if torch.compiler.is_compiling():
        return Choice("dense", f"{reason}; a loop would keep this input's number of steps")
    steps = x.shape[0] if batch_sizes is None else len(batch_sizes)
    inputs = x.shape[0] * x.shape[1] if batch_sizes is None else x.shape[0]
    rebuild = sum(u.shape[0] * u.shape[1] * v.shape[1] for u, v in factored)
    dense_cost = rebuild + inputs * sum(rows(w) * columns(w) for w in factored)
    loop_cost = steps * len(factored) * _STEP_OVERHEAD + inputs * sum(
        u.numel() + v.numel() + _UNIT_OVERHEAD * (len(u) // 4) for u, v in factored
    )
    if loop_cost < dense_cost:
        return Choice("reference", f"{reason}; rebuilding hh would cost more than {steps} thin steps")
    return Choice("dense", f"{reason}; hh is rebuilt once for {steps} steps")


def _trains_faster(weights: Direction, x: Tensor) -> bool:
    """Return whether a Python loop over time trains faster on the CPU than PyTorch's LSTM with these weights."""
    if torch.compiler.is_compiling() or is_transformed() or type(x) not in PLAIN_TYPES:
        return False
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    ih, hh = weights.ih, weights.hh
    if not native.missing and precision in (torch.float32, torch.bfloat16):
        is_dense = isinstance(ih, Tensor) and isinstance(hh, Tensor) and precision == torch.float32
        is_large = is_dense and _numbers(hh) >= _LARGE_FOR_ONEDNN and x.shape[0] * x.shape[1] >= _MANY_FOR_ONEDNN
        return not (is_large and torch.backends.mkldnn.enabled)
    if isinstance(hh, tuple):
        dense = rows(hh) * columns(hh)
        return dense >= _LARGE and _numbers(hh) <= _THIN * dense
    return precision in (torch.bfloat16, torch.float16) and _numbers(ih) + _numbers(hh) >= _LARGE_TOGETHER


def _numbers(matrix: Matrix) -> int:
    return sum(part.numel() for part in parts_of(matrix))
