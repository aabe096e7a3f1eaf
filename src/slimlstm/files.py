"""Write files so that a reader finds either the old or the new content, and limit the memory that reading takes."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from slimlstm.errors import SlimLSTMError, described, reason_of

_LEAST_MEMORY, _MEMORY_PER_BYTE = 64 << 20, 256
"""Bytes of memory that reading any file may take, and further bytes for each byte of the file."""
_ABANDONED_AFTER = 3600.0
"""Seconds without a write after which a draft is taken for the draft of a killed process."""


def memory_limit(path: str | os.PathLike[str]) -> int:
    """Return the bytes of memory that the content of a file or folder may take: 64 MiB plus 256 for each byte on disk.

    Small files can declare huge contents. Readers compare the declared sizes with this limit before they allocate memory.

    Examples:
        >>> import tempfile
        >>> memory_limit(tempfile.mkdtemp()) // 2**20
        64
    """
    path = Path(path)
    files = [path] if path.is_file() else [found for found in path.iterdir() if found.is_file()] if path.is_dir() else []
    return memory_limit_of(sum(file.stat().st_size for file in files))


def memory_limit_of(size: int) -> int:
    """Return the bytes of memory that ``size`` bytes on disk may take; see :func:`memory_limit`.

    Examples:
        >>> memory_limit_of(0) // 2**20
        64
    """
    return _LEAST_MEMORY + _MEMORY_PER_BYTE * size


def path_of(value: object, name: str, remedy: str) -> Path:
    """Return an argument as a path.

    Args:
        value: the argument.
        name: its name.
        remedy: the end of the message where it is no path.

    Raises:
        SlimLSTMError: it is no path.

    Examples:
        >>> path_of("model.onnx", "path", "name a file").suffix
        '.onnx'
        >>> path_of(None, "path", "name a file")
        Traceback (most recent call last):
        slimlstm.errors.SlimLSTMError: path is None, not a path; name a file
    """
    if not isinstance(value, str | os.PathLike):
        raise SlimLSTMError(f"{name} is {described(value)}, not a path; {remedy}")
    return Path(cast("str | os.PathLike[str]", value))


def check_memory(needed: int, limit: int, what: str) -> None:
    """Raise :class:`SlimLSTMError` if ``what`` needs more bytes than ``limit``.

    Examples:
        >>> check_memory(10, 100, "this table")
    """
    if needed > limit:
        raise SlimLSTMError(
            f"{what} would take {needed:,} bytes, more than the {limit:,} that slimlstm allows for a file of this size "
            "(64 MiB and 256 bytes for each of its bytes); the file is damaged, or made to exhaust memory"
        )


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise :class:`SlimLSTMError` unless ``path`` is a regular file: pipes and devices may never end.

    Examples:
        >>> check_regular(__file__)
    """
    path = Path(path)
    if not path.exists():
        raise SlimLSTMError(f"{path} does not exist")
    if not path.is_file():
        raise SlimLSTMError(f"{path} is {'a folder' if path.is_dir() else 'a pipe or device'}, no file; name a file")


def check_holds_model(path: str | os.PathLike[str]) -> None:
    """Raise :class:`SlimLSTMError` if a failed download or checkout left a file that stands in a model's place.

    Examples:
        >>> check_holds_model(__file__)
    """
    check_regular(path)
    with Path(path).open("rb") as stream:
        start = stream.read(64)
    if not start:
        raise SlimLSTMError(f"{path} is empty; copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise SlimLSTMError(f"{path} is a pointer of Git LFS, not the file itself; fetch that by git lfs pull")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise SlimLSTMError(f"{path} is a web page, as a failed download leaves it; download the file again")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Path]:
    """Yield the path of a draft beside ``path``, which becomes ``path`` when the block ends without an exception.

    The draft's name is unique, so that processes that write the same file at once do not mix. It is flushed to disk before
    it is renamed, and the folder after. Folders that are missing are made. The file's mode follows the process's umask.
    After an exception the draft is removed and ``path`` is as it was.

    Examples:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with replacing(target) as draft:
        ...     _ = draft.write_text("1 2 3")
        >>> target.read_text()
        '1 2 3'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    # The ending stays, for writers that choose a format by it.
    draft = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.draft{path.suffix}")
    draft.touch(exist_ok=False)
    mode = draft.stat().st_mode  # what the umask leaves; writers that make files of their own may be stricter
    try:
        yield draft
        draft.chmod(mode)
        flush(draft)
        draft.replace(path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if type(error).__name__ == "SafetensorError" or type(error) is RuntimeError:
            # The libraries' own classes for a full disk and the like.
            raise SlimLSTMError(f"{path} could not be written, and is as it was: {reason_of(error)}") from error
        raise
    flush(path.parent)


@contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Generator[None]:
    """Make a folder and hold it within the block; wait first until no other such block holds it.

    Systems that cannot lock folders do not wait.

    Examples:
        >>> import tempfile
        >>> with alone_in(tempfile.mkdtemp()):
        ...     pass
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of some bytes as hexadecimal digits.

    Examples:
        >>> sha256(b"")[:8]
        'e3b0c442'
    """
    return hashlib.sha256(content).hexdigest()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to a file as UTF-8, by :func:`replacing`."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON types to a file, indented by one space, by :func:`replacing`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def flush(path: Path) -> None:
    """Flush a file or a folder to disk; do nothing for folders that the file system cannot flush."""
    if path.is_dir():
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _remove_abandoned(path: Path) -> None:
    """Remove drafts of ``path``, or of a file with another number in its name, that killed processes left behind."""
    stem = path.stem.rpartition("-")[0] or path.stem
    for draft in path.parent.glob(f".{glob.escape(stem)}*.draft{path.suffix}"):
        with suppress(OSError):
            if time.time() - draft.stat().st_mtime > _ABANDONED_AFTER:
                draft.unlink()


def check_file_name(output: Path) -> None:
    """Refuse to write a file where a folder is, or in a folder that cannot be made because a file has its name.

    Raises:
        SlimLSTMError: ``output`` is such a path.

    Examples:
        >>> check_file_name(Path("."))
        Traceback (most recent call last):
            ...
        slimlstm.errors.SlimLSTMError: . is no name of a file, but a folder; name one that ends in .onnx
    """
    if output.is_dir():
        raise SlimLSTMError(f"{output} is no name of a file, but a folder; name one that ends in .onnx")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise SlimLSTMError(f"{output} cannot be written, because {folder} is a file and no folder; name another file")


def check_not_input(path: Path, output: Path) -> None:
    """Refuse to write over the file or folder that is read.

    Raises:
        SlimLSTMError: ``output`` is ``path``, under this name or another.
    """
    if output.exists() and path.exists() and output.samefile(path):
        raise SlimLSTMError(f"{output} is the input, which would be lost; name another output")
