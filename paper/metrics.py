"""Score classes and answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from slimlstm.errors import SlimLSTMError


@dataclass(frozen=True)
class AnswerScore:
    """Agreement of an answer with its best reference: ``exact_match`` is 0 or 1, ``f1`` from 0 to 1."""

    exact_match: float
    f1: float


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the fraction of ``predicted`` classes [N] that equal their ``labels`` [N].

    Raises:
        SlimLSTMError: the shapes differ, or are empty.

    Examples:
        >>> import torch
        >>> accuracy(torch.tensor([1, 2]), torch.tensor([1, 0]))
        0.5
    """
    if predicted.shape != labels.shape or not len(labels):
        raise SlimLSTMError(f"predictions {list(predicted.shape)} cannot be compared with labels {list(labels.shape)}")
    return float((predicted == labels).double().mean())


def answer_score(answer: str, references: Sequence[str]) -> AnswerScore:
    """Return the measures of SQuAD v1.1 (Rajpurkar et al. 2016); case, punctuation, articles and white space are ignored.

    ``f1`` compares words as multisets. Each measure takes the best of several references.

    Raises:
        SlimLSTMError: no reference is given.

    Examples:
        >>> answer_score("the Broncos!", ["Denver Broncos"]).f1
        0.6666666666666666
    """
    if not references:
        raise SlimLSTMError("an answer needs a reference to be compared with")
    words = answer_words(answer)
    expected = [answer_words(reference) for reference in references]
    return AnswerScore(float(words in expected), max(_f1(words, reference) for reference in expected))


def answer_words(text: str) -> list[str]:
    """Return the words to compare: in lower case, without ASCII punctuation, without a, an and the."""
    letters = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def _f1(words: list[str], reference: list[str]) -> float:
    shared = (Counter(words) & Counter(reference)).total()
    # 2 p r / (p + r) with p = shared / words and r = shared / reference words
    return 2.0 * shared / (len(words) + len(reference)) if shared else 0.0
