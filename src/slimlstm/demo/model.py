"""The embedded language model: an AWD-LSTM of byte-pair pieces of WikiText-2, with held-out text.

``recipes/demo_model.py`` trains it. ``embedded/training.json`` records how; ``embedded/README.md`` names the text's source.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from slimlstm.demo.awd_lstm import AWDLSTM, load_awd_lstm
from slimlstm.errors import SlimLSTMError, reason_of

FOLDER = Path(__file__).parent / "embedded"
TOKENIZER = FOLDER / "tokenizer.model"


def embedded_model() -> AWDLSTM:
    """Return the trained model, in float32 and evaluation mode.

    Examples:
        >>> embedded_model().config.hidden_size
        448
    """
    return load_awd_lstm(FOLDER)


def held_out_text() -> str:
    """Return the beginning of WikiText-2's test split (CC BY-SA), one paragraph per line.

    Examples:
        >>> held_out_text().count("\\n") > 10
        True
    """
    return (FOLDER / "held_out.txt").read_text(encoding="utf-8")


def held_out_tokens() -> Tensor:
    """Return the ids of the byte-pair pieces of :func:`held_out_text`, int64 [N].

    Examples:
        >>> held_out_tokens().dtype
        torch.int64
    """
    return load_file(FOLDER / "held_out.safetensors")["tokens"].to(torch.int64)


def encode(text: str, tokenizer: str | Path = TOKENIZER) -> Tensor:
    """Return the ids of a text's byte-pair pieces, int64 [N], with ``<eos>`` at each line end.

    Raises:
        SlimLSTMError: ``sentencepiece`` is not installed, or the tokenizer cannot be read.

    Examples:
        >>> text = held_out_text()[:held_out_text().index("\\n")]
        >>> ids = encode(text)
        >>> torch.equal(ids, held_out_tokens()[:len(ids)])
        True
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise SlimLSTMError(
            "sentencepiece, which reads your own text, is not installed: pip install 'slimlstm[data]'"
        ) from error
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    except (OSError, RuntimeError) as error:
        raise SlimLSTMError(
            f"the tokenizer {tokenizer} cannot be read ({reason_of(error)}); give a SentencePiece model"
        ) from error
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    return torch.tensor([token for pieces in processor.encode(lines) for token in (*pieces, processor.eos_id())])
