"""Results from a folder, and which of them no clean commit made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimlstm.errors import SlimLSTMError

Result = dict[str, Any]
"""The content of a result file."""
Cell = tuple[str, str, int]
"""Method, target and rank."""

MARK = " †"
"""Follows numbers from results that no clean commit made."""
OLD = "dirty.json"
"""File with the SHA-256, by name, of results that are older than the rule of clean commits."""


def is_clean(result: Mapping[str, Any]) -> bool:
    """Return whether a result names a commit without uncommitted changes.

    Examples:
        >>> is_clean({"provenance": {"commit": "67eac68d2eca-dirty"}})
        False
    """
    commit = result.get("provenance", {}).get("commit")
    return bool(commit) and not str(commit).endswith("-dirty")


def marked(text: str, *results: Mapping[str, Any]) -> str:
    """Return ``text``, with the mark if any of the results that it comes from is not clean.

    Examples:
        >>> marked("58.30", {"provenance": {"commit": None}})
        '58.30 †'
    """
    return text if all(map(is_clean, results)) else text + MARK


class ResultFolder:
    """Reads results, and refuses new ones that no clean commit made.

    Args:
        folder: of results. Its file ``dirty.json``, where it exists, names the old ones that are accepted.
        allow_dirty: accept all.

    Attributes:
        commits: of all results that were read.
        marked: whether one of them was not clean.
    """

    def __init__(self, folder: Path, *, allow_dirty: bool = False) -> None:
        self.folder, self.allow_dirty = folder, allow_dirty
        self.commits: set[str] = set()
        self.marked = False
        old = folder / OLD
        self._old: dict[str, str] = json.loads(old.read_text(encoding="utf-8")) if old.exists() else {}

    def load(self, name: str) -> Result | None:
        """Return the result in ``{name}.json``, or None if it does not exist.

        Raises:
            SlimLSTMError: it was made with uncommitted changes.
        """
        path = self.folder / f"{name}.json"
        return self.read(path) if path.exists() else None

    def read(self, path: Path) -> Result:
        """Return the result in a file of the folder.

        Raises:
            SlimLSTMError: it was made with uncommitted changes.
        """
        content = path.read_bytes()
        result: Result = json.loads(content)
        commit = result.get("provenance", {}).get("commit")
        if not is_clean(result):
            name = path.relative_to(self.folder).as_posix()
            if not self.allow_dirty and self._old.get(name) != hashlib.sha256(content).hexdigest():
                raise SlimLSTMError(
                    f"{path} names the commit {commit}, not a clean one, so nobody can make it again; "
                    "commit your changes and repeat it, or give --allow-dirty, which marks its numbers"
                )
            self.marked = True
        self.commits.add(str(commit))
        return result

    def log(self, name: str) -> list[Result]:
        """Return the epochs in ``{name}.jsonl``, none if it does not exist."""
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def cells(self, name: str) -> dict[Cell, Result]:
        """Return the results of a sweep by method, target and rank."""
        found: dict[Cell, Result] = {}
        for path in sorted((self.folder / name).glob("*-*-*.json")):
            method, target, rank = path.stem.rsplit("-", 2)
            found[method, target, int(rank)] = self.read(path)
        return found


def perplexity_on_test(result: Mapping[str, Any]) -> float:
    """Return the test perplexity of a sweep's cell or of a training."""
    perplexity = result["perplexity"]
    return perplexity["test"] if isinstance(perplexity, dict) else perplexity


def epochs_of(result: Mapping[str, Any]) -> int:
    """Return the epochs of a training, with those behind the stored weights that it went on from.

    Examples:
        >>> epochs_of({"epochs": 5, "config": {"first_epoch": 4}})
        9
    """
    return result["config"].get("first_epoch", 0) + result["epochs"]
