"""Pack weights for the compiled kernel: once, and again only after they have changed.

Two comparisons before every call detect changes:

- of the identity, memory address and size of each tensor, and of PyTorch's counter of in-place changes. This detects
  optimizer steps, ``load_state_dict``, in-place edits and assignments to ``.data``. The old memory stays alive until the
  weights are packed again, so that no new tensor can have its address;
- of the contents of all weights, because PyTorch does not count edits through ``.data``, NumPy or DLPack. This comparison
  costs as much as one or several time steps. It is skipped where nobody can have edited the weights: since the last
  comparison the module has handed out none of its parameters, and at that time nobody else held them, a view of their
  memory or their dictionary (:func:`is_private`).
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Sequence
from operator import gt
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import native
from slimlstm.ops.weights import CachedLayer, Direction, columns, flat, rows, shape_of

PLAIN_TYPES: tuple[type, ...] = (Tensor, nn.Parameter)
"""Types whose memory the kernel may read; subclasses may hold something else."""

_LEAST_IN_FOUR_BITS = 1 << 20
"""Number of weights of a layer; see :func:`_least_in_four_bits`."""

_Key = tuple[int | float | str, ...]


class PackedLayer:
    """The packed weights of a layer, and the state of the tensors when they were packed.

    Attributes:
        references: weak references to the tensors.
        memory: aliases of the tensors, which keep the memory alive.
        counted: whether PyTorch counts in-place changes of the tensors.
        state: the result of :func:`state_of` when they were packed.
        sizes: (I, P, H, D).
        rounds_inputs: whether the kernel rounds inputs to int8.
        layer: the kernel's layer.
    """

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
    """Return the packed weights of a layer; pack them if they have changed, or if ``anew``.

    Raises:
        SlimLSTMError: the weights are not float32 on the CPU, or do not fit each other.
    """
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


_users_of: Any = getattr(torch._C, "_storage_Use_Count", None)  # pyright: ignore[reportPrivateUsage]
_references_of: Any = getattr(Tensor, "_use_count", None)


def _place_of(tensor: Tensor) -> int:
    """Return the address of PyTorch's record of a tensor's memory."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


@torch.inference_mode(False)
@torch.enable_grad()
def _counts_of_one() -> tuple[int, int, int]:
    """Return how many holders of a tensor Python and PyTorch count beyond those that :func:`is_private` knows.

    Returns:
        The references that the call of ``getrefcount`` itself adds; the references that a graph adds to a tensor that it
        holds, which PyTorch does since version 2.10; and the users of the memory that asking for their number adds.
    """
    tensor = torch.zeros(1, device="cpu", requires_grad=True)
    users = _users_of(_place_of(tensor)) - 1 if _users_of else 0
    before = getrefcount(tensor)
    graph = tensor * tensor
    in_graph = getrefcount(tensor) - before
    del graph
    return next(map(getrefcount, [object()])) - 1, in_graph if _references_of else 0, users


_asking, _in_graph, _asking_users = _counts_of_one()


def is_foreign(parameters: Sequence[Tensor]) -> bool:
    """Return whether PyTorch shares some of the memory with a file, another process or a NumPy array.

    For memory that a NumPy array has once shared, PyTorch gives the same answer forever, so ask before anyone can make such
    an array.
    """
    try:
        storages = [parameter.untyped_storage() for parameter in parameters]
    except NotImplementedError:  # tensors without memory, as within torch.func
        return True
    return not all(storage.resizable() and not storage.is_shared() for storage in storages)


def is_private(parameters: Sequence[Tensor], layers: Sequence[CachedLayer], outside: int) -> bool:
    """Return whether nobody holds these parameters or views of their memory, except a module and its layers.

    Args:
        parameters: all parameters of a module, in a list that nobody else holds.
        layers: the module's layers, whose weights are these parameters.
        outside: how many more references the module has to each parameter, such as the one in its dictionary.
    """
    if _users_of is None or not all(type(parameter) in PLAIN_TYPES for parameter in parameters):
        return False
    held = Counter(id(tensor) for layer in layers for tensor in (*flat(layer), *layer.tensors))
    places = list(map(_place_of, parameters))
    users = Counter(places)
    users.update(_place_of(tensor) for layer in layers for tensor in getattr(layer.packed, "memory", ()))
    found = list(map(getrefcount, parameters))
    expected = [
        _asking + 1 + outside + held[id(tensor)] + (_in_graph if _in_graph and _references_of(tensor) > 1 else 0)
        for tensor in parameters
    ]
    return not any(map(gt, found, expected)) and all(_users_of(place) <= _asking_users + users[place] for place in places)


_version_of = Tensor._version.__get__  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def state_of(tensors: Sequence[Tensor], counted: bool) -> list[int]:
    """Return addresses and sizes, and, if ``counted``, PyTorch's counters of in-place changes.

    Tensors of inference mode have no counter.
    """
    places = [*map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors)]
    return [*places, *map(_version_of, tensors)] if counted else places


def storages_of(directions: Sequence[Direction]) -> list[str]:
    """Return the storages of ih and hh of each direction."""
    return [storage for weights in directions for storage in (weights.ih_storage, weights.hh_storage)]


def _packed_storages(directions: Sequence[Direction], isa: str) -> list[str]:
    """Return the kernel's storages of ih and hh of each direction, with int4 for int8 where four bits are faster.

    The kernel then packs a matrix in four bits if these hold its integers exactly, else in eight. The results are the same.
    """
    storages = storages_of(directions)
    weights = sum(tensor.numel() for tensor in flat(directions) if tensor is not None and tensor.ndim > 1)
    if weights < _least_in_four_bits(isa):
        return storages
    return ["int4" if storage == "int8" else storage for storage in storages]


def _least_in_four_bits(isa: str) -> int:
    """Return how many weights a layer needs to be faster in four bits than in eight.

    AVX2 and AVX-512 without VNNI multiply four bits faster. On other instruction sets, unpacking takes longer than reading
    eight bits from a core's own cache. The bound was measured where this cache has 2 MiB.
    """
    return 0 if isa in ("avx2", "avx512") else _LEAST_IN_FOUR_BITS


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
