"""The fused CPU kernel: the whole recurrence of a layer in one call of compiled code, float32, without autograd.

Weights are packed for the kernel once and packed again only when they changed. What is compared before every call:

- which tensors they are, where their memory is, their number of elements, and PyTorch's count of in-place changes. That
  finds optimiser steps, ``load_state_dict``, in-place edits and assignments to ``.data``, the latter also where the
  allocator gives the new data an old address, since what was packed is kept alive until it is packed anew;
- the contents, because edits through ``.data``, NumPy or DLPack are not counted: all of them for calls of ``THOROUGH``
  rows or more, where that costs little, and 64 elements of every matrix in shorter ones. An edit in this manner of a few
  elements may therefore pass unnoticed by short calls; :func:`forget` after it.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.ops.weights import Direction, Layer, LayerOutput, columns, first_states, flat, rows, shape_of

try:
    import slimlstm.ops._kernel as kernel  # pyright: ignore[reportMissingModuleSource]

    missing = None
except ImportError as error:
    kernel: Any = None
    missing = (
        f"the compiled kernel is not there ({error}); to have it, install a C++17 compiler and then slimlstm from source, "
        "pip install --force-reinstall --no-binary slimlstm slimlstm"
    )

THOROUGH = 256
"""Calls of so many rows (steps times sequences) or more compare all weights with what was packed."""

_plain = (Tensor, nn.Parameter)


def instruction_set() -> str:
    """The instruction set that weights are packed for: the best of the machine, or what SLIMLSTM_ISA names.

    Raises:
        SlimLSTMError: the machine does not have what SLIMLSTM_ISA names, or there is no kernel.
    """
    if missing:
        raise SlimLSTMError(missing)
    names: list[str] = kernel.names()
    wanted = os.environ.get("SLIMLSTM_ISA", names[0])
    if wanted not in names:
        raise SlimLSTMError(f"SLIMLSTM_ISA is {wanted!r}, but this machine runs {', '.join(names)}")
    return wanted


@functools.cache
def tell_missing() -> None:
    """Logs once why there is no kernel."""
    logging.getLogger("slimlstm").warning("running PyTorch's operators, which are slower: %s", missing)


class _Packed:
    """The packed weights of a layer, and what they were packed from."""

    def __init__(self, key: tuple[int | float | str, ...], directions: Sequence[Direction], tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if type(tensor) not in _plain or tensor.dtype != torch.float32 or not tensor.is_cpu:
                raise SlimLSTMError(
                    f"the fused kernel takes float32 weights on the CPU, not {type(tensor).__name__} of {tensor.dtype} on "
                    f"{tensor.device}; convert the module, or use backend='dense'"
                )
        _check_shapes(directions)
        # A parameter may come to life at the address of one that died: its death takes the entry away.
        self.references = [weakref.ref(tensor, lambda _: _cache.pop(key, None)) for tensor in tensors]
        # Not the tensors themselves, which would never die then, but their memory.
        self.memory = [tensor.detach() for tensor in tensors]
        self.counted = not any(tensor.is_inference() for tensor in tensors)
        self.state = _state(tensors, self.counted)
        aliases = [None if tensor is None else tensor.detach() for tensor in flat(directions)]
        arrays = [aliases[at : at + 7] for at in range(0, len(aliases), 7)]
        weights = directions[0]
        self.sizes = columns(weights.ih), columns(weights.hh), rows(weights.hh) // 4, len(directions)
        self.layer = kernel.Layer(instruction_set(), arrays, _storages(directions), _clips(directions), _gains(directions))


def _check_shapes(directions: Sequence[Direction]) -> None:
    """The kernel reads what shapes promise: they have to fit each other."""
    hidden, inputs, outputs = rows(directions[0].hh) // 4, columns(directions[0].ih), columns(directions[0].hh)
    for weights in directions:
        fits = [shape_of(weights.ih) == (4 * hidden, inputs), shape_of(weights.hh) == (4 * hidden, outputs)]
        fits += [bias.shape == (4 * hidden,) for bias in (weights.bias_ih, weights.bias_hh) if bias is not None]
        fits.append(outputs == hidden if weights.hr is None else weights.hr.shape == (outputs, hidden))
        if not all(fits):
            shapes = [None if tensor is None else list(tensor.shape) for tensor in flat(directions)]
            raise SlimLSTMError(f"the weights of a layer do not fit each other: {shapes}")


_cache: dict[tuple[int | float | str, ...], _Packed] = {}
_alive: weakref.WeakSet[_Packed] = weakref.WeakSet()


def forget() -> None:
    """Forgets all packed weights, so that the next call of every layer packs them anew."""
    for packed in _alive:
        packed.state = []  # so that layers that have it find it changed
    _cache.clear()


_version_of = Tensor._version.__get__  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def _state(tensors: Sequence[Tensor], counted: bool) -> list[int]:
    """What changes when tensors change in ways that PyTorch knows of; those of inference mode have no count of changes."""
    places = [*map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors)]
    return [*places, *map(_version_of, tensors)] if counted else places


def _storages(directions: Sequence[Direction]) -> list[str]:
    return [storage for weights in directions for storage in (weights.ih_storage, weights.hh_storage)]


def _clips(directions: Sequence[Direction]) -> list[float]:
    """The bounds of cells and projections, infinite where there is none."""
    bounds = [bound for weights in directions for bound in (weights.cell_clip, weights.proj_clip)]
    return [math.inf if bound is None else bound for bound in bounds]


def _gains(directions: Sequence[Direction]) -> list[float]:
    """The largest norm of a row of what lies between inputs and gates, for V and for U or W of ih and hh.

    Where weights are int8 it tells the kernel how finely inputs have to be rounded; 0 where they are not.
    """
    found: list[float] = []
    for weights in directions:
        for matrix, storage in ((weights.ih, weights.ih_storage), (weights.hh, weights.hh_storage)):
            if storage != "int8":
                found += (0.0, 0.0)
                continue
            u, v = (matrix, None) if isinstance(matrix, Tensor) else matrix
            found += (0.0 if v is None else _largest_row(u.detach(), v.detach()), _largest_row(u.detach()))
    return found


def _largest_row(u: Tensor, v: Tensor | None = None) -> float:
    """The largest norm of a row of U [m, r], or of U V, which may be too large to be computed."""
    squares = ((u if v is None else u @ (v @ v.T)) * u).sum(1)
    return math.sqrt(max(float(squares.max()), 0.0))


def _packed(directions: Sequence[Direction], anew: bool = False) -> _Packed:
    kept = directions if type(directions) is Layer else None
    found: _Packed | None = None if kept is None or anew else kept.packed
    if kept is not None and found is not None and _state(kept.tensors, found.counted) == found.state:
        return found
    present = flat(directions)
    key = (*map(id, present), *_storages(directions), *_clips(directions))
    found = None if anew else _cache.get(key)
    tensors = [tensor for tensor in present if tensor is not None]
    if found is not None and _state(tensors, found.counted) != found.state:
        found = None
    if found is None:
        found = _cache[key] = _Packed(key, directions, tensors)
        _alive.add(found)
    if kept is not None:
        kept.packed, kept.tensors = found, tensors
    return found


def _is_exporting() -> bool:
    """Whether ``torch.export`` follows the call, whose programs are for inference although gradients are on by default."""
    ask: Any = getattr(torch.compiler, "is_exporting", None)  # since 2.7
    return ask is not None and ask()


def obstacle(x: Tensor, states: Sequence[Tensor], directions: Sequence[Direction]) -> str | None:
    """Why the fused kernel cannot run this, or None if it can."""
    reason = None
    if not x.is_cpu:
        reason = f"the input is on {x.device.type}"
    elif x.dtype != torch.float32:
        reason = f"the input is {x.dtype}"
    elif states and not all(state.is_cpu and state.dtype == torch.float32 for state in states):
        reason = "the states are not of the input's device and dtype"
    elif (
        torch.is_grad_enabled()
        and not _is_exporting()
        and any(tensor is not None and tensor.requires_grad for tensor in (x, *states, *flat(directions)))
    ):
        reason = "gradients are wanted"
    elif torch.is_autocast_enabled("cpu"):
        reason = "autocast wants another precision"
    elif missing:
        reason = missing
    elif torch.compiler.is_compiling():
        pass  # the compiler sees one operator, and can make nothing of the questions that follow
    elif type(x) not in _plain or torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        reason = "the input is not a plain tensor"
    elif torch._C._get_tracing_state() is not None:  # pyright: ignore
        reason = "the call is being traced"
    return reason


def layer(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> LayerOutput:
    """One layer over x [T, B, I], or over packed x [N, I] with ``batch_sizes`` [T]; h0 [D, B, P], c0 [D, B, H] or zeros.

    Raises:
        SlimLSTMError: the kernel is not there or cannot run this, with the reason.
    """
    reason = obstacle(x, () if h0 is None or c0 is None else (h0, c0), directions)
    if reason:
        raise SlimLSTMError(f"the fused kernel cannot run: {reason}; use backend='auto' to let slimlstm choose")
    return run(x, batch_sizes, h0, c0, directions)


def run(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> LayerOutput:
    """What :func:`layer` does, where there is known to be no obstacle."""
    if torch.compiler.is_compiling():
        h0, c0 = first_states(x, batch_sizes, h0, c0, directions)
        storages = ",".join(_storages(directions))
        return LayerOutput(*_operator(x, batch_sizes, h0, c0, flat(directions), storages, _clips(directions)))
    packed = _packed(directions)
    inputs, outputs, hidden, number = packed.sizes
    # Of PyTorch's ways to allocate this is the fastest, a size by itself for every dimension.
    new = x.new_empty
    if batch_sizes is None:
        steps, batch, width = x.shape
        count, sizes = steps * batch, 0
        output = new(steps, batch, number * outputs)
    else:
        batch_sizes = batch_sizes.contiguous()
        (count, width), steps, sizes = x.shape, batch_sizes.shape[0], batch_sizes.data_ptr()
        batch = h0.shape[1] if h0 is not None else int(batch_sizes[0]) if steps else 0
        output = new(count, number * outputs)
    x, h0_at, c0_at = x.contiguous(), 0, 0
    fits = width == inputs
    if h0 is not None and c0 is not None:
        fits = fits and h0.shape == (number, batch, outputs) and c0.shape == (number, batch, hidden)
        h0, c0 = h0.contiguous(), c0.contiguous()
        h0_at, c0_at = h0.data_ptr(), c0.data_ptr()
    if not fits:
        shapes = [None if state is None else list(state.shape) for state in (h0, c0)]
        raise SlimLSTMError(
            f"the input {list(x.shape)} and the states {shapes[0]} and {shapes[1]} do not fit a layer of "
            f"{inputs} inputs, {hidden} hidden units, {outputs} outputs and {number} directions"
        )
    if count == 0:
        h0, c0 = first_states(x, batch_sizes, h0, c0, directions)
        return LayerOutput(output, h0.clone(), c0.clone())
    h, c = new(number, batch, outputs), new(number, batch, hidden)
    call = x.data_ptr(), sizes, steps, batch, count, h0_at, c0_at, output.data_ptr(), h.data_ptr(), c.data_ptr()
    thoroughly = count >= THOROUGH or not packed.counted
    while not packed.layer.run(*call, thoroughly, torch.get_num_threads()):
        packed = _packed(directions, anew=True)
    return LayerOutput(output, h, c)


@torch.library.custom_op("slimlstm::layer", mutates_args=(), device_types="cpu")
def _operator(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor | None],
    storages: str,
    clips: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`run` as ``torch.compile`` and ``torch.export`` see it; weights as of :func:`flat`, storages by commas."""
    directions: list[Direction] = []
    kept = storages.split(",")
    for index in range(len(kept) // 2):
        ih_v, ih, hh_v, hh, bias_ih, bias_hh, hr = weights[7 * index : 7 * index + 7]
        ih_storage, hh_storage = kept[2 * index : 2 * index + 2]
        matrices = _matrix(ih, ih_v), _matrix(hh, hh_v)
        bounds = clips[2 * index : 2 * index + 2]
        directions.append(Direction(*matrices, bias_ih, bias_hh, hr, ih_storage, hh_storage, *bounds))
    result = run(x, batch_sizes, h0, c0, directions)
    return result.output, result.h, result.c


def _matrix(u: Tensor | None, v: Tensor | None) -> Any:
    return u if v is None else (u, v)


@_operator.register_fake
def _(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor | None],
    storages: str,
    clips: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], h0.shape[0] * h0.shape[2])), torch.empty_like(h0), torch.empty_like(c0)
