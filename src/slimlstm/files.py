"""Write files so that a reader finds the old content or the new, whatever happens in between."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ABANDONED_AFTER = 3600.0
"""Seconds without a write after which a draft belongs to a process that was killed."""


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
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 by :func:`replacing`."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON types, indented by one space, by :func:`replacing`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def flush(path: Path) -> None:
    """Flush a file or a folder to disk; some file systems cannot flush folders, which is no error."""
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
    """Remove drafts of ``path`` that killed processes left behind."""
    for draft in path.parent.glob(f".{path.stem}.*.draft{path.suffix}"):
        with suppress(OSError):
            if time.time() - draft.stat().st_mtime > _ABANDONED_AFTER:
                draft.unlink()
