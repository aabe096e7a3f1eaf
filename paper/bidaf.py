"""BiDAF, bidirectional attention flow for reading a paragraph (Seo et al. 2017, arXiv 1611.01603).

Dimensions: B questions, P paragraphs, T tokens of a paragraph, S of a question, C characters a token, H hidden size of one
direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from paper.characters import Highway
from paper.elmo import ELMo
from paper.elmo_config import CHARACTERS
from paper.parts import Embedder, Encoder, Text, attention, present


@dataclass(frozen=True)
class BiDAFConfig:
    """Sizes and dropout rate of a :class:`BiDAF`; the defaults are the published ones.

    Characters become vectors of ``character_size``; tokens become maxima of ``num_filters`` filters of ``filter_width``.
    """

    vocab_size: int
    embedding_size: int = 100
    character_size: int = 16
    num_filters: int = 100
    filter_width: int = 5
    hidden_size: int = 100
    num_highways: int = 2
    dropout: float = 0.2


class BiDAF(nn.Module):
    """Finds where in a paragraph the answer to a question begins and ends.

    ``forward(paragraph, question, places)`` takes words [P, T] and characters [P, T, C] of paragraphs, words [B, S] and
    characters [B, S, C] of questions, and the index of each question's paragraph, int64 [B]; by default its own (P = B).
    It returns logits [B, T, 2] of the first and the last token, -inf at padding. A paragraph is encoded once for all its
    questions.
    """

    def __init__(self, config: BiDAFConfig, elmo: ELMo | None = None) -> None:
        super().__init__()
        self.config = config
        size, rate = config.hidden_size, config.dropout
        self.embedder = Embedder(config.vocab_size, config.embedding_size, elmo)
        self.characters = nn.Embedding(CHARACTERS + 1, config.character_size, padding_idx=0)
        self.convolution = nn.Conv1d(config.character_size, config.num_filters, config.filter_width)
        embedded = self.embedder.output_size + config.num_filters
        self.highway = Highway(embedded, config.num_highways)
        self.dropout = nn.Dropout(rate)
        self.encoder = Encoder(embedded, size)
        self.similarity = nn.Linear(6 * size, 1, bias=False)
        self.modeling = Encoder(8 * size, size, num_layers=2, dropout=rate)
        self.end_encoder = Encoder(2 * size, size)
        self.start = nn.Linear(10 * size, 1, bias=False)
        self.end = nn.Linear(10 * size, 1, bias=False)

    def forward(self, paragraph: Text, question: Text, places: Tensor | None = None) -> Tensor:
        h, u = self._encode(paragraph), self._encode(question)
        here, there = present(paragraph), present(question)
        if places is not None:
            h, here = h[places], here[places]
        g = self._attend(h, u, here, there)
        m = self.modeling(self.dropout(g), here)
        after = self.end_encoder(self.dropout(m), here)
        start = self.start(self.dropout(torch.cat([g, m], dim=2)))
        end = self.end(self.dropout(torch.cat([g, after], dim=2)))
        return torch.cat([start, end], dim=2).masked_fill(~here[..., None], -torch.inf)

    def _encode(self, text: Text) -> Tensor:
        """Return contextual vectors [B, T, 2 H] of a text's tokens."""
        x = torch.cat([self._spell(cast(Tensor, text[1])), self.embedder(text)], dim=2)
        return self.encoder(self.dropout(self.highway(x)), present(text))

    def _spell(self, characters: Tensor) -> Tensor:
        """Return the character CNN's features [B, T, F] of tokens [B, T, C]; each distinct token is computed once."""
        distinct, places = characters.flatten(0, 1).unique(dim=0, return_inverse=True)
        x = self.dropout(self.characters(distinct)).transpose(1, 2)
        return self.convolution(x).amax(dim=2).relu()[places].unflatten(0, characters.shape[:2])

    def _attend(self, h: Tensor, u: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """Return G [B, T, 8 H]: paragraphs h [B, T, 2 H] with attention to questions u [B, S, 2 H], and back."""
        of_h, of_u, of_both = self.similarity.weight[0].chunk(3)
        scores = (h @ of_h)[:, :, None] + (u @ of_u)[:, None, :] + (h * of_both) @ u.mT
        to_question = attention(scores, there[:, None, :]) @ u
        strongest = scores.masked_fill(~there[:, None, :], -torch.inf).amax(dim=2)
        to_paragraph = attention(strongest, here)[:, None, :] @ h
        return torch.cat([h, to_question, h * to_question, h * to_paragraph], dim=2)


def best_spans(logits: Tensor, limit: int = 17) -> Tensor:
    """Return the tokens (first, last) [B, 2] with the greatest p(first) p(last), ``first <= last < first + limit``.

    Args:
        logits: of :class:`BiDAF`, [B, T, 2].
        limit: most tokens of an answer.
    """
    starts, ends = logits.log_softmax(dim=1).unbind(dim=2)
    steps = torch.arange(logits.shape[1], device=logits.device)
    lengths = steps[None, :] - steps[:, None]
    scores = (starts[:, :, None] + ends[:, None, :]).masked_fill((lengths < 0) | (lengths >= limit), -torch.inf)
    best = scores.flatten(1).argmax(dim=1)
    return torch.stack([best // len(steps), best % len(steps)], dim=1)
