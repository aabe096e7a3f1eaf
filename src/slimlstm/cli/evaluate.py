"""``slimlstm eval``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimlstm.cli.models import Model, language_model
from slimlstm.cli.options import Json
from slimlstm.cli.output import show
from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.progress import shown

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor


_INSTEAD = "For a model of yours, load it in Python with slimlstm.load, and measure it as you measure the dense one"


def command(
    model: Model,
    text: Annotated[str, typer.Option(help="'held-out', 'ptb', 'wikitext-2' or a text file.")] = "held-out",
    split: Annotated[
        str | None, typer.Option(help="With ptb and wikitext-2: train, valid or test.", show_default="test")
    ] = None,
    vocab: Annotated[
        Path | None,
        typer.Option(help="A vocabulary, one word per line, or a SentencePiece .model; by default the model's own."),
    ] = None,
    streams: Annotated[int, typer.Option(help="Cut the text into this many parts, read side by side.")] = 10,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of an AWD-LSTM language model.

    The model may be dense or compressed.
    """
    from slimlstm.demo.corpora import CORPORA
    from slimlstm.evaluate import perplexity
    from slimlstm.module_source import module_size
    from slimlstm.modules.hosts import find_hosts

    if split is not None and text not in CORPORA:
        raise SlimLSTMError(f"--split chooses a part of {' or '.join(CORPORA)}; --text {text} is read whole")
    split = split or "test"
    network = language_model(model, _INSTEAD)
    vocabulary = _vocabulary(model, vocab)
    tokens, words = _tokens_and_words(text, split, vocabulary)
    _check_vocabulary(vocabulary, network.config.vocab_size)
    if len(tokens) and int(tokens.max()) >= network.config.vocab_size:
        raise SlimLSTMError(
            f"the text has ids up to {int(tokens.max())}, the model has {network.config.vocab_size} words; check --vocab"
        )
    with shown("reading") as progress:
        found = perplexity(network, tokens, streams=streams, progress=lambda fraction: progress(text, fraction))
    result = {
        "model": model,
        "text": text,
        "split": split if text in CORPORA else None,
        "perplexity": found.perplexity,
        "predictions": found.predictions,
        "perplexity_per_word": math.exp(min(found.loss * len(tokens) / max(words, 1), 700.0)),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "bytes": module_size([network], find_hosts(network))[1],
    }
    show(result, as_json, _table(result))


def _table(result: dict[str, Any]) -> Table:
    from slimlstm.tables import new_table

    table = new_table(["", ""])
    table.show_header = False
    for key, value in result.items():
        if value is not None:
            number = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            table.add_row(key.replace("_", " "), number)
    return table


def _vocabulary(model: str, vocab: Path | None) -> Path:
    from slimlstm.demo import model as embedded

    if vocab is not None:
        return vocab
    beside = Path(model) / "vocab.txt"
    return beside if beside.is_file() else embedded.TOKENIZER


def _check_vocabulary(vocab: Path, wanted: int) -> None:
    """Refuse a vocabulary of another size than the model's: its ids would mean other words."""
    from slimlstm.demo import corpora
    from slimlstm.demo import model as embedded

    if vocab == embedded.TOKENIZER:
        size, name = embedded.embedded_model().config.vocab_size, "of the embedded model"
    elif vocab.suffix == ".model":
        return  # Ids beyond the model's are found later.
    else:
        size, name = len(corpora.Vocabulary.read(vocab).words), str(vocab)
    if size != wanted:
        raise SlimLSTMError(
            f"the vocabulary {name} has {size:,} entries, the model {wanted:,}; give the model's own by --vocab"
        )


def _tokens_and_words(text: str, split: str, vocab: Path) -> tuple[Tensor, int]:
    """Return the ids of a text, int64 [N], and its number of words, line ends counted."""
    from slimlstm.demo import corpora
    from slimlstm.demo import model as embedded

    if text == "held-out":
        content = embedded.held_out_text()
        if vocab == embedded.TOKENIZER:
            return embedded.held_out_tokens(), len(corpora.words_of(content))
    elif text in corpora.CORPORA:
        content = corpora.read_text(text, split)
    else:
        content = _content(text, corpora.CORPORA)
    words = corpora.words_of(content)
    if vocab.suffix == ".model":
        return embedded.encode(content, vocab), len(words)
    return corpora.Vocabulary.read(vocab).encode(words), len(words)


def _content(text: str, known: Any) -> str:
    if not Path(text).is_file():
        raise SlimLSTMError(f"{text!r} is neither 'held-out', {', '.join(map(repr, known))}, nor a file")
    try:
        return Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SlimLSTMError(f"{text} is not UTF-8 text ({reason_of(error)}); convert it first") from error
