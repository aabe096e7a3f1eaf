"""The biattentive classification network of McCann et al. (2017, arXiv 1708.00107), as Peters et al. (2018) used it.

The published network attends from each of two texts to the other. As there, a single text is used as both, so both
directions are equal and are computed once. The maxout layers have no batch norm: batches of sentences of similar length
have statistics of their own, and the network learns worse with it than without.

Dimensions: B texts, T tokens, H hidden size of one direction, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from paper.elmo import ELMo
from paper.parts import Dense, Embedder, Encoder, Text, attention, pooled, present


@dataclass(frozen=True)
class BCNConfig:
    """Sizes and dropout rates of a :class:`BCN`; the defaults are the published ones for SST-5.

    The three maxout layers have 4 H, 2 H and ``num_classes`` units of ``pool_size`` maps each.
    """

    vocab_size: int
    num_classes: int = 5
    embedding_size: int = 300
    hidden_size: int = 300
    pool_size: int = 4
    dropout_embedding: float = 0.25
    dropout_encoder: float = 0.25
    dropout_integrator: float = 0.1
    dropout_output: tuple[float, float, float] = (0.2, 0.3, 0.0)


class Maxout(nn.Module):
    """Maximum of ``pool_size`` linear maps of x [B, F] for each output (Goodfellow et al. 2013)."""

    def __init__(self, input_size: int, output_size: int, pool_size: int) -> None:
        super().__init__()
        self.maps = nn.Linear(input_size, output_size * pool_size)
        self.pool_size = pool_size

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).unflatten(1, (-1, self.pool_size)).amax(dim=2)


class BCN(nn.Module):
    """Classifier of texts: encoder, self-attention, integrator, four kinds of pooling.

    ``forward(text)`` takes words [B, T] and characters [B, T, C] and returns logits [B, K].
    """

    def __init__(self, config: BCNConfig, elmo: ELMo | None = None) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embedder = Embedder(config.vocab_size, config.embedding_size, elmo)
        self.feedforward = Dense(self.embedder.output_size, size, config.dropout_embedding, nn.ReLU())
        self.encoder = Encoder(size, size)
        self.integrator = Encoder(6 * size, size)
        self.self_attention = nn.Linear(2 * size, 1)
        sizes = ((8 * size, 4 * size), (4 * size, 2 * size), (2 * size, config.num_classes))
        self.maxouts = nn.ModuleList(Maxout(n, m, config.pool_size) for n, m in sizes)

    def forward(self, text: Text) -> Tensor:
        config, there = self.config, present(text)
        x = dropout(self.feedforward(self.embedder(text)), config.dropout_encoder, self.training)
        x = self.encoder(x, there)
        context = attention(x @ x.mT, there[:, None, :]) @ x
        x = self.integrator(torch.cat([x, x - context, x * context], dim=2), there)
        x = dropout(x, config.dropout_integrator, self.training)
        weights = attention(self.self_attention(x).squeeze(2), there)
        x = torch.cat([*pooled(x, there), (weights[..., None] * x).sum(dim=1)], dim=1)
        for maxout, rate in zip(self.maxouts, config.dropout_output, strict=True):
            x = dropout(maxout(x), rate, self.training)
        return x
