"""Parts that the task models share: embedded tokens, encoders of padded sequences, masked attention.

Dimensions: B sequences, T tokens, C characters a token, E size of a token's vector, H hidden size of one direction.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from paper.elmo import ELMo

Text = tuple[Tensor, Tensor | None]
"""Word ids [B, T], where 0 is padding; and characters [B, T, C] from ``paper.characters.characters_of``, or None."""


class Embedder(nn.Module):
    """Map tokens to vectors [B, T, E]: a trained table of word vectors and, with an ELMo, its vectors beside them.

    Word 0 is padding. Vectors at padding are zero. ``output_size`` is E.
    """

    def __init__(self, vocab_size: int, embedding_size: int, elmo: ELMo | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.elmo = elmo
        self.output_size = embedding_size + (elmo.output_size if elmo is not None else 0)
        nn.init.normal_(self.words.weight[1:], std=0.1)

    def forward(self, text: Text) -> Tensor:
        words, characters = text
        found = self.words(words)
        if self.elmo is None:
            return found
        return torch.cat([found, self.elmo(cast(Tensor, characters))], dim=2)


class Encoder(nn.Module):
    """Bidirectional LSTM over the ``present`` steps of padded sequences x [B, T, I]; [B, T, 2 H], zero at padding."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            input_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=True,
        )

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        lengths = present.sum(dim=1).cpu()
        packed, _ = self.lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]


class Dense(nn.Sequential):
    """Dropout, a linear map and an activation."""

    def __init__(self, input_size: int, output_size: int, dropout: float, activation: nn.Module) -> None:
        super().__init__(nn.Dropout(dropout), nn.Linear(input_size, output_size), activation)


def present(text: Text) -> Tensor:
    """Return a mask of tokens, bool [B, T]; padding follows them."""
    return text[0] != 0


def attention(scores: Tensor, keys: Tensor) -> Tensor:
    """Return the softmax of ``scores`` [..., K] over the places where ``keys`` (bool, broadcast) is true."""
    return scores.masked_fill(~keys, -torch.inf).softmax(dim=-1)


def pooled(x: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, maximum and minimum [B, F] over the present steps of x [B, T, F]."""
    there = present[..., None]
    mean = (x * there).sum(dim=1) / there.sum(dim=1)
    return mean, x.masked_fill(~there, -torch.inf).amax(dim=1), x.masked_fill(~there, torch.inf).amin(dim=1)
