"""Batches, losses, predictions and scores, the same for all three tasks.

Examples come from :mod:`paper.task_data`, models are :class:`~paper.bcn.BCN`,
:class:`~paper.esim.ESIM` and :class:`~paper.bidaf.BiDAF`.

Dimensions: B examples (of SQuAD, questions), T tokens, C characters a token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from paper.bidaf import best_spans
from paper.characters import characters_of
from paper.elmo import BiLM
from paper.metrics import accuracy, answer_score
from paper.parts import Text
from paper.task_data import Example, Pair, Paragraph, Question, Sentence
from slimlstm.demo.corpora import UNKNOWN, Vocabulary

PADDING = ""


@dataclass(frozen=True)
class Batch:
    """Arguments of a model, targets of its logits, and the examples in them.

    ``inputs`` are one text, two texts, or paragraphs, questions and the index of each question's paragraph. ``targets`` are
    classes [B], or the first and last token of the answer [B, 2].
    """

    inputs: tuple[Any, ...]
    targets: Tensor
    examples: Sequence[Sentence | Pair | tuple[Paragraph, Question]]


def texts_of(example: Example) -> list[list[str]]:
    """Return all token lists of an example."""
    if isinstance(example, Paragraph):
        return [example.tokens, *(question.tokens for question in example.questions)]
    return [example.tokens] if isinstance(example, Sentence) else [example.premise, example.hypothesis]


def size_of(example: Example) -> int:
    """Return how many predictions an example needs: one for each question of a paragraph, else one."""
    return len(example.questions) if isinstance(example, Paragraph) else 1


def vocabulary_of(examples: Iterable[Example], more: Iterable[str] = ()) -> Vocabulary:
    """Return words in lower case: padding, ``<unk>``, ``more``, and words that occur more than once in the examples."""
    counts = Counter(token.lower() for example in examples for text in texts_of(example) for token in text)
    return Vocabulary([PADDING, UNKNOWN, *more, *(word for word, count in counts.items() if count > 1)])


class Batches:
    """Makes batches of examples whose ``tokens`` are known.

    Args:
        tokens: every token that will occur.
        vocabulary: from :func:`vocabulary_of`.
        with_characters: whether the models read characters, as those with an ELMo and BiDAF do.
        device: of the batches.
    """

    def __init__(
        self,
        tokens: Iterable[str],
        vocabulary: Vocabulary,
        *,
        with_characters: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        distinct = list(dict.fromkeys(tokens))
        # Row 0 is padding; every distinct token is looked up and spelled once.
        self._places = {token: place for place, token in enumerate(distinct, 1)}
        self._words = torch.cat([torch.zeros(1, dtype=torch.int64), vocabulary.encode(token.lower() for token in distinct)])
        spelt = characters_of([[token] for token in distinct])[:, 0] if with_characters else None
        self._spellings = None if spelt is None else torch.cat([torch.zeros_like(spelt[:1]), spelt])
        self._device = device

    def __call__(self, examples: Iterable[Example], size: int) -> list[Batch]:
        """Return batches of about ``size`` predictions, of examples of similar length; paragraphs are not divided."""
        groups, count = list[list[Example]]([[]]), 0
        for example in sorted(examples, key=lambda example: [len(text) for text in texts_of(example)]):
            if count >= size:
                groups.append([])
                count = 0
            groups[-1].append(example)
            count += size_of(example)
        return [self._batch(group) for group in groups]

    def _batch(self, group: list[Example]) -> Batch:
        paragraphs = [example for example in group if isinstance(example, Paragraph)]
        if not paragraphs:
            labelled = [example for example in group if not isinstance(example, Paragraph)]
            texts = zip(*map(texts_of, group), strict=True)
            labels = torch.tensor([example.label for example in labelled], device=self._device)
            return Batch(tuple(map(self._text, texts)), labels, labelled)
        asked = [(paragraph, question) for paragraph in paragraphs for question in paragraph.questions]
        places = [place for place, paragraph in enumerate(paragraphs) for _ in paragraph.questions]
        texts = self._text([paragraph.tokens for paragraph in paragraphs]), self._text([q.tokens for _, q in asked])
        targets = torch.tensor([question.spans[0] for _, question in asked], device=self._device)
        return Batch((*texts, torch.tensor(places, device=self._device)), targets, asked)

    def _text(self, texts: Sequence[Sequence[str]]) -> Text:
        rows = [torch.tensor([self._places[token] for token in text]) for text in texts]
        ids = pad_sequence(rows, batch_first=True)
        characters = None if self._spellings is None else self._spellings[ids].to(self._device)
        return self._words[ids].to(self._device), characters


class Remembering(nn.Module):
    """Replaces a frozen language model, and caches its outputs for other models and later epochs.

    The cache is keyed by the identity of the batch's tensor and holds at most ``gigabytes``; other outputs are computed
    every time. No gradients flow through.
    """

    def __init__(self, bilm: BiLM, gigabytes: float = math.inf) -> None:
        super().__init__()
        self.bilm, self.config = bilm, bilm.config
        self._room = 1e9 * gigabytes
        # The cache holds the characters too, since ids of freed tensors are reused.
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, characters: Tensor) -> tuple[Tensor, None]:
        """Return the activations of all layers, as :class:`BiLM` does, and no state."""
        if id(characters) in self._cache:
            return self._cache[id(characters)][1], None
        with torch.no_grad():
            activations, _ = self.bilm(characters)
        size = activations.numel() * activations.element_size()
        if size <= self._room:
            self._cache[id(characters)] = characters, activations
            self._room -= size
        return activations, None


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy [B] of every example; for answers, summed over the first and the last token."""
    found = cross_entropy(model(*batch.inputs), batch.targets, reduction="none")
    return found.sum(dim=1) if found.ndim > 1 else found


def predictions(model: nn.Module, batch: Batch) -> list[Any]:
    """Return the model's predictions: classes, or answers cut from the paragraphs."""
    with torch.no_grad():
        logits = model(*batch.inputs)
    if batch.targets.ndim == 1:
        return logits.argmax(dim=1).tolist()
    spans, asked = best_spans(logits).tolist(), (example for example in batch.examples if isinstance(example, tuple))
    return [paragraph.answer(*span) for (paragraph, _), span in zip(asked, spans, strict=True)]


def scores(predicted: Sequence[Any], batches: Iterable[Batch]) -> dict[str, float]:
    """Return ``accuracy``, or ``f1`` and ``exact_match``, in per cent, of all :func:`predictions` for these batches."""
    examples = [example for batch in batches for example in batch.examples]
    questions = [example[1] for example in examples if isinstance(example, tuple)]
    if not questions:
        labels = [example.label for example in examples if not isinstance(example, tuple)]
        return {"accuracy": 100.0 * accuracy(torch.tensor(predicted), torch.tensor(labels))}
    found = [answer_score(answer, question.answers) for answer, question in zip(predicted, questions, strict=True)]
    return {"f1": 100.0 * fmean(one.f1 for one in found), "exact_match": 100.0 * fmean(one.exact_match for one in found)}
