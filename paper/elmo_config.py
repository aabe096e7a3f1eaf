"""Sizes of ELMo (Peters et al. 2018, arXiv 1802.05365), as its official options name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from slimlstm.errors import SlimLSTMError, reason_of

CHARACTERS = 261
"""Values of a character: 256 bytes, and five marks. In tensors every id is one higher, and zero is padding."""
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


@dataclass(frozen=True)
class ELMoConfig:
    """Sizes of a :class:`paper.elmo.BiLM`; the defaults give the original released model.

    ``filters`` are (width, number) pairs of the character CNN. A clip of None leaves values unbounded.
    """

    hidden_size: int = 4096
    proj_size: int = 512
    num_layers: int = 2
    cell_clip: float | None = 3.0
    proj_clip: float | None = 3.0
    use_skip_connections: bool = True
    character_size: int = 16
    filters: tuple[tuple[int, int], ...] = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    num_highways: int = 2
    max_characters: int = 50
    activation: str = "relu"
    dropout: float = 0.0

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ELMoConfig:
        """Read the content of an official ``options.json``.

        Raises:
            SlimLSTMError: an entry is missing or cannot be used.
        """
        try:
            lstm, cnn = options["lstm"], options["char_cnn"]
            config = cls(
                hidden_size=lstm["dim"],
                proj_size=lstm["projection_dim"],
                num_layers=lstm["n_layers"],
                cell_clip=lstm.get("cell_clip"),
                proj_clip=lstm.get("proj_clip"),
                use_skip_connections=lstm.get("use_skip_connections", False),
                character_size=cnn["embedding"]["dim"],
                filters=tuple((width, number) for width, number in cnn["filters"]),
                num_highways=cnn["n_highway"],
                max_characters=cnn["max_characters_per_token"],
                activation=cnn.get("activation", "relu"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SlimLSTMError(
                f"these are not the options of an ELMo: {type(error).__name__} {reason_of(error)}"
            ) from error
        if config.activation not in ACTIVATIONS:
            raise SlimLSTMError(f"no activation {config.activation!r} is known; use one of {', '.join(ACTIVATIONS)}")
        return config

    def to_options(self) -> dict[str, Any]:
        """Return the content of an official ``options.json``."""
        return {
            "lstm": {
                "dim": self.hidden_size,
                "projection_dim": self.proj_size,
                "n_layers": self.num_layers,
                "cell_clip": self.cell_clip,
                "proj_clip": self.proj_clip,
                "use_skip_connections": self.use_skip_connections,
            },
            "char_cnn": {
                "embedding": {"dim": self.character_size},
                "filters": [list(pair) for pair in self.filters],
                "n_highway": self.num_highways,
                # As in the released files: one more than the rows of the table, for padding.
                "n_characters": CHARACTERS + 1,
                "max_characters_per_token": self.max_characters,
                "activation": self.activation,
            },
        }
