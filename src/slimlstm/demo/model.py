"""The language model that ships in the package: an AWD-LSTM over byte-pair pieces of WikiText-2, and text it never saw.

``recipes/demo_model.py`` trains it; ``embedded/training.json`` says how, ``embedded/README.md`` where the text comes from.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from slimlstm.demo.awd_lstm import AWDLSTM, load_awd_lstm
from slimlstm.errors import SlimLSTMError

FOLDER = Path(__file__).parent / "embedded"
TOKENIZER = FOLDER / "tokenizer.model"


def embedded_model() -> AWDLSTM:
    """The trained model, in float32 and evaluation mode."""
    return load_awd_lstm(FOLDER)


def held_out_text() -> str:
    """The beginning of WikiText-2's test split (CC BY-SA), one paragraph a line."""
    return (FOLDER / "held_out.txt").read_text(encoding="utf-8")


def held_out_tokens() -> Tensor:
    """The ids of :func:`held_out_text`'s pieces, int64 [N]."""
    return load_file(FOLDER / "held_out.safetensors")["tokens"].to(torch.int64)


def encode(text: str, tokenizer: str | Path = TOKENIZER) -> Tensor:
    """The ids int64 [N] of a text's byte-pair pieces, with ``<eos>`` for each line end.

    Raises:
        SlimLSTMError: ``sentencepiece`` is not installed.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise SlimLSTMError("reading a text of your own takes sentencepiece: pip install 'slimlstm[data]'") from error
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    except (OSError, RuntimeError) as error:
        raise SlimLSTMError(f"the tokenizer {tokenizer} cannot be read: {error}") from error
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    return torch.tensor([token for pieces in processor.encode(lines) for token in (*pieces, processor.eos_id())])
