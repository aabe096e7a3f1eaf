"""Folders and files that every part of the page shares, and the cells that the paper measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper.page.results import ResultFolder

TARGETS = ("hh", "ih")
RANKS = (10, 50, 100, 200, 250, 300, 350, 400)
SMALLEST = min(RANKS)
DENSE = ("dense", "none", 0)


@dataclass(frozen=True)
class Sources:
    """Results of this repository, numbers that the paper printed, and where pictures go.

    Attributes:
        results: the folder of results.
        printed: the content of ``printed.json``.
        pictures: the folder for tables and pictures.
        link: the same folder as the page links to it.
    """

    results: ResultFolder
    printed: dict[str, Any]
    pictures: Path
    link: str

    def draw(self, function: Callable[..., None], name: str, *data: Any, **options: Any) -> None:
        """Draw ``{name}.png`` and ``{name}.pdf``."""
        for ending in ("png", "pdf"):
            function(*data, self.pictures / f"{name}.{ending}", **options)


def printed_rows(paper: dict[str, Any], *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the printed rows by the given entries, with this library's names of methods."""
    return {
        tuple(row[key].replace("pruning", "prune") if key == "method" else row[key] for key in keys): row
        for row in paper["rows"]
    }
