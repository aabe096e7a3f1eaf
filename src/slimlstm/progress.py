"""Show the progress of long steps: by default bars if standard error is a terminal, and nothing otherwise."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Progress = Callable[[str, float], None]
"""Called with a label and the fraction done, which is NaN where it is unknown."""

Item = TypeVar("Item")

SECONDS_BEFORE_BARS = 1.0
"""Steps that take less time than this show no bar."""


@contextmanager
def shown(title: str, progress: Progress | None = None) -> Generator[Progress]:
    """Yield ``progress``, or by default a callback that draws a bar while the block runs.

    The bar appears if standard error is a terminal and the step takes longer than ``SECONDS_BEFORE_BARS``. A step within
    another step has a bar below the outer bar; within a step that reports to a callback it has none.

    Examples:
        >>> with shown("counting") as progress:
        ...     for done in range(3):
        ...         progress(f"number {done}", done / 3)
    """
    if progress is not None:
        with _display.silent():
            yield progress
    elif on_terminal():
        with _display.row(title) as update:
            yield update
    else:
        yield _ignore


def on_terminal() -> bool:
    """Return whether standard error is a terminal; a program without a console has none."""
    stream: TextIO | None = sys.stderr
    return stream is not None and stream.isatty()


def counted(items: Iterable[Item], progress: Progress, name: str = "batch") -> Generator[Item]:
    """Yield ``items``, and report after each item how many are done.

    Examples:
        >>> seen = []
        >>> list(counted("ab", lambda label, fraction: seen.append((label, fraction)), "letter"))
        ['a', 'b']
        >>> seen
        [('letter 1 of 2', 0.5), ('letter 2 of 2', 1.0)]
    """
    count = length_of(items)
    for number, item in enumerate(items, 1):
        yield item
        if count:
            progress(f"{name} {number} of {count}", min(number / count, 1.0))
        else:
            progress(f"{name} {number}", math.nan)


def length_of(items: Iterable[object]) -> int | None:
    """Return the number of items, or None where it is unknown before iterating over them."""
    try:
        return len(items) if isinstance(items, Sized) else None
    except TypeError:  # a DataLoader of an IterableDataset has a __len__ that fails
        return None


def count_of(items: Iterable[object]) -> int:
    """Return the number of items; iterate over them where it is unknown before.

    Examples:
        >>> count_of([3, 4]), count_of(range(5))
        (2, 5)
    """
    count = length_of(items)
    return sum(1 for _ in items) if count is None else count


def _ignore(label: str, fraction: float) -> None: ...


class _Display:
    """The bars of all steps that run now; a terminal can draw only one such display at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._rows = self._silent = 0
        self._began = 0.0
        self._bars: Bars | None = None

    @contextmanager
    def silent(self) -> Generator[None]:
        """Draw nothing within the block."""
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1

    @contextmanager
    def row(self, title: str) -> Generator[Progress]:
        """Yield the update of a new bar, which ends with the block."""
        task: TaskID | None = None
        with self._lock:
            if self._rows == 0:
                self._began = time.monotonic()
            self._rows += 1

        def update(label: str, fraction: float) -> None:
            nonlocal task
            with self._lock:
                if self._silent or time.monotonic() - self._began < SECONDS_BEFORE_BARS:
                    return
                self._bars = self._bars or _started()
                if task is None:
                    task = self._bars.add_task(title, total=None if math.isnan(fraction) else 1.0, label=label)
                self._bars.update(task, completed=0.0 if math.isnan(fraction) else fraction, label=label)

        try:
            yield update
        finally:
            with self._lock:
                self._rows -= 1
                if self._bars is not None and task is not None:
                    self._bars.remove_task(task)
                if self._bars is not None and self._rows == 0:
                    self._bars.stop()
                    self._bars = None


_display = _Display()


def _started() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(bar_width=20)),
        *(TextColumn("{task.fields[label]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn()),
    )
    # Standard output stays the caller's: it may be a file, or closed.
    is_terminal = bool(sys.stdout and sys.stdout.isatty())
    bars = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=is_terminal)
    bars.start()
    return bars
