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
    """How near an answer is to the nearest of its references: ``exact_match`` is 0 or 1, ``f1`` from 0 to 1."""

    exact_match: float
    f1: float


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The fraction of ``predicted`` classes [N] that are those of ``labels`` [N].

    Raises:
        SlimLSTMError: nothing to compare, or two shapes.
    """
    if predicted.shape != labels.shape or not len(labels):
        raise SlimLSTMError(f"predictions {list(predicted.shape)} cannot be compared with labels {list(labels.shape)}")
    return float((predicted == labels).double().mean())


def answer_score(answer: str, references: Sequence[str]) -> AnswerScore:
    """The measures of SQuAD v1.1 (Rajpurkar et al. 2016): case, punctuation, articles and white space do not count.

    ``f1`` is that of the words that answer and reference share, as often as both have them. Of several references each
    measure takes the best.

    Raises:
        SlimLSTMError: no reference.
    """
    if not references:
        raise SlimLSTMError("an answer needs a reference to be compared with")
    words = answer_words(answer)
    expected = [answer_words(reference) for reference in references]
    return AnswerScore(float(words in expected), max(_f1(words, reference) for reference in expected))


def answer_words(text: str) -> list[str]:
    """The words of an answer that count: in lower case, without ASCII punctuation and without a, an and the."""
    kept = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(words: list[str], reference: list[str]) -> float:
    shared = (Counter(words) & Counter(reference)).total()
    # 2 p r / (p + r) with p = shared / words and r = shared / reference words
    return 2.0 * shared / (len(words) + len(reference)) if shared else 0.0
