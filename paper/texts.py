"""Texts that language models are trained and measured on: a corpus, or a folder of files."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from slimlstm.demo.corpora import CORPORA, read_text, read_words, words_of

EVALUATION_STREAMS = 10
"""Parts of a text that are read side by side when its perplexity is measured."""


def add_text_options(parser: argparse.ArgumentParser, *, files: str = "train.txt, valid.txt and test.txt") -> None:
    """Add the options ``--corpus`` and ``--text``, of which one has to be given.

    Args:
        parser: gets the options.
        files: of the folder ``--text``, for the help.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_text_options(parser)
        >>> parser.parse_args(["--corpus", "ptb"])
        Namespace(corpus='ptb', text=None)
    """
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", choices=CORPORA)
    source.add_argument("--text", type=Path, help=f"folder with {files}, instead of a corpus")


def text_of(arguments: argparse.Namespace, split: str) -> str:
    """Return a split of the corpus or folder that the options of :func:`add_text_options` name."""
    if arguments.corpus:
        return read_text(arguments.corpus, split)
    return (arguments.text / f"{split}.txt").read_text(encoding="utf-8")


def words_in(arguments: argparse.Namespace, split: str) -> list[str]:
    """Return the words of a split, with ``<eos>`` at each line end; those of a corpus have the published number."""
    return read_words(arguments.corpus, split) if arguments.corpus else words_of(text_of(arguments, split))


def side_by_side(tokens: Tensor, streams: int) -> Tensor:
    """Cut token ids [N] into consecutive parts, one a column: [N / streams, streams]; the rest is dropped.

    Examples:
        >>> import torch
        >>> side_by_side(torch.arange(7), 3)
        tensor([[0, 2, 4],
                [1, 3, 5]])
    """
    length = len(tokens) // streams
    return tokens[: length * streams].view(streams, length).t().contiguous()
