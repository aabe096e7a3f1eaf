"""Tasks around ELMo: scores with the language model compressed, and latencies."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from paper.analysis import efficiency
from paper.methods import FACTORING, PAPER, all_methods
from paper.page.results import Cell, Result, marked
from paper.page.sources import DENSE, TARGETS, Sources, printed_rows
from paper.page.tables import Row, counted, formatted, markdown, millions, verdict, write_tables

TASKS = {
    "sst5": ("SST-5", "BCN", "accuracy"),
    "snli": ("SNLI", "ESIM", "accuracy"),
    "squad": ("SQuAD v1.1", "BiDAF", "f1"),
}
"""By key: title, task model, and the metric of the paper."""
PRINTED = ("r10", "r400", "best", "average", "average_efficiency")


def _data_of(label: str) -> str:
    """Return the words of :attr:`paper.task_data.TaskSplit.label` for the middle of a sentence."""
    return label.replace("complete: ", "all ").replace("subset: ", "")


class TaskResults:
    """Results of one task, beside the printed ones."""

    def __init__(self, key: str, sources: Sources) -> None:
        self.key, self.sources, results = key, sources, sources.results
        self.name, self.model, self.metric = TASKS[key]
        self.paper: dict[str, Any] = sources.printed[key]
        self.printed = printed_rows(self.paper, "method", "target")
        self.trained = {kind: results.load(f"task_{key}/trained-{kind}") for kind in ("plain", "elmo")}
        self.latency = results.load(f"task_{key}/latency")
        self.files: dict[Cell, list[Result]] = {}
        for path in sorted((results.folder / f"task_{key}").glob("*-seed*.json")):
            found = results.read(path)
            self.files.setdefault((found["method"], found["target"], found["rank"]), []).append(found)
        self.ranks = sorted({rank for _, _, rank in self.files if rank})
        self.methods = [method for method in all_methods() if any(cell[0] == method for cell in self.files)]
        self.is_measured = bool(self.ranks and DENSE in self.files)

    # ---- the table ----

    def _score(self, cell: Cell) -> float:
        """Return the mean score over the seeds."""
        return statistics.mean(found["scores"][self.metric] for found in self.files[cell])

    def _efficiency(self, cell: Cell) -> float | None:
        counts = self.files[cell][0]["parameters"]["model"]
        if counts["after"] >= counts["before"]:
            return None
        return efficiency(self._score(cell), self._score(DENSE), counts["after"], counts["before"])

    def _row_of(self, method: str, target: str) -> Row:
        cells = [(method, target, rank) for rank in self.ranks]
        measured = [cell for cell in cells if cell in self.files]
        shares = [found for cell in measured if (found := self._efficiency(cell)) is not None]
        scores, paper = [self._score(cell) for cell in measured], self.printed.get((method, target), {})
        return (
            *(method, target),
            *(marked(f"{self._score(cell):.2f}", *self.files[cell]) if cell in self.files else None for cell in cells),
            *(f"{max(scores):.2f}", f"{statistics.mean(scores):.2f}"),
            formatted(statistics.mean(shares) if shares else None, "{:.2f}"),
            *(paper.get(name) for name in PRINTED),
        )

    def _table(self) -> tuple[tuple[str, ...], list[Row]]:
        header = (
            *("method", "target", *(f"r = {rank}" for rank in self.ranks), "best", "mean", "mean E(r)"),
            *("printed r = 10", "printed r = 400", "printed best", "printed mean", "printed mean E(r)"),
        )
        pairs = itertools.product(self.methods, TARGETS)
        return header, [self._row_of(*pair) for pair in pairs if any(cell[:2] == pair for cell in self.files)]

    def write(self) -> None:
        """Write the table."""
        write_tables(self.sources.pictures, f"task-{self.key}", *self._table(), left=2)

    def section(self) -> str:
        """Return the table."""
        dense = self.files[DENSE]
        models = (self.model, self.trained["plain"]), (f"{self.model} + ELMo", self.trained["elmo"])
        baseline = "; ".join(
            f"{name} {self._of_seeds(found)} (printed {self.paper['baseline'][name]})" for name, found in models if found
        )
        seeds = f"Means of {len(dense)} seeds." if len(dense) > 1 else "One seed."
        limit = f" Cells are measured on the {_data_of(dense[0]['limit'])}." if dense[0]["limit"] else ""
        link = f"{self.sources.link}/task-{self.key}"
        return f"""## {self.name}, {self.model} with ELMo

{self.paper["metric"]}. Trained on {_data_of(dense[0]["label"])}. Not compressed: {baseline}. {seeds}{limit}

{markdown(*self._table(), left=2)}

Also as [CSV]({link}.csv) and [LaTeX]({link}.tex)."""

    def _of_seeds(self, found: Result) -> str:
        mean, deviation = (found["scores"][self.metric][name] for name in ("mean", "standard_deviation"))
        return marked(f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}"), found)

    def latency_rows(self) -> Iterator[Row]:
        """Yield the latency of one sentence, by what is timed and by version of the ELMo."""
        if not self.latency:
            return
        for part, what in (("elmo", "ELMo"), ("model", f"{self.model} + ELMo")):
            for name, one in self.latency[part].items():
                yield (
                    *(self.name, what, name, millions(one["parameters"]["after"])),
                    *(marked(f"{one['milliseconds'][1]:.2f}", self.latency), f"{one['faster']:.2f}x"),
                )

    # ---- the claims ----

    def hh_against_ih(self) -> str:
        """Return the verdict on hh against ih."""
        cells = itertools.product(PAPER, self.ranks)
        return self._compared(((method, "hh", rank), (method, "ih", rank)) for method, rank in cells)

    def factors_against_pruning(self) -> str:
        """Return the verdict on factors against pruning."""
        cells = itertools.product(FACTORING, TARGETS, self.ranks)
        return self._compared((cell, ("prune", *cell[1:])) for cell in cells)

    def _compared(self, pairs: Iterable[tuple[Cell, Cell]]) -> str:
        """Return whether the first cell of each pair scores better, by the differences above the standard error."""
        differences = [self._score(one) - self._score(other) for one, other in pairs if {one, other} <= self.files.keys()]
        mean = self._score(DENSE) / 100.0
        # Of scores between 0 and 1, at most this.
        error = 100.0 * math.sqrt(mean * (1.0 - mean) / self.files[DENSE][0]["examples"])
        shown = [difference > 0.0 for difference in differences if abs(difference) > error]
        outcome = verdict(shown) if shown or not differences else "**not decided**"
        within = len(differences) - len(shown)
        if not within:
            return outcome
        return f"{outcome}; below the score's standard error of {error:.2f}: {within} of {len(differences)}"


def elmo_summary(trained: Result) -> str:
    """Describe the ELMo inside the tasks by the ``result.json`` of its training."""
    sizes, options = trained["options"]["lstm"], trained["config"]
    return (
        f"- ELMo: {millions(trained['parameters']['bilm'])} parameters ({sizes['dim']} cells, projected to "
        f"{sizes['projection_dim']}; the paper's: 4096 and 512), trained on {' and '.join(options['corpus'])}, "
        f"{trained['tokens']:,} tokens, for {counted(trained['epochs'], 'epoch')} in {trained['seconds'] / 60:.0f} minutes "
        f"on {options['device']}; validation perplexity {trained['perplexity']['valid']:.1f} a token, both directions, "
        f"over {trained['vocabulary']:,} words. The released one was trained on the 1B Word Benchmark for 10 epochs. A "
        "rank is a larger part of a smaller model, so columns can be compared with each other, not with the printed ones."
    )


def latency_section(tasks: Iterable[TaskResults]) -> str:
    """Return the table of latencies of all tasks."""
    rows = [row for task in tasks for row in task.latency_rows()]
    table = markdown(("task", "timed", "ELMo", "parameters", "ms", "faster"), rows, left=3)
    return (
        "## Latency of single sentences\n\n"
        f"Medians of interleaved calls on one machine, and how many times faster than the dense modules.\n\n{table}"
    )
