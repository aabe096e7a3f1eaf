"""Data sets of three tasks: SST-5 (sentiment), SNLI (inference between two sentences), SQuAD v1.1 (answers in a paragraph).

Files are found, checked and downloaded as in :mod:`slimlstm.demo.corpora`. Where only a part of a published split is
available, :attr:`TaskSplit.label` says so. SST-5 comes in tokens; the others are cut into tokens by NLTK's word tokenizer.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlstm.demo.corpora import PublishedFile, read_file
from slimlstm.errors import SlimLSTMError

SNLI_LABELS = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Sentence:
    """A sentence of SST-5; the label goes from 0, very negative, to 4, very positive.

    ``phrases`` are the parts of it that have labels of their own, words among them, itself left out.
    """

    tokens: list[str]
    label: int
    phrases: Sequence[Sentence] = ()


@dataclass(frozen=True)
class Pair:
    """A pair of SNLI; the label is a place in ``SNLI_LABELS``."""

    premise: list[str]
    hypothesis: list[str]
    label: int


@dataclass(frozen=True)
class Question:
    """A question, the texts that annotators gave as answers, and the (first, last) token of each in the paragraph."""

    id: str
    tokens: list[str]
    answers: list[str]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of SQuAD with its questions; ``offsets`` are where every token begins and ends in ``text``."""

    text: str
    tokens: list[str]
    offsets: list[tuple[int, int]]
    questions: list[Question]

    def answer(self, first: int, last: int) -> str:
        """The original text from one token to another."""
        return self.text[self.offsets[first][0] : self.offsets[last][1]]


Example = Sentence | Pair | Paragraph


@dataclass(frozen=True)
class TaskSplit:
    """``count`` of the ``published`` sentences, pairs or questions of a split, which ``unit`` names. An example of SQuAD
    is a paragraph. ``sha256`` is that of the file; ``published`` is None for data of the user's own.
    """

    examples: Sequence[Example]
    count: int
    published: int | None
    unit: str
    sha256: str

    @property
    def label(self) -> str:
        """What is said beside every number that comes from this split."""
        if self.published is None:
            return f"own data: {self.count:,} {self.unit}"
        if self.count == self.published:
            return f"complete: {self.count:,} {self.unit}"
        return f"subset: {self.count:,} of {self.published:,} {self.unit}"


@dataclass(frozen=True)
class _Source:
    """The editions of a split, the complete one first, and what it has published."""

    editions: list[PublishedFile]
    published: int


_SST_URL = "https://raw.githubusercontent.com/munikarmanish/RNTN/12bb731ba9fbdcdf2368b8515a241773f2b97547/trees/"
_SST_TRAIN_URL = (
    "https://raw.githubusercontent.com/iron-fe/rntn_on_Spark/c42e0605cdc05ea9526ae4d93ade1d6ced1a562e/"
    "trees/train%E5%89%AF%E6%9C%AC.txt"
)
_SNLI = PublishedFile(
    "snli_1.0.zip",
    "https://nlp.stanford.edu/projects/snli/snli_1.0.zip",
    "afb3d70a5af5d8de0d9d81e2637e0fb8c22d1235c2749d83125ca43dab0dbd3e",
)
_SQUAD_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"

SOURCES = {
    "sst5": {
        "train": _Source(
            [
                PublishedFile(
                    "train.txt", _SST_TRAIN_URL, "e2f3f41b0b1e6d4dddc0effe3bfc2d27ed8928079aa9a03d652311614fc5feb7"
                )
            ],
            8_544,
        ),
        "dev": _Source(
            [
                PublishedFile(
                    "dev.txt", _SST_URL + "dev.txt", "0e9336aed6e4730e19f58d00a77b3f0297efdb755f7b5e598c98a05e3f97ea40"
                )
            ],
            1_101,
        ),
        "test": _Source(
            [
                PublishedFile(
                    "test.txt", _SST_URL + "test.txt", "6e54806dee95cf80cd918e7dfb3f6770f6df24bf826f289a4d1f709e1c8f6761"
                )
            ],
            2_210,
        ),
    },
    # Pairs with a gold label are counted.
    "snli": {
        "train": _Source(
            [
                _SNLI,
                PublishedFile(
                    "snli_1.0_train_subset.jsonl", None, "f1e3a5039f034bf94d4b74c50cc9bbea9d454d56b86e0725281d741bad0a985d"
                ),
            ],
            549_367,
        ),
        "dev": _Source(
            [
                _SNLI,
                PublishedFile(
                    "snli_1.0_dev.jsonl", None, "272c8b6ccae2c2d327ca634c32020b6721c1424d2656c86b318c08507792d5e5"
                ),
            ],
            9_842,
        ),
        "test": _Source(
            [
                _SNLI,
                PublishedFile(
                    "snli_1.0_test.jsonl", None, "8a0f5bab1c1696226de3dfa062bb912e146703a86b98f1a598e1f8e416d42c59"
                ),
            ],
            9_824,
        ),
    },
    "squad": {
        "train": _Source(
            [
                PublishedFile(
                    "train-v1.1.json",
                    _SQUAD_URL + "train-v1.1.json",
                    "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
                ),
                PublishedFile(
                    "train-subset.json", None, "884791354f0d9511c9888f8aa4977f78b1b7f78fe7a372b857c7e0532ec2439a"
                ),
            ],
            87_599,
        ),
        "dev": _Source(
            [
                PublishedFile(
                    "dev-v1.1.json",
                    _SQUAD_URL + "dev-v1.1.json",
                    "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
                )
            ],
            10_570,
        ),
    },
}


def read_task(task: str, split: str, folder: str | Path | None = None) -> TaskSplit:
    """A split of ``"sst5"``, ``"snli"`` (both ``"train"``, ``"dev"``, ``"test"``) or ``"squad"`` (``"train"``, ``"dev"``).

    The examples are a :class:`Sentence`, a :class:`Pair` or a :class:`Paragraph` each. The complete published file is taken
    where it is at hand, and what there is of it elsewhere. From a ``folder``, if one is given, files of the same format are
    read as they are: ``train.txt`` and so on of SST-5, ``.jsonl`` of SNLI, ``.json`` of SQuAD.

    Raises:
        SlimLSTMError: as :func:`slimlstm.demo.corpora.read_file`; no such task or split; an unreadable file.
        ImportError: NLTK, which SNLI and SQuAD take, is not installed.
    """
    if task not in FORMATS:
        raise SlimLSTMError(f"no task is called {task!r}; there are {', '.join(map(repr, FORMATS))}")
    if split not in SOURCES[task]:
        raise SlimLSTMError(f"{task} has no split {split!r}; it has {', '.join(map(repr, SOURCES[task]))}")
    form = FORMATS[task]
    if folder is None:
        source = SOURCES[task][split]
        content, edition = read_file(task, source.editions)
        where, sha256, published = edition.file, edition.sha256, source.published
        if edition is _SNLI:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                content = archive.read(f"snli_1.0/snli_1.0_{split}.jsonl")
    else:
        where, published = str(Path(folder) / (split + form.ending)), None
        try:
            content = Path(where).read_bytes()
        except OSError as error:
            raise SlimLSTMError(f"the {split} data of {task} cannot be read: {error}") from error
        sha256 = hashlib.sha256(content).hexdigest()
    try:
        examples = form.parse(content.decode("utf-8"))
    except (KeyError, TypeError, ValueError) as error:
        raise SlimLSTMError(f"{where} is not in the format of {task}: {type(error).__name__} {error}") from error
    count = sum(len(example.questions) if isinstance(example, Paragraph) else 1 for example in examples)
    if not count:
        raise SlimLSTMError(f"{where} holds no {form.unit}")
    return TaskSplit(examples, count, published, form.unit, sha256)


def tree(line: str) -> Sentence:
    """The tokens of a tree in brackets, ``(3 (2 It) (4 works))``, the label of its root, and the trees inside it.

    Raises:
        SlimLSTMError: it is no such tree.
    """
    tokens: list[str] = []
    begun: list[tuple[int, int]] = []
    found: list[Sentence] = []
    try:
        for label, token in re.findall(r" ?\(([0-4]) |([^() ]*)\)", line):
            if label:
                begun.append((int(label), len(tokens)))
                continue
            tokens += [token] if token else []
            of_phrase, first = begun.pop()
            found.append(Sentence(tokens[first:], of_phrase))
    except IndexError:
        found.clear()
    if begun or not tokens or not found or found[-1].tokens != tokens:
        raise SlimLSTMError(f"{line[:80]!r} is no tree such as '(3 (2 It) (4 works))'")
    return replace(found[-1], phrases=found[:-1])


def with_phrases(sentences: Iterable[Sentence]) -> list[Sentence]:
    """The sentences and their phrases of more than three tokens, each once, such as BCN was trained on.

    McCann et al. (2017, arXiv 1708.00107) count 94,200 of them in the training set.
    """
    distinct = {
        (tuple(one.tokens), one.label): one
        for sentence in sentences
        for one in (*(phrase for phrase in sentence.phrases if len(phrase.tokens) > 3), sentence)
    }
    return list(distinct.values())


def snli_pairs(content: str) -> list[Pair]:
    """The pairs with a gold label in JSON lines with ``gold_label``, ``sentence1`` and ``sentence2``."""
    entries = [json.loads(line) for line in _lines(content)]
    tokens = cache(tokens_of)  # most premises stand in three pairs
    return [
        Pair(tokens(entry["sentence1"]), tokens(entry["sentence2"]), SNLI_LABELS.index(entry["gold_label"]))
        for entry in entries
        if entry["gold_label"] != "-"
    ]


def squad_paragraphs(content: str) -> list[Paragraph]:
    """The paragraphs of a JSON text in the format of SQuAD v1.1."""
    return [_paragraph(entry) for article in json.loads(content)["data"] for entry in article["paragraphs"]]


def spans_of(text: str) -> list[tuple[int, int]]:
    """Where every token of ``text`` begins and ends.

    NLTK's tokenizer parts a full stop from a word at the end of a sentence only, so that it is given one sentence, or
    piece of one that ends in ``.``, ``!`` or ``?``, at a time.

    Raises:
        ImportError: NLTK is not installed.
    """
    found: list[tuple[int, int]] = []
    for match in re.finditer(r"\S.*?(?:[.!?]['\")\]]*(?=\s)|$)", text, re.DOTALL):
        start = match.start()
        found += [(start + first, start + last) for first, last in _tokenizer().span_tokenize(match.group())]
    return found


def tokens_of(text: str) -> list[str]:
    """The tokens of ``text``, as they stand there; of an empty one, one empty token."""
    return [text[first:last] for first, last in spans_of(text)] or [""]


def read_vectors(path: str | Path, words: Iterable[str]) -> tuple[list[str], Tensor]:
    """Those of ``words`` that a text file such as GloVe's has vectors for, and the vectors, float32 [N, E].

    Every line is a word and E numbers, parted by spaces.

    Raises:
        SlimLSTMError: the file cannot be read, has vectors of several lengths, or none for any of the words.
    """
    wanted, found, vectors = set(words), list[str](), list[Tensor]()
    try:
        with Path(path).open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                word, _, numbers = line.rstrip("\n").partition(" ")
                if word in wanted:
                    found.append(word)
                    vectors.append(torch.tensor([float(number) for number in numbers.split()]))
                    wanted.discard(word)
    except (OSError, ValueError) as error:
        raise SlimLSTMError(f"the word vectors {path} cannot be read: {error}") from error
    sizes = {len(vector) for vector in vectors}
    if len(sizes) != 1:
        raise SlimLSTMError(
            f"{path} has vectors of {sorted(sizes) or 'no'} numbers for the words at hand; one length is needed"
        )
    return found, torch.stack(vectors)


def _paragraph(entry: dict[str, Any]) -> Paragraph:
    text: str = entry["context"]
    offsets = spans_of(text)
    questions = [
        Question(
            qa["id"],
            tokens_of(qa["question"]),
            [answer["text"] for answer in qa["answers"]],
            [
                _span(offsets, answer["answer_start"], answer["answer_start"] + len(answer["text"]))
                for answer in qa["answers"]
            ],
        )
        for qa in entry["qas"]
    ]
    return Paragraph(text, [text[first:last] for first, last in offsets], offsets, questions)


def _span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The first and last token that share a character with ``start`` to ``end``."""
    touched = [index for index, (first, last) in enumerate(offsets) if first < end and last > start]
    if not touched:
        raise SlimLSTMError(f"no token of the paragraph lies between the characters {start} and {end}")
    return touched[0], touched[-1]


def _lines(content: str) -> list[str]:
    return [line for line in content.split("\n") if line]


@cache
def _tokenizer() -> Any:
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


@dataclass(frozen=True)
class _Format:
    ending: str
    unit: str
    parse: Callable[[str], Sequence[Example]]


FORMATS = {
    "sst5": _Format(".txt", "sentences", lambda content: [tree(line) for line in _lines(content)]),
    "snli": _Format(".jsonl", "pairs", snli_pairs),
    "squad": _Format(".json", "questions", squad_paragraphs),
}
"""How each task's files end, what is counted in them, and how they are read."""
