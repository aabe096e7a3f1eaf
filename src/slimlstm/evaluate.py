"""What a model is worth and what it weighs; takes any ``nn.Module``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from slimlstm.errors import SlimLSTMError
from slimlstm.modules.modes import evaluation_mode


@dataclass(frozen=True)
class Perplexity:
    """``loss`` is the mean negative log-likelihood in nats over ``predictions`` tokens."""

    loss: float
    predictions: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    streams: int = 10,
    steps: int = 70,
    progress: Callable[[float], None] | None = None,
) -> Perplexity:
    """The perplexity of a language model over a text, its state carried from the first token to the last.

    The text is cut into ``streams`` equal pieces that are read side by side, each from a zero state; the tail is dropped.
    So the result depends on ``streams`` only at the cuts, and on ``steps``, which is how many tokens a call takes, not
    at all. The model runs in evaluation mode, which is restored.

    Args:
        model: called as ``model(tokens [T, B], state)``, first with the state ``None``; returns logits [T, B, V] and the
            next state.
        tokens: the text's ids, int64 [N].
        progress: called with the fraction done, now and then.

    Raises:
        SlimLSTMError: fewer than two tokens a stream, or a ``streams`` or ``steps`` below 1.
    """
    text = _side_by_side(tokens, streams, steps)
    length = len(text)
    total, state = 0.0, None
    # No weight changes meanwhile, so that masks and other parametrizations need to be applied only once.
    with evaluation_mode(model), torch.no_grad(), parametrize.cached():
        for start in range(0, length - 1, steps):
            targets = text[start + 1 : start + 1 + steps]
            logits, state = model(text[start : start + len(targets)], state)
            total += float(cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
            if progress is not None:
                progress(min(start + steps, length - 1) / (length - 1))
    predictions = (length - 1) * streams
    return Perplexity(total / predictions, predictions)


def pieces(tokens: Tensor, *, streams: int, steps: int) -> list[tuple[int, Tensor]]:
    """A text as batches for :class:`NextTokens`: (where the piece starts, ids [steps + 1, streams]), the last one shorter.

    Pieces overlap by the token that is only predicted; the tail that does not fill all streams is dropped.

    Args:
        tokens: the text's ids, int64 [N].

    Raises:
        SlimLSTMError: fewer than two tokens a stream, or a ``streams`` or ``steps`` below 1.
    """
    text = _side_by_side(tokens, streams, steps)
    return [(start, text[start : start + steps + 1]) for start in range(0, len(text) - 1, steps)]


class NextTokens:
    """The loss of a language model on pieces of a text, token by token: ``loss(model, piece)``, pieces in order.

    The state is carried from piece to piece, without its gradients; the piece that starts at 0 starts from None. It is in
    ``state_dict``, so that two models that take turns keep their own.
    """

    def __init__(self) -> None:
        self._state: list[tuple[Tensor, Tensor]] | None = None

    def __call__(self, model: nn.Module, piece: tuple[int, Tensor]) -> Tensor:
        """Losses [T B] of (start, ids [T + 1, B]) for a model such as :func:`perplexity` takes, its state pairs (h, c)."""
        start, tokens = piece
        logits, state = model(tokens[:-1], self._state if start else None)
        self._state = [(h.detach(), c.detach()) for h, c in state]
        return cross_entropy(logits.flatten(0, 1).float(), tokens[1:].flatten(), reduction="none")

    def state_dict(self) -> dict[str, Any]:
        """The state that the next piece starts from."""
        return {"state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self._state = state["state"]


def _side_by_side(tokens: Tensor, streams: int, steps: int) -> Tensor:
    """The text as [N / streams, streams]."""
    if streams < 1 or steps < 1 or len(tokens) // max(streams, 1) < 2:
        raise SlimLSTMError(f"{len(tokens)} tokens cannot be read as {streams} streams of {steps} tokens a call")
    length = len(tokens) // streams
    return tokens[: length * streams].view(streams, length).t().contiguous()
