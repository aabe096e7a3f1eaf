"""Distribute tensors over safetensors files of a limited size, and put them together again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError

_HEADER = 128
"""Bytes of a safetensors header beside its entries: length, metadata and padding."""
_ENTRY = 112
"""Bytes of a header's entry beside name and shape: keys, dtype and two offsets."""


def split(tensors: Mapping[str, Tensor], most: int | None) -> tuple[list[dict[str, Tensor]], dict[str, int]]:
    """Return groups of tensors, each at most ``most`` bytes as a safetensors file, and the number of parts of cut tensors.

    A tensor ``w`` larger than a file is cut along its first axis into ``w.part0``, ``w.part1`` and so on. If ``most`` is
    None, all tensors are one group.

    Args:
        tensors: the tensors by name.
        most: the largest number of bytes of a file, its header included; None for no limit.

    Raises:
        SlimLSTMError: one row of a tensor is too large, or a part's name belongs to another tensor.

    Examples:
        >>> groups, cut = split({"w": torch.ones(1000, 10), "b": torch.ones(10)}, most=30_000)
        >>> [list(group) for group in groups], cut
        ([['w.part0'], ['w.part1', 'b']], {'w': 2})
    """
    if most is None:
        return [dict(tensors)], {}
    groups: list[dict[str, Tensor]] = [{}]
    cut: dict[str, int] = {}
    free = most - _HEADER
    for name, tensor in tensors.items():
        parts = list(_parts(name, tensor, most - _HEADER))
        if len(parts) > 1:
            cut[name] = len(parts)
        for index, part in enumerate(parts):
            key = name if len(parts) == 1 else f"{name}.part{index}"
            if key != name and key in tensors:
                raise SlimLSTMError(f"{name} is larger than a file of {most:,} bytes, and its part's name {key} is taken")
            if groups[-1] and _cost(key, part) > free:
                groups.append({})
                free = most - _HEADER
            groups[-1][key] = part
            free -= _cost(key, part)
    return groups, cut


def join(tensors: Mapping[str, Tensor], cut: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the tensors, with the parts of every cut tensor joined.

    Args:
        tensors: the tensors of all files by name, parts included.
        cut: the number of parts of every cut tensor, by its name; see :func:`split`.

    Raises:
        SlimLSTMError: a part is missing.

    Examples:
        >>> groups, cut = split({"w": torch.ones(1000, 10)}, most=30_000)
        >>> {name: list(w.shape) for name, w in join(groups[0] | groups[1], cut).items()}
        {'w': [1000, 10]}
    """
    whole = dict(tensors)
    for name, count in cut.items():
        parts = [whole.pop(f"{name}.part{index}", None) for index in range(min(count, len(tensors)))]
        found = [part for part in parts if part is not None]
        if len(found) < count:
            raise SlimLSTMError(
                f"{name} has {count} parts, of which only {len(found)} are in the files; copy the folder again"
            )
        whole[name] = torch.cat(found)
    return whole


def _parts(name: str, tensor: Tensor, most: int) -> Iterator[Tensor]:
    """Yield the tensor, in contiguous groups of rows if it is too large for one file."""
    # A part's name is longer than its tensor's.
    space = most - _cost(f"{name}.part99999", tensor[:0] if tensor.ndim else tensor)
    size = tensor.numel() * tensor.element_size()
    if not size or size <= space:
        yield tensor.contiguous()
        return
    rows = space * len(tensor) // size if tensor.ndim else 0
    if rows < 1:
        raise SlimLSTMError(
            f"one row of {name} {list(tensor.shape)} does not fit into {most + _HEADER:,} bytes; allow larger files"
        )
    yield from (part.contiguous() for part in tensor.split(rows))


def _cost(name: str, tensor: Tensor) -> int:
    """Return an upper bound on the bytes that a tensor adds to a safetensors file."""
    return tensor.numel() * tensor.element_size() + len(json.dumps([name, list(tensor.shape)])) + _ENTRY
