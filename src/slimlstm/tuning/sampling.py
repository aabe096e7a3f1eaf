"""Give each step and process its batch and its random numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]  # the public name is of newer versions

from slimlstm.errors import SlimLSTMError
from slimlstm.modules.arguments import check_batches, check_function
from slimlstm.tuning.history import RunRecord
from slimlstm.tuning.processes import Processes

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]
"""Batches of any type: an iterable that can be read once per epoch, or a function from the epoch to its batches."""


def seed_with(*key: Any) -> None:
    """Seed PyTorch's random numbers with a hash of ``key``."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def check_batches_of_epochs(batches: Batches) -> None:
    """Raise SlimLSTMError unless ``batches`` can be iterated over once per epoch, or is a function of the epoch."""
    if callable(batches) and not isinstance(batches, nn.Module | type):
        check_function(batches, "batches", "epoch")
        return
    check_batches(batches)
    if isinstance(batches, Iterator):
        raise SlimLSTMError(
            f"batches is a {type(batches).__name__}, which can be read only once; give a list, a DataLoader, or a function "
            "from the number of the epoch to its batches"
        )


def check_not_of_inference(tensors: Any, what: str) -> None:
    """Raise SlimLSTMError if a tensor was made in inference mode.

    Args:
        tensors: tensors, also nested in lists, tuples or mappings.
        what: the beginning of the message, such as ``"a batch holds tensors"``.
    """
    if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in pytree.tree_leaves(tensors)):
        raise SlimLSTMError(
            f"{what} from torch.inference_mode(), which nothing can train; make them outside of it, or clone them outside"
        )


def own_batches(batches: Batches, record: RunRecord, processes: Processes, seed: int) -> Iterator[Any]:
    """Yield this process's batches without end, one for each step, beginning at the record's epoch and position.

    The record's epoch and position are updated.

    The random numbers of a batch depend only on ``seed``, the epoch and the position in it, so that a resumed run draws the
    same batches.

    Raises:
        SlimLSTMError: an epoch has too few batches for all processes, or fewer than a resumed run has taken of it.
    """
    while True:
        seed_with(seed, "epoch", record.epoch)
        source, position = iter(batches(record.epoch) if callable(batches) else batches), 0
        while True:
            seed_with(seed, "batch", record.epoch, position)
            of_one_step = list(islice(source, processes.count))
            if len(of_one_step) < processes.count:
                break
            position += 1
            if position > record.position:
                record.position = position
                yield of_one_step[processes.rank]
        if position < max(record.position, 1):
            raise SlimLSTMError(
                f"epoch {record.epoch} has {position * processes.count + len(of_one_step)} batches, but "
                f"{max(record.position, 1) * processes.count} are needed; every epoch needs at least one batch a process, "
                "and a resumed run needs the same batches as before"
            )
        record.epoch, record.position = record.epoch + 1, 0
