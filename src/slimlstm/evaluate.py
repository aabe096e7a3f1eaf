"""Measure the perplexity of language models, and their loss on successive batches of a text; for any ``nn.Module``."""

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
from slimlstm.modules.arguments import check_model
from slimlstm.modules.modes import evaluation_mode


@dataclass(frozen=True)
class Perplexity:
    """The result of :func:`perplexity`.

    Attributes:
        loss: mean negative log-likelihood, in nats per token.
        predictions: the number of predicted tokens.

    Examples:
        >>> round(Perplexity(loss=math.log(50.0), predictions=100).perplexity, 6)
        50.0
    """

    loss: float
    predictions: int

    @property
    def perplexity(self) -> float:
        """The perplexity exp(loss), cut at e^700."""
        return math.exp(min(self.loss, 700.0))


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    streams: int = 10,
    steps: int = 70,
    progress: Callable[[float], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a language model on a text, with the state carried from call to call.

    The text is cut into ``streams`` equal parts, which are read side by side from an empty state; the rest is dropped. The
    cuts change the result a little, ``steps`` does not. The model runs in evaluation mode, and its modes are restored.

    Args:
        model: called as ``model(tokens, state)`` with ids [T, B] and, at first, the state None; returns logits [T, B, V]
            and the next state.
        tokens: the ids of the text, int64 [N].
        streams: B, the number of parts.
        steps: T, the tokens per call and stream.
        progress: called after each call with the fraction done.

    Raises:
        SlimLSTMError: fewer than two tokens per stream, or ``streams`` or ``steps`` below 1.

    Examples:
        >>> def uniform(tokens, state):
        ...     return torch.zeros(*tokens.shape, 7), state
        >>> model = nn.Module()
        >>> model.forward = uniform
        >>> round(perplexity(model, torch.arange(50) % 7).perplexity, 3)
        7.0
    """
    check_model(model)
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
    """Cut a text into batches for :class:`NextTokens`.

    Args:
        tokens: the ids of the text, int64 [N].
        streams: B, the number of parts that are read side by side; tokens that do not fill all parts are dropped.
        steps: T, the predictions per batch and stream.

    Returns:
        Pairs (start, ids [T + 1, B]), where start counts tokens from the beginning of the parts. Successive batches share
        one row, which the first of them predicts and the second reads; the last batch may be shorter.

    Raises:
        SlimLSTMError: fewer than two tokens per stream, or ``streams`` or ``steps`` below 1.

    Examples:
        >>> [(start, ids.flatten().tolist()) for start, ids in pieces(torch.arange(6), streams=1, steps=3)]
        [(0, [0, 1, 2, 3]), (3, [3, 4, 5])]
    """
    text = _side_by_side(tokens, streams, steps)
    return [(start, text[start : start + steps + 1]) for start in range(0, len(text) - 1, steps)]


class NextTokens:
    """A loss function ``loss(model, piece)`` for the batches of a text, which have to come in their order.

    The model's state passes from batch to batch, detached; the batch that starts at 0 begins without a state.
    ``state_dict`` returns the state, so that several models can take turns, each with its own state.

    Examples:
        >>> from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig
        >>> model, loss = AWDLSTM(AWDLSTMConfig(vocab_size=11, embedding_size=4, hidden_size=6, num_layers=1)), NextTokens()
        >>> [list(loss(model, piece).shape) for piece in pieces(torch.arange(11), streams=2, steps=3)]
        [[6], [2]]
    """

    def __init__(self) -> None:
        self._state: list[tuple[Tensor, Tensor]] | None = None

    def __call__(self, model: nn.Module, piece: tuple[int, Tensor]) -> Tensor:
        """Return the losses [T · B] of a batch (start, ids [T + 1, B]).

        The model is called as in :func:`perplexity`; its state is a sequence of pairs (h, c).
        """
        start, tokens = piece
        logits, state = model(tokens[:-1], self._state if start else None)
        self._state = [(h.detach(), c.detach()) for h, c in state]
        return cross_entropy(logits.flatten(0, 1).float(), tokens[1:].flatten(), reduction="none")

    def state_dict(self) -> dict[str, Any]:
        """Return the state before the next batch."""
        return {"state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` returned."""
        self._state = state["state"]


def _side_by_side(tokens: Tensor, streams: int, steps: int) -> Tensor:
    """Return the text as [N / streams, streams]."""
    if streams < 1 or steps < 1 or len(tokens) // max(streams, 1) < 2:
        raise SlimLSTMError(
            f"{len(tokens)} tokens cannot be read as {streams} streams of {steps} tokens a call; each stream needs two"
        )
    length = len(tokens) // streams
    return tokens[: length * streams].view(streams, length).t().contiguous()
