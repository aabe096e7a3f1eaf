"""Data sets of three tasks: SST-5 (sentiment), SNLI (inference between two sentences), SQuAD v1.1 (answers in a paragraph).

Files are found, checked and downloaded as in :mod:`slimlstm.demo.corpora`. If only a part of a published split is
available, :attr:`TaskSplit.label` says so. SST-5 comes in tokens; NLTK's word tokenizer cuts the others.
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
from slimlstm.errors import SlimLSTMError, reason_of

SNLI_LABELS = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Sentence:
    """A sentence of SST-5; the label ranges from 0, very negative, to 4, very positive.

    ``phrases`` are its labelled parts, single words included, without the sentence itself.
    """

    tokens: list[str]
    label: int
    phrases: Sequence[Sentence] = ()


@dataclass(frozen=True)
class Pair:
    """A pair of SNLI; the label is an index of ``SNLI_LABELS``."""

    premise: list[str]
    hypothesis: list[str]
    label: int


@dataclass(frozen=True)
class Question:
    """A question, the annotators' answers, and the tokens (first, last) of each answer in the paragraph."""

    id: str
    tokens: list[str]
    answers: list[str]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of SQuAD with its questions; ``offsets`` are the begin and end of every token in ``text``."""

    text: str
    tokens: list[str]
    offsets: list[tuple[int, int]]
    questions: list[Question]

    def answer(self, first: int, last: int) -> str:
        """Return the original text from one token to another."""
        return self.text[self.offsets[first][0] : self.offsets[last][1]]


Example = Sentence | Pair | Paragraph


@dataclass(frozen=True)
class TaskSplit:
    """Examples of one split.

    Attributes:
        examples: for SQuAD, paragraphs.
        count: sentences, pairs or questions in them.
        published: how many the published split has, None for the user's own data.
        unit: what is counted.
        sha256: of the file.
    """

    examples: Sequence[Example]
    count: int
    published: int | None
    unit: str
    sha256: str

    @property
    def label(self) -> str:
        """Description that accompanies every number from this split."""
        if self.published is None:
            return f"own data: {self.count:,} {self.unit}"
        if self.count == self.published:
            return f"complete: {self.count:,} {self.unit}"
        return f"subset: {self.count:,} of {self.published:,} {self.unit}"


@dataclass(frozen=True)
class _Source:
    """Editions of a split, the complete one first, and its published count."""

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
    """Read a split of ``"sst5"``, ``"snli"`` or ``"squad"``: ``"train"``, ``"dev"`` or, but for SQuAD, ``"test"``.

    Examples are of type :class:`Sentence`, :class:`Pair` or :class:`Paragraph`. The complete published file is used if it
    is available, else a part of it. With ``folder``, files of the same format are read from there, unchecked:
    ``train.txt`` and so on for SST-5, ``.jsonl`` for SNLI, ``.json`` for SQuAD.

    Raises:
        SlimLSTMError: see :func:`slimlstm.demo.corpora.read_file`; or the task or split does not exist, or the file is
            unreadable.
        ImportError: NLTK, which SNLI and SQuAD need, is not installed.
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
            raise SlimLSTMError(f"the {split} data of {task} cannot be read: {reason_of(error)}") from error
        sha256 = hashlib.sha256(content).hexdigest()
    try:
        examples = form.parse(content.decode("utf-8"))
    except (KeyError, TypeError, ValueError) as error:
        raise SlimLSTMError(f"{where} is not in the format of {task}: {type(error).__name__} {reason_of(error)}") from error
    count = sum(len(example.questions) if isinstance(example, Paragraph) else 1 for example in examples)
    if not count:
        raise SlimLSTMError(f"{where} holds no {form.unit}")
    return TaskSplit(examples, count, published, form.unit, sha256)


def tree(line: str) -> Sentence:
    """Parse a tree in brackets, ``(3 (2 It) (4 works))``: its tokens, the label of its root, and its subtrees.

    Raises:
        SlimLSTMError: the line is no such tree.

    Examples:
        >>> tree("(3 (2 It) (4 works))").tokens
        ['It', 'works']
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
    """Return the sentences and their phrases of more than three tokens, each once, as BCN was trained on.

    McCann et al. (2017, arXiv 1708.00107) count 94,200 of them in the training set.
    """
    distinct = {
        (tuple(one.tokens), one.label): one
        for sentence in sentences
        for one in (*(phrase for phrase in sentence.phrases if len(phrase.tokens) > 3), sentence)
    }
    return list(distinct.values())


def snli_pairs(content: str) -> list[Pair]:
    """Parse the pairs with a gold label in JSON lines with ``gold_label``, ``sentence1`` and ``sentence2``."""
    entries = [json.loads(line) for line in _lines(content)]
    tokens = cache(tokens_of)  # most premises stand in three pairs
    return [
        Pair(tokens(entry["sentence1"]), tokens(entry["sentence2"]), SNLI_LABELS.index(entry["gold_label"]))
        for entry in entries
        if entry["gold_label"] != "-"
    ]


def squad_paragraphs(content: str) -> list[Paragraph]:
    """Parse the paragraphs of a JSON text in the format of SQuAD v1.1."""
    return [_paragraph(entry) for article in json.loads(content)["data"] for entry in article["paragraphs"]]


def spans_of(text: str) -> list[tuple[int, int]]:
    """Return the begin and end of every token in ``text``.

    NLTK's tokenizer separates a full stop from a word only at the end of its input, so it gets one sentence at a time, or a
    piece of one that ends in ``.``, ``!`` or ``?``.

    Raises:
        ImportError: NLTK is not installed.
    """
    found: list[tuple[int, int]] = []
    for match in re.finditer(r"\S.*?(?:[.!?]['\")\]]*(?=\s)|$)", text, re.DOTALL):
        start = match.start()
        found += [(start + first, start + last) for first, last in _tokenizer().span_tokenize(match.group())]
    return found


def tokens_of(text: str) -> list[str]:
    """Return the tokens of ``text``, unchanged; one empty token if it has none."""
    return [text[first:last] for first, last in spans_of(text)] or [""]


def read_vectors(path: str | Path, words: Iterable[str]) -> tuple[list[str], Tensor]:
    """Return the ``words`` that a text file such as GloVe's has vectors for, and the vectors, float32 [N, E].

    Every line is a word and E numbers, separated by spaces.

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
        raise SlimLSTMError(f"the word vectors {path} cannot be read: {reason_of(error)}") from error
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
    """Return the first and last token that share a character with ``start`` to ``end``."""
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
"""By task: the suffix of its files, what is counted in them, and their parser."""
