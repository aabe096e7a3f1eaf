"""Commands that made the stored results, with their hours and processors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paper.page.results import ResultFolder
from paper.page.tables import Row, markdown

COMMANDS = (
    (
        "recipes/language_model.py",
        ("ptb_trained.json", "wikitext2_trained.json", "*_curve/result.json", "ptb_controls/*.json"),
    ),
    ("recipes/sweep.py", ("ptb_untuned/*.json", "wikitext2_untuned/*.json")),
    ("recipes/sweep.py --tune", ("ptb_fine_tuned/*.json",)),
    ("recipes/elmo.py", ("elmo_trained.json",)),
    ("recipes/tasks.py", ("task_*/*.json",)),
    ("recipes/norms.py", ("*_norms.json",)),
    ("recipes/speed.py", ("ptb_speed.json",)),
)
"""Each command, and the files that it writes."""
HEADER = ("command", "processors", "files", "hours")


def commands_section(results: ResultFolder) -> str:
    """Return the table of commands; hours are sums of the seconds that the files record."""
    rows = [row for command, patterns in COMMANDS if (row := _row_of(command, patterns, results))]
    return f"""## Commands, hours and hardware

{markdown(HEADER, rows, left=2)}

Recipes need `pip install -c constraints.txt -e ".[recipes]"` in a clone. Hours are the sum of the seconds that the files
record, from start to end: runs side by side and pauses count in full. A dash: the files record none.
`python recipes/heatmaps.py` draws the heatmaps, and `python recipes/reproduction.py` writes this page. Each
recipe's `--help` lists its options."""


def _row_of(command: str, patterns: tuple[str, ...], results: ResultFolder) -> Row | None:
    paths = [path for pattern in patterns for path in sorted(results.folder.glob(pattern))]
    found = [results.read(path) for path in paths]
    if not found:
        return None
    hours = sum(map(_seconds, found)) / 3600
    return (f"`{command}`", "; ".join(sorted(set(_processors(found)))), len(found), f"{hours:.1f}" if hours else "-")


def _seconds(result: Mapping[str, Any]) -> float:
    """Return the seconds that a file records: its own, or of each of its trainings.

    A mapping of seconds by step may say how many ``seeds`` were measured at once; the file then counts for one of them.
    """
    trainings: Any = result.get("seeds", [])
    recorded: Any = result.get("seconds", 0.0)
    if isinstance(recorded, Mapping):
        steps: dict[str, float] = {**recorded}
        seeds = steps.pop("seeds", 1)
        recorded = sum(steps.values()) / seeds
    return float(recorded or 0.0) + sum(map(_seconds, trainings))


def _processors(found: list[dict[str, Any]]) -> Iterator[str]:
    for result in found:
        origin = result.get("provenance", {})
        cores = f", {origin['cores']} cores" if "cores" in origin else ""
        if "processor" in origin:
            yield origin["processor"] + cores
