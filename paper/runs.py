"""Runs that can be interrupted: one process a folder, seeds by place in the run, limits of time, checks of settings."""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import FileLock, Timeout

from slimlstm.errors import SlimLSTMError
from slimlstm.files import write_text


def exit_if_done(path: Path) -> None:
    """End the process if ``path``, its last output, already exists.

    Examples:
        >>> exit_if_done(Path("missing.json"))
    """
    if path.exists():
        print(f"{path} already exists; delete it to run again")
        sys.exit()


def lock_folder(folder: Path) -> FileLock:
    """Lock a run's folder for this process, and make the folder if it is missing.

    Keep the returned lock: it is released by ``release()`` or when the process ends, in whatever way.

    Raises:
        SystemExit: another process holds the lock.

    Examples:
        >>> import tempfile
        >>> lock_folder(Path(tempfile.mkdtemp())).release()
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit(f"another process works in {folder}; wait until it ends, or end it")
    return lock


def seed(*place: object) -> None:
    """Seed PyTorch by a place in the run, such as ``(seed, "dropout", epoch, step)``.

    Random numbers then depend on the place alone, so a resumed run draws the same ones.

    Examples:
        >>> seed(1, "weights")
        >>> first = torch.rand(())
        >>> seed(1, "weights")
        >>> bool(first == torch.rand(()))
        True
    """
    torch.manual_seed(zlib.crc32(repr(place).encode()))


class Pace:
    """When a run writes checkpoints, and when its process stops; the next process continues the run.

    Args:
        max_minutes: of this process.
        checkpoint_seconds: between two checkpoints.

    Examples:
        >>> Pace(0.0).is_over(), Pace(float("inf")).is_over()
        (True, False)
    """

    def __init__(self, max_minutes: float, checkpoint_seconds: float = 180.0) -> None:
        self.max_minutes, self.checkpoint_seconds = max_minutes, checkpoint_seconds
        self._start, self._last_checkpoint = time.monotonic(), 0.0

    def seconds(self) -> float:
        """Return the seconds since this object was made."""
        return time.monotonic() - self._start

    def is_over(self, seconds: float | None = None) -> bool:
        """Return whether ``seconds``, by default :meth:`seconds`, have reached the limit."""
        return (self.seconds() if seconds is None else seconds) >= 60.0 * self.max_minutes

    def after_step(self, write_checkpoint: Callable[[], None], seconds: float | None = None) -> None:
        """Write a checkpoint if one is due, and end the process at the limit.

        Args:
            write_checkpoint: called before the process ends, too.
            seconds: of this run; by default :meth:`seconds`. Processes that share a run have to agree on them.
        """
        seconds = self.seconds() if seconds is None else seconds
        if self.is_over(seconds) or seconds - self._last_checkpoint >= self.checkpoint_seconds:
            write_checkpoint()
            self._last_checkpoint = seconds
        if self.is_over(seconds):
            self.stop()

    def stop(self) -> NoReturn:
        """End the process with a message, and with the exit status of success."""
        print(f"stopped after {self.max_minutes:g} minutes; the same command continues the run")
        sys.exit()


def settings_of(arguments: argparse.Namespace, without: Iterable[str]) -> dict[str, str]:
    """Return all options but those named in ``without``, as text, in which two processes of one run must agree.

    Examples:
        >>> settings_of(argparse.Namespace(lr=0.1, device="cpu"), ["device"])
        {'lr': '0.1'}
    """
    return {name: str(value) for name, value in vars(arguments).items() if name not in set(without)}


def recorded_options(arguments: argparse.Namespace, without: Iterable[str]) -> dict[str, Any]:
    """Return all options but those named in ``without``, for a result: files and folders by their names alone.

    Examples:
        >>> recorded_options(argparse.Namespace(lr=0.1, text=Path("/home/me/text"), device="cpu"), ["device"])
        {'lr': 0.1, 'text': 'text'}
    """
    chosen = {name: value for name, value in vars(arguments).items() if name not in set(without)}
    return {name: value.name if isinstance(value, Path) else value for name, value in chosen.items()}


def check_settings(path: Path, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Check that the file at ``path`` belongs to a run with the same settings.

    A setting that one of the two lacks counts as ``"None"``, since older files lack newer options.

    Raises:
        SlimLSTMError: a setting differs.

    Examples:
        >>> check_settings(Path("checkpoint"), {"lr": "0.1"}, {"lr": "0.1", "limit": "None"})
    """
    for name in sorted(theirs.keys() | ours.keys()):
        found, expected = theirs.get(name, "None"), ours.get(name, "None")
        if found != expected:
            raise SlimLSTMError(
                f"{path} is of a run with {name}={found}, not {expected}; use that setting, or name another output folder"
            )


def write_log(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, one an epoch."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
