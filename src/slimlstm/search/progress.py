"""Show the progress of a search on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from slimlstm.progress import on_terminal
from slimlstm.search.result import Trial

TrialProgress = Callable[[Trial, float], None]
"""Called after each trial with the trial and an upper bound on the seconds left."""


def print_trials(metric_name: str) -> TrialProgress:
    """Return a callback that prints a line for each trial to standard error, if that is a terminal.

    Examples:
        >>> print_trials("accuracy")(Trial("int8", None, 1000, 0.9, True), 20.0)
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
