"""Tables as Markdown, CSV and LaTeX, and the numbers in them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from paper.page.results import MARK
from slimlstm.files import write_text

Row = Sequence[object]
"""Entries of a row; None leaves a cell empty."""


def markdown(header: Sequence[str], rows: Iterable[Row], left: int = 1) -> str:
    """Return a table whose first ``left`` columns are aligned to the left.

    Examples:
        >>> print(markdown(["method", "rank"], [("svd", 10), ("dense", None)]))
        | method | rank |
        | --- | ---: |
        | svd | 10 |
        | dense |  |
    """
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in _texts([header, rule, *rows]))


def write_tables(folder: Path, name: str, header: Sequence[str], rows: Iterable[Row], left: int) -> None:
    """Write ``{name}.csv``, without marks, and ``{name}.tex``, with them as daggers."""
    texts = _texts([header, *rows])
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([text.removesuffix(MARK) for text in row] for row in texts)
    write_text(folder / f"{name}.csv", stream.getvalue())
    write_text(folder / f"{name}.tex", _latex(texts, left))


def _latex(texts: Sequence[Sequence[str]], left: int) -> str:
    # Nothing needs to be escaped: no table has a hash or an underscore.
    first, *lines = (" & ".join(line).replace(MARK, r"$^\dagger$") + r" \\" for line in texts)
    begin = "\\begin{tabular}{" + "l" * left + "r" * (len(texts[0]) - left) + "}"
    return "\n".join([begin, r"\hline", first, r"\hline", *lines, r"\hline", r"\end{tabular}", ""])


def _texts(rows: Iterable[Row]) -> list[list[str]]:
    return [["" if entry is None else str(entry) for entry in row] for row in rows]


def formatted(number: float | None, form: str = "{:.3f}") -> str | None:
    """Return a number as text; None, an empty cell, stays None."""
    return None if number is None else form.format(number)


def millions(count: float) -> str:
    """Return a count in millions.

    Examples:
        >>> millions(24_221_600)
        '24.22M'
    """
    return f"{count / 1e6:.2f}M"


def counted(count: int, noun: str) -> str:
    """Return a count and its noun.

    Examples:
        >>> counted(1, "epoch"), counted(2, "epoch")
        ('1 epoch', '2 epochs')
    """
    return f"{count} {noun}" + ("" if count == 1 else "s")


def verdict(outcomes: Sequence[bool]) -> str:
    """Return in how many comparisons a claim is right, and whether it holds.

    Examples:
        >>> verdict([True] * 9 + [False])
        '**holds** (9 of 10 comparisons)'
        >>> verdict([])
        'not measured'
    """
    if not outcomes:
        return "not measured"
    right = sum(outcomes) / len(outcomes)
    word = "holds" if right >= 0.9 else "does not hold" if right <= 0.1 else "holds in part"
    return f"**{word}** ({sum(outcomes)} of {counted(len(outcomes), 'comparison')})"
