"""Print results: tables on a terminal, plain text in a pipe, JSON on request."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_WIDTH_OF_FILES = 10_000
"""Width of the output in columns if it goes to a file or a pipe, so that nothing is wrapped."""


def tolerate_encodings() -> None:
    """Replace characters that the output's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def show(result: dict[str, Any], as_json: bool, *parts: RenderableType) -> None:
    """Print ``result`` as JSON, or ``parts`` for a reader."""
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    console = _console(to_errors=False)
    for part in parts:
        console.print(part, highlight=False, markup=False)


def print_error(text: str) -> None:
    """Print one line to standard error, in red on a terminal."""
    _console(to_errors=True).print(f"slimlstm: {text}", style="red", highlight=False, markup=False, soft_wrap=True)


def print_note(text: str) -> None:
    """Print one line to standard error, dim on a terminal."""
    _console(to_errors=True).print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def sketch(values: list[float], width: int = 12) -> str:
    """Draw descending values as bars, relative to the first value; at most ``width`` evenly picked ones are drawn."""
    encoding = getattr(sys.stdout, "encoding", None) or ""
    bars = _BARS if encoding.lower().startswith("utf") else _PLAIN_BARS
    picked = [values[index * len(values) // width] for index in range(width)] if len(values) > width else values
    top = max(values[0], 1e-30)
    return "".join(bars[min(int(len(bars) * value / top), len(bars) - 1)] for value in picked)


def _console(*, to_errors: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if to_errors else sys.stdout
    # A closed standard output is None.
    if (stream is not None and stream.isatty()) or os.environ.get("COLUMNS", "0").strip("0 "):
        return Console(stderr=to_errors)
    return Console(stderr=to_errors, width=_WIDTH_OF_FILES)
