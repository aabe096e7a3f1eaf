"""The processes that train together."""

from __future__ import annotations

import atexit
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """Processes that train together.

    Attributes:
        device: the device of this process.
        rank: the number of this process, from 0.
        count: the number of processes.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    def number_of_first(self, number: float) -> float:
        """Return the number that process 0 passes."""
        if self.count == 1:
            return number
        box = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return float(box)

    def object_of_first(self, content: Any) -> Any:
        """Return the object that process 0 passes."""
        contents = [content]
        if self.count > 1:
            dist.broadcast_object_list(contents, 0, device=self.device)
        return contents[0]

    def gather(self, content: Any) -> list[Any]:
        """Return the objects that all processes pass, by rank."""
        contents = [content] * self.count
        if self.count > 1:
            dist.all_gather_object(contents, content)
        return contents

    def average(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> float:
        """Replace the parameters' gradients by their means over all processes; return the mean loss."""
        if self.count == 1:
            return float(loss.detach())
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # One message for all numbers: many short ones are slower.
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.detach().reshape(1)])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, part in zip(gradients, flat[:-1].split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return float(flat[-1])


def current_processes(device: torch.device) -> Processes:
    """Return the process group in use; start one first if ``torchrun`` launched this process."""
    if not dist.is_available():
        return Processes(device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        # The group stays for later runs, since starting a second one is not reliable.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave_group)
    return Processes(device, dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes(device)


def _leave_group() -> None:
    """Leave the process group, whose threads may abort a process that exits while they run."""
    if dist.is_initialized():
        dist.destroy_process_group()
