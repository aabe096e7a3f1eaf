"""Losses for fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss

from slimlstm.errors import SlimLSTMError

Loss = Callable[[nn.Module, Any], Tensor]
"""Takes (model, batch); returns the losses of single predictions, of any shape, or their mean."""


@runtime_checkable
class StatefulLoss(Protocol):
    """A loss with a state that passes from batch to batch, for instance the hidden state of a language model."""

    def state_dict(self) -> Any:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Continue from a state that :meth:`state_dict` returned."""
        ...


def distillation(teacher: nn.Module, outputs: Callable[[nn.Module, Any], Tensor], temperature: float | None = 1.0) -> Loss:
    """Return a loss for :func:`finetune`: the divergence of ``outputs(model, batch)`` from ``outputs(teacher, batch)``.

    Args:
        teacher: the dense model; it is put into evaluation mode.
        outputs: takes (model, batch) and returns the outputs to compare, [..., V].
        temperature: see :func:`divergence`.

    Returns:
        A function of (model, batch) that returns the mean divergence.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> loss = distillation(teacher, lambda model, batch: model(batch))
        >>> bool(loss(student, torch.randn(2, 4)) > loss(teacher, torch.randn(2, 4)))
        True
    """
    teacher.eval()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            expected = outputs(teacher, batch)
        return divergence(outputs(model, batch), expected, temperature)

    return loss


def divergence(found: Tensor, expected: Tensor, temperature: float | None = 1.0) -> Tensor:
    """Return the mean divergence of outputs from the expected outputs.

    With a temperature T it is T² KL(softmax(expected / T) ‖ softmax(found / T)), for logits (Hinton, Vinyals and Dean
    2015, arXiv 1503.02531). Without one it is the squared difference, for outputs of any kind.

    Args:
        found: logits or other outputs [..., V].
        expected: the targets, of the same shape.
        temperature: above zero; None for the squared difference.

    Returns:
        A scalar in float32.

    Raises:
        SlimLSTMError: the shapes differ, or the temperature is not above zero.

    Examples:
        >>> divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]), temperature=None)
        tensor(2.)
    """
    if found.shape != expected.shape:
        raise SlimLSTMError(
            f"outputs of shape {list(found.shape)} cannot be compared with targets of shape {list(expected.shape)}; "
            "the two models have to return the same shape"
        )
    if temperature is None:
        return mse_loss(found.float(), expected.float())
    if not temperature > 0.0:
        raise SlimLSTMError(
            f"the temperature is {temperature}; give a number above zero, or None for the squared difference"
        )
    student, teacher = ((logits.float() / temperature).log_softmax(-1) for logits in (found, expected))
    return temperature**2 * kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


def check_losses(losses: Any) -> None:
    """Raise SlimLSTMError unless a loss function returned a tensor that training can use."""
    if not isinstance(losses, Tensor):
        raise SlimLSTMError(f"loss returned {type(losses).__name__}; it has to return a tensor: losses, or their mean")
    if not losses.requires_grad:
        raise SlimLSTMError(
            "the loss does not depend on any parameter that is trained, or was computed without gradients; compute it from "
            "the model's outputs, without detach() or no_grad()"
        )
