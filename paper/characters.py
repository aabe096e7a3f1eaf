"""Tokens as characters: the official scheme of ids, and the network that turns them into vectors.

Dimensions: B sentences, T tokens, C characters a token, N tokens, E features, P projection size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from paper.elmo_config import ACTIVATIONS, CHARACTERS, ELMoConfig

_SENTENCE_BEGIN, _SENTENCE_END, _WORD_BEGIN, _WORD_END, _NO_CHARACTER = range(256, CHARACTERS)


def characters_of(sentences: Sequence[Sequence[str]], max_characters: int = 50) -> Tensor:
    """Return the bytes of tokens in the official scheme, int64 [B, T, C]; padding is zero.

    A token longer than C - 2 bytes is cut.

    Examples:
        >>> characters_of([["No"]], max_characters=5).tolist()
        [[[259, 79, 112, 260, 261]]]
    """
    steps = max((len(sentence) for sentence in sentences), default=0)
    found = torch.zeros(len(sentences), steps, max_characters, dtype=torch.int64)
    for row, sentence in enumerate(sentences):
        for column, token in enumerate(sentence):
            found[row, column] = _token(token.encode(), max_characters)
    return found


def sentence_marks(max_characters: int) -> Tensor:
    """Return the tokens that begin and end a sentence, int64 [2, C]."""
    return torch.stack([_token([mark], max_characters) for mark in (_SENTENCE_BEGIN, _SENTENCE_END)])


class Highway(nn.Module):
    """Highway layers (Srivastava et al. 2015): x [..., E] becomes g ⊙ relu(W x + b) + (1 - g) ⊙ x with g = σ(V x + c)."""

    def __init__(self, size: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            new, gate = layer(x).chunk(2, dim=-1)
            x = torch.lerp(x, new.relu(), gate.sigmoid())
        return x


class CharacterEncoder(nn.Module):
    """Map characters [N, C] of tokens, without padding, to vectors [N, P]: a CNN, its maxima over the token, highways.

    A token that occurs more than once is computed once.
    """

    def __init__(self, config: ELMoConfig) -> None:
        super().__init__()
        size = sum(number for _, number in config.filters)
        self.activation = config.activation
        self.embedding = nn.Embedding(CHARACTERS + 1, config.character_size, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(config.character_size, n, width) for width, n in config.filters)
        self.highway = Highway(size, config.num_highways)
        self.projection = nn.Linear(size, config.proj_size)
        for layer in self.highway.layers:
            # At first inputs pass almost unchanged (Srivastava et al. 2015).
            nn.init.constant_(cast(nn.Linear, layer).bias[size:], -2.0)

    def forward(self, characters: Tensor) -> Tensor:
        distinct, places = characters.unique(dim=0, return_inverse=True)
        x, activation = self.embedding(distinct).transpose(1, 2), ACTIVATIONS[self.activation]
        x = torch.cat([activation(convolution(x).amax(dim=2)) for convolution in self.convolutions], dim=1)
        return self.projection(self.highway(x))[places]


def _token(content: Sequence[int], max_characters: int) -> Tensor:
    """Return a token's ids, one higher than its characters."""
    ids = [_WORD_BEGIN, *content[: max_characters - 2], _WORD_END]
    return torch.tensor([*ids, *[_NO_CHARACTER] * (max_characters - len(ids))]) + 1
