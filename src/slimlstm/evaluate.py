"""What a model is worth and what it weighs; takes any ``nn.Module``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from slimlstm.errors import SlimLSTMError


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
    if streams < 1 or steps < 1 or len(tokens) // max(streams, 1) < 2:
        raise SlimLSTMError(f"{len(tokens)} tokens cannot be read as {streams} streams of {steps} tokens a call")
    length = len(tokens) // streams
    text = tokens[: length * streams].view(streams, length).t().contiguous()
    total, state = 0.0, None
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # No weight changes meanwhile, so that masks and other parametrizations need to be applied only once.
        with torch.no_grad(), parametrize.cached():
            for start in range(0, length - 1, steps):
                targets = text[start + 1 : start + 1 + steps]
                logits, state = model(text[start : start + len(targets)], state)
                total += float(cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
                if progress is not None:
                    progress(min(start + steps, length - 1) / (length - 1))
    finally:
        for module in training:
            module.training = True
    predictions = (length - 1) * streams
    return Perplexity(total / predictions, predictions)
