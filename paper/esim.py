"""ESIM, the enhanced sequential inference model (Chen et al. 2017, arXiv 1609.06038).

Dimensions: B pairs, T tokens of a premise, S of a hypothesis, H hidden size of one direction, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paper.elmo import ELMo
from paper.parts import Dense, Embedder, Encoder, Text, attention, pooled, present


@dataclass(frozen=True)
class ESIMConfig:
    """Sizes and dropout rate of an :class:`ESIM`; the defaults are the published ones for SNLI."""

    vocab_size: int
    num_classes: int = 3
    embedding_size: int = 300
    hidden_size: int = 300
    dropout: float = 0.5


class ESIM(nn.Module):
    """Classifier of pairs of texts: encoder, alignment, composition, pooling by mean and maximum.

    ``forward(premise, hypothesis)`` takes words and characters of both, [B, T] and [B, T, C], [B, S] and [B, S, C], and
    returns logits [B, K].
    """

    def __init__(self, config: ESIMConfig, elmo: ELMo | None = None) -> None:
        super().__init__()
        self.config = config
        size, rate = config.hidden_size, config.dropout
        self.embedder = Embedder(config.vocab_size, config.embedding_size, elmo)
        self.dropout = nn.Dropout(rate)
        self.encoder = Encoder(self.embedder.output_size, size)
        self.projection = Dense(8 * size, size, 0.0, nn.ReLU())
        self.composition = Encoder(size, size)
        self.hidden = Dense(8 * size, size, rate, nn.Tanh())
        self.output = Dense(size, config.num_classes, rate, nn.Identity())

    def forward(self, premise: Text, hypothesis: Text) -> Tensor:
        here, there = present(premise), present(hypothesis)
        a, b = (
            self.encoder(self.dropout(self.embedder(text)), mask) for text, mask in ((premise, here), (hypothesis, there))
        )
        scores = a @ b.mT
        aligned_a = attention(scores, there[:, None, :]) @ b
        aligned_b = attention(scores.mT, here[:, None, :]) @ a
        return self.output(
            self.hidden(torch.cat([self._compose(a, aligned_a, here), self._compose(b, aligned_b, there)], 1))
        )

    def _compose(self, x: Tensor, aligned: Tensor, there: Tensor) -> Tensor:
        """Pool [B, 4 H] a text x [B, T, 2 H] composed with the parts of the other text that are aligned with it."""
        x = self.projection(torch.cat([x, aligned, x - aligned, x * aligned], dim=2))
        mean, most, _ = pooled(self.composition(self.dropout(x), there), there)
        return torch.cat([mean, most], dim=1)
