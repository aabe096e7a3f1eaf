"""Show the progress of a search on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from slimlstm.progress import on_terminal
from slimlstm.search.result import Trial

Progress = Callable[[Trial, float], None]
"""Called after each trial with the trial and an upper bound on the seconds left."""


def shown(metric_name: str) -> Progress:
    """Return a callback that prints a line for each trial to standard error, if that is a terminal.

    Examples:
        >>> shown("accuracy")(Trial("int8", None, 1000, 0.9, True), 20.0)
    """

    def show(trial: Trial, left: float) -> None:
        if on_terminal():
            verdict = "accepted" if trial.accepted else "refused"
            print(
                f"{trial.label}: {trial.bytes:,} bytes, {metric_name} {trial.metric:.5g}, {verdict}; "
                f"at most {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return show
