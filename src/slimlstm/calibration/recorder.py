"""Record the inputs of recurrent matrices, and the gradients at their gates, while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError

Keys = tuple[str, ...]
"""The keys of matrices whose products are added into the same gates: ih and hh of one direction."""

_NO_GRADIENT = (
    "the loss does not depend on the model's LSTMs in a way that gradients can follow; compute it without detach() and "
    "no_grad(), and give torch.utils.checkpoint use_reentrant=False"
)


@dataclass(frozen=True)
class Rows:
    """Inputs of one group of matrices, one row for every time step and sequence.

    Attributes:
        inputs: the inputs of every matrix in the group; for an LSTM, of ih [N, I] and of hh [N, P].
        gradients: the gradients of the loss at the gates' pre-activations [N, 4H], or None.
    """

    inputs: tuple[Tensor, ...]
    gradients: Tensor | None

    @property
    def reached(self) -> Tensor | None:
        """Boolean [N]: the rows that receive a gradient; padding receives none. None without gradients."""
        return None if self.gradients is None else self.gradients.any(dim=1)


class Recorder:
    """Collects the rows of observed LSTMs until they are taken.

    Args:
        with_gradients: whether the gradients at the gates are needed too.
    """

    def __init__(self, with_gradients: bool) -> None:
        self._with_gradients = with_gradients
        self._seen: list[tuple[Keys, tuple[Tensor, ...], Tensor]] = []

    def add(self, keys: Keys, inputs: tuple[Tensor, ...], probe: Tensor) -> None:
        """Record one call: the inputs of every matrix of a group, and the probe that was added to its gates."""
        self._seen.append((keys, inputs, probe))

    def probe(self, rows: Tensor, width: int) -> Tensor:
        """Return zeros [N, width] to add to the gates of N rows; they receive the gates' gradients."""
        return rows.new_zeros(len(rows), width, requires_grad=self._with_gradients)

    def take(self, total: Tensor | None) -> dict[Keys, Rows]:
        """Return the rows recorded since the last call, by group, and forget them.

        Args:
            total: the loss, a scalar, whose gradients at the gates are needed; or None.

        Raises:
            SlimLSTMError: ``total`` does not depend on the recorded calls.
        """
        seen, self._seen = self._seen, []
        gradients = [None] * len(seen) if total is None else _gradients(total, [probe for _, _, probe in seen])
        self._seen = []  # activation checkpointing ran the LSTMs again
        # Cells are called step by step: one product for all rows costs a fraction of a product for each call.
        grouped: dict[Keys, list[tuple[tuple[Tensor, ...], Tensor]]] = {}
        for (keys, inputs, probe), gradient in zip(seen, gradients, strict=True):
            grouped.setdefault(keys, []).append((inputs, torch.zeros_like(probe) if gradient is None else gradient))
        return {
            keys: Rows(
                tuple(_joined(parts) for parts in zip(*(inputs for inputs, _ in calls), strict=True)),
                None if total is None else _joined([gradient for _, gradient in calls]),
            )
            for keys, calls in grouped.items()
        }


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _gradients(total: Tensor, probes: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not probes:
        raise SlimLSTMError("the loss ran none of the model's LSTMs; check that it calls this model and not a copy")
    if not total.requires_grad:
        raise SlimLSTMError(_NO_GRADIENT)
    found = cast(Sequence[Tensor | None], torch.autograd.grad(total, list(probes), allow_unused=True))
    if all(gradient is None for gradient in found):
        raise SlimLSTMError(_NO_GRADIENT)
    return found


def states_before(outputs: Tensor, first: Tensor, lengths: Tensor, reverse: bool) -> Tensor:
    """Return the hidden state that every step of padded sequences starts from.

    Args:
        outputs: the hidden states after every step [T, B, P].
        first: the initial states [B, P].
        lengths: the number of steps of every sequence, int64 [B].
        reverse: whether the steps are computed from the last to the first.

    Returns:
        [T, B, P]; entries beyond a sequence's length have no meaning.

    Examples:
        >>> outputs, first = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), torch.tensor([[9.0]])
        >>> states_before(outputs, first, torch.tensor([3]), reverse=False).flatten()
        tensor([9., 1., 2.])
        >>> states_before(outputs, first, torch.tensor([2]), reverse=True)[:2].flatten()
        tensor([2., 9.])
    """
    first = first.to(outputs.dtype)
    if not reverse:
        return torch.cat([first[None], outputs[:-1]])
    before = torch.cat([outputs[1:], first[None]])
    last = (lengths.long() - 1).clamp_min(0)
    before[last, torch.arange(len(first), device=first.device)] = first
    return before
