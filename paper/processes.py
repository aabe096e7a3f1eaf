"""Processes that share the streams of a text, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from slimlstm.errors import SlimLSTMError


@dataclass(frozen=True)
class Processes:
    """This process and how many share its work; a lone process needs no process group.

    Examples:
        >>> Processes(1, 0).mean(torch.tensor([2.0])).tolist()
        [2.0]
    """

    count: int
    rank: int

    @classmethod
    def from_environment(cls) -> Processes:
        """Read what ``torchrun`` set, else one process."""
        return cls(int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")))

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def check_streams(self, streams: int) -> None:
        """Check that every process gets as many streams.

        Raises:
            SlimLSTMError: they cannot be divided evenly.
        """
        if streams % self.count:
            raise SlimLSTMError(f"{streams} streams cannot be divided evenly among {self.count} processes")

    def join(self, device: str) -> torch.device:
        """Join the process group, if there are others, and return this process's device."""
        if self.count > 1:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor / self.count

    def first(self, value: float, device: torch.device) -> float:
        """Return the first process's value."""
        box = torch.tensor(value, dtype=torch.float64, device=device)
        if self.count > 1:
            dist.broadcast(box, 0)
        return float(box)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order of rank."""
        found = [value]
        if self.count > 1:
            found = cast("list[Any]", [None] * self.count)
            dist.all_gather_object(found, value)
        return found

    def leave(self) -> None:
        """Wait for the others and leave the process group."""
        if self.count > 1:
            dist.barrier()
            dist.destroy_process_group()
