"""Parts of a training step that all trainings share: checked and clipped gradients, and a cycle of learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError


def take_gradients(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], *, clip: float, lr: float, epoch: int
) -> None:
    """Replace the gradients of an optimizer's parameters by those of a loss.

    Args:
        loss: a scalar.
        optimizer: whose gradients are reset first.
        parameters: their gradients together are scaled to the norm ``clip`` where it is larger.
        clip: the largest norm.
        lr: the peak learning rate, for the message.
        epoch: for the message.

    Raises:
        SlimLSTMError: the norm is not finite.

    Examples:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> take_gradients(weight.square().sum(), torch.optim.SGD([weight]), [weight], clip=1.0, lr=0.1, epoch=0)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    if not torch.isfinite(norm):
        raise SlimLSTMError(f"the gradient's norm is {float(norm)} in epoch {epoch}; try an lr below {lr}")


def one_cycle(done: float, warm_up: float, rising: float) -> float:
    """Return the learning rate as a fraction of its peak, when the fraction ``done`` of training is over.

    During the fraction ``warm_up`` it is ``rising``, at most 1; then it falls from 1 to 0 along half a cosine.

    Examples:
        >>> [round(one_cycle(done, 0.1, 0.1 + 9.0 * done), 2) for done in (0.0, 0.05, 0.1, 0.55, 1.0)]
        [0.1, 0.55, 1.0, 0.5, 0.0]
    """
    if done < warm_up:
        return min(1.0, rising)
    return (1.0 + math.cos(math.pi * (done - warm_up) / (1.0 - warm_up))) / 2.0
