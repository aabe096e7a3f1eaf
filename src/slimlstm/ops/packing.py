"""Weights packed for the compiled kernel: packed once, and again only after they have changed.

Before every call these are compared with the packed weights:

- the identity, memory address and size of each tensor, and PyTorch's counter of in-place changes. This detects optimiser
  steps, ``load_state_dict``, in-place edits and assignments to ``.data``. The old memory stays alive until the weights are
  packed again, so that a new tensor cannot have its address;
- the contents, because edits through ``.data``, NumPy or DLPack are not counted: all elements in calls of
  :data:`FULL_CHECK_ROWS` rows or more, where that costs little, and 64 elements of each matrix in shorter calls. A short
  call may therefore miss an uncounted edit of a few elements; call :func:`forget` after such an edit.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import native
from slimlstm.ops.weights import CachedLayer, Direction, columns, flat, rows, shape_of

FULL_CHECK_ROWS = 256
"""Calls of this many rows (steps times sequences) or more compare all weights with the packed ones."""

PLAIN_TYPES: tuple[type, ...] = (Tensor, nn.Parameter)
"""Types whose memory the kernel may read; subclasses may hold something else."""

_USUAL_CACHE = 1 << 20
"""Bytes of a core's L2 cache where the system does not say."""

_Key = tuple[int | float | str, ...]


class PackedLayer:
    """The packed weights of a layer, with the state of the tensors when they were packed."""

    def __init__(self, key: _Key, directions: Sequence[Direction], tensors: list[Tensor]) -> None:
        from slimlstm.ops import _kernel  # pyright: ignore[reportMissingModuleSource]  # absent without a compiler

        _check_tensors(tensors)
        _check_shapes(directions)
        # ids are reused: drop the entry of a freed tensor.
        self.references = [weakref.ref(tensor, lambda _: _cache.pop(key, None)) for tensor in tensors]
        # Hold the memory but not the tensors, which could otherwise never be freed.
        self.memory = [tensor.detach() for tensor in tensors]
        self.counted = not any(tensor.is_inference() for tensor in tensors)
        self.state = state_of(tensors, self.counted)
        aliases = [None if tensor is None else tensor.detach() for tensor in flat(directions)]
        arrays = [aliases[at : at + 7] for at in range(0, len(aliases), 7)]
        weights = directions[0]
        self.sizes = columns(weights.ih), columns(weights.hh), rows(weights.hh) // 4, len(directions)
        self.rounds_inputs = "int8" in storages_of(directions)
        isa = native.instruction_set()
        storages = _packed_storages(directions, isa)
        self.layer = _kernel.Layer(isa, arrays, storages, clips_of(directions), _gains(directions))


def packed_layer(directions: Sequence[Direction], anew: bool = False) -> PackedLayer:
    """Return the packed weights of a layer; pack them if they have changed, or if ``anew``."""
    cached = directions if type(directions) is CachedLayer else None
    found: PackedLayer | None = None if cached is None or anew else cached.packed
    if cached is not None and found is not None and state_of(cached.tensors, found.counted) == found.state:
        return found
    present = flat(directions)
    key = (*map(id, present), *storages_of(directions), *clips_of(directions))
    found = None if anew else _cache.get(key)
    tensors = [tensor for tensor in present if tensor is not None]
    if found is not None and state_of(tensors, found.counted) != found.state:
        found = None
    if found is None:
        found = _cache[key] = PackedLayer(key, directions, tensors)
        _alive.add(found)
    if cached is not None:
        cached.packed, cached.tensors = found, tensors
    return found


_cache: dict[_Key, PackedLayer] = {}
_alive: weakref.WeakSet[PackedLayer] = weakref.WeakSet()


def forget() -> None:
    """Forget all packed weights, so that the next call of every layer packs them again."""
    for packed in _alive:
        packed.state = []  # never equal to the state of tensors, so that cached layers are packed again too
    _cache.clear()


_version_of = Tensor._version.__get__  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def state_of(tensors: Sequence[Tensor], counted: bool) -> list[int]:
    """Return addresses, sizes and, unless the tensors are of inference mode, PyTorch's counters of in-place changes."""
    places = [*map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors)]
    return [*places, *map(_version_of, tensors)] if counted else places


def storages_of(directions: Sequence[Direction]) -> list[str]:
    """Return the storages of ih and hh of each direction."""
    return [storage for weights in directions for storage in (weights.ih_storage, weights.hh_storage)]


def _packed_storages(directions: Sequence[Direction], isa: str) -> list[str]:
    """Return the kernel's storages of ih and hh of each direction: int4 for int8 where four bits are faster.

    The kernel then packs a matrix in four bits if they hold its integers exactly, and else in eight; results are the same.
    """
    storages = storages_of(directions)
    weights = sum(tensor.numel() for tensor in flat(directions) if tensor is not None and tensor.ndim > 1)
    if weights < _least_in_four_bits(isa):
        return storages
    return ["int4" if storage == "int8" else storage for storage in storages]


def _least_in_four_bits(isa: str) -> int:
    """Return how many weights a layer needs to be faster in four bits than in eight; measured.

    AVX2 and AVX-512 without VNNI multiply four bits faster. Otherwise unpacking takes longer than reading eight bits from a
    core's cache, of which a layer has about half for itself.
    """
    if isa in ("avx2", "avx512"):
        return 0
    name = "SC_LEVEL2_CACHE_SIZE"
    found = os.sysconf(name) if name in getattr(os, "sysconf_names", ()) else 0
    return (found if found > 0 else _USUAL_CACHE) // 2


def clips_of(directions: Sequence[Direction]) -> list[float]:
    """Return the bounds of cells and projections of each direction, infinity for no bound."""
    bounds = [bound for weights in directions for bound in (weights.cell_clip, weights.proj_clip)]
    return [math.inf if bound is None else bound for bound in bounds]


def _check_tensors(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if type(tensor) not in PLAIN_TYPES or tensor.dtype != torch.float32 or not tensor.is_cpu:
            raise SlimLSTMError(
                f"the fused kernel takes float32 weights on the CPU, not {type(tensor).__name__} of {tensor.dtype} on "
                f"{tensor.device}; convert the module, or use backend='dense'"
            )
        if tensor.is_neg():
            raise SlimLSTMError("a weight is a negated view, whose memory holds other numbers; assign its clone()")


def _check_shapes(directions: Sequence[Direction]) -> None:
    """Check that the shapes of weights agree, because the kernel reads memory by them."""
    hidden, inputs, outputs = rows(directions[0].hh) // 4, columns(directions[0].ih), columns(directions[0].hh)
    for weights in directions:
        fits = [shape_of(weights.ih) == (4 * hidden, inputs), shape_of(weights.hh) == (4 * hidden, outputs)]
        fits += [bias.shape == (4 * hidden,) for bias in (weights.bias_ih, weights.bias_hh) if bias is not None]
        fits.append(outputs == hidden if weights.hr is None else weights.hr.shape == (outputs, hidden))
        if not all(fits):
            shapes = [None if tensor is None else list(tensor.shape) for tensor in flat(directions)]
            raise SlimLSTMError(
                f"the weights of a layer do not fit each other: {shapes}; give every direction ih [4H, I], hh [4H, P], "
                "biases [4H] and hr [P, H]"
            )


def _gains(directions: Sequence[Direction]) -> list[float]:
    """Return the largest row norms of the maps from inputs to gates, for V and for U (or W) of ih and hh.

    They bound how far the rounded inputs of int8 weights can move a gate; 0 for other storages.
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
    """Return the largest row norm of U [m, r], or of U V without computing the product."""
    squares = ((u if v is None else u @ (v @ v.T)) * u).sum(1)
    return math.sqrt(max(float(squares.max()), 0.0))
