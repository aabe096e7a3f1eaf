"""Language models: perplexities of compressed AWD-LSTMs on one corpus, before and after fine-tuning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from paper.analysis import efficiency
from paper.methods import FACTORING, PAPER, TOGETHER, all_methods, beyond_paper
from paper.page.results import Cell, Result, epochs_of, marked, perplexity_on_test
from paper.page.sources import RANKS, SMALLEST, TARGETS, Sources, printed_rows
from paper.page.tables import Row, counted, formatted, markdown, millions, verdict, write_tables
from paper.plots import quality_curves

CORPORA = {"ptb": ("Penn Treebank", "penn_treebank", 58.8), "wikitext2": ("WikiText-2", "wikitext2", 65.6)}
"""By the name of their files: title, key of the printed table, and the published AWD-LSTM's perplexity."""
CELLS: list[Cell] = list(itertools.product(PAPER, TARGETS, RANKS))
HEADER = (
    *("method", "target", "rank", "parameters"),
    *("perplexity", "printed", "E(r)", "printed E(r)", "tuned", "printed tuned", "tuned E(r)", "printed tuned E(r)"),
)
NAMES, TUNED = 3, 8
"""The number of columns that name a row, and the first column of the fine-tuned."""
SAME_BYTES = ("svd", "fisher", TOGETHER)
"""Methods that are compared at the bytes of factors of one rank."""
OPTIMIZERS = {"ntasgd": "SGD that turns into averaged SGD", "asgd": "averaged SGD", "adamw": "AdamW with one cycle"}


def training_of(found: Result) -> str:
    """Describe a training by its ``result.json``, which may have continued an earlier training."""
    config, sizes = found["config"], ""
    if "sizes" in found:
        sizes = " (embedding {embedding_size}, hidden {hidden_size}; the paper's: 400, 1150)".format(**found["sizes"])
    dropout = _dropout_of(config)
    time = f"{found['seconds'] / 60:.0f} minutes on {config['device']} ({found['provenance']['processor']})"
    details = f", with {dropout}, in {time}"
    if config.get("first_epoch"):
        details = f". The last {found['epochs']} had {dropout} and took {time}"
    return (
        f"has {millions(found['parameters'])} parameters{sizes} and was trained on {config['corpus'] or config['text']} "
        f"for {counted(epochs_of(found), 'epoch')} by {OPTIMIZERS[config['optimizer']]} in {config['dtype']}{details}"
    )


class LanguageResults:
    """Results on one corpus, beside the printed ones."""

    def __init__(self, key: str, sources: Sources) -> None:
        self.key, self.sources, results = key, sources, sources.results
        self.name, printed_key, self.published = CORPORA[key]
        self.paper: dict[str, Any] = sources.printed[printed_key]
        self.printed = printed_rows(self.paper, "method", "target", "rank")
        self.untuned, self.tuned = results.cells(f"{key}_untuned"), results.cells(f"{key}_fine_tuned")
        self.dense, self.tuned_dense = results.load(f"{key}_untuned/dense"), results.load(f"{key}_fine_tuned/dense")
        self.trained, self.speed = results.load(f"{key}_trained"), results.load(f"{key}_speed")
        self.from_start, self.log = results.load(f"{key}_curve/result"), results.log(f"{key}_curve/log")
        beyond: list[Cell] = list(itertools.product(beyond_paper(), TARGETS, RANKS))
        self.planned = [
            (TOGETHER, *cell) for cell in itertools.product(TARGETS, RANKS) if (TOGETHER, *cell) in self.untuned
        ]
        self.cells = [cell for cell in CELLS + beyond if cell in self.untuned or cell in self.printed]

    @property
    def base(self) -> Result:
        """The dense model's result, which has to exist."""
        assert self.dense is not None  # noqa: S101 (sections are made of corpora that have it)
        return self.dense

    def write(self) -> None:
        """Write the table and the picture."""
        write_tables(self.sources.pictures, self.key, HEADER, self._rows(), left=2)
        curves = {
            target: {method: points for method in all_methods() if (points := self._curve(method, target))}
            for target in TARGETS
        }
        labels = {"x_label": "rank", "y_label": "test perplexity"}
        self.sources.draw(quality_curves, f"{self.key}-perplexity", curves, self.base["perplexity"], **labels)

    def _curve(self, method: str, target: str) -> list[tuple[int, float]]:
        cells = [(method, target, rank) for rank in RANKS]
        return [(cell[-1], self.untuned[cell]["perplexity"]) for cell in cells if cell in self.untuned]

    # ---- the table ----

    def _rows(self) -> list[Row]:
        paper, tuned = self.paper["baseline"]["AWD-LSTM"], self.tuned_dense
        dense = (
            *("dense", None, None, millions(self.base["parameters"])),
            *(marked(f"{self.base['perplexity']:.2f}", self.base), paper["ppl"], None, None),
            *(tuned and marked(f"{perplexity_on_test(tuned):.2f}", tuned), paper.get("ppl_finetuned"), None, None),
        )
        return [dense, *map(self._row_of, self.cells)]

    def _row_of(self, cell: Cell) -> Row:
        paper, found, tuned = self.printed.get(cell, {}), self.untuned.get(cell), self.tuned.get(cell)
        return (
            *cell,
            found and millions(found["parameters"]),
            *(found and marked(f"{found['perplexity']:.2f}", found), paper.get("ppl")),
            *(formatted(self._efficiency(cell, found)), paper.get("efficiency")),
            *(tuned and marked(f"{perplexity_on_test(tuned):.2f}", tuned), paper.get("ppl_finetuned")),
            *(formatted(self._efficiency(cell, tuned)), paper.get("efficiency_finetuned")),
        )

    def _efficiency(self, cell: Cell, result: Result | None) -> float | None:
        """Return E(r) of a cell, None where it was not run or saves nothing."""
        if result is None or cell not in self.untuned or self.untuned[cell]["parameters"] >= self.base["parameters"]:
            return None
        sizes = self.untuned[cell]["parameters"], self.base["parameters"]
        return efficiency(perplexity_on_test(result), self.base["perplexity"], *sizes, lower=True)

    # ---- the claims ----

    def hh_against_ih(self) -> str:
        """Return the verdict on hh against ih."""
        cells = itertools.product(PAPER, RANKS)
        return self._compared([((method, "hh", rank), (method, "ih", rank)) for method, rank in cells], "not so")

    def factors_against_pruning(self) -> str:
        """Return the verdict on factors against pruning."""
        pairs: list[tuple[Cell, Cell]] = [(cell, ("prune", *cell[1:])) for cell in CELLS if cell[0] in FACTORING]
        return self._compared(pairs, "pruning is ahead")

    def tuning(self) -> str:
        """Return the verdict on fine-tuned hh at the smallest rank, against the dense model tuned alike.

        A dense model that was not trained to the end gains by tuning too, so only the tuned one is a fair baseline.
        """
        if self.tuned_dense is None:
            return verdict([])
        base = perplexity_on_test(self.tuned_dense)
        cells: list[Cell] = [(method, "hh", SMALLEST) for method in PAPER]
        found = {cell[0]: perplexity_on_test(self.tuned[cell]) for cell in cells if cell in self.tuned}
        told = ", ".join(f"{method} {perplexity:.2f}" for method, perplexity in {"dense": base, **found}.items())
        return verdict([perplexity <= base for perplexity in found.values()]) + (f"; tuned: {told}" if found else "")

    def _compared(self, pairs: Iterable[tuple[Cell, Cell]], otherwise: str) -> str:
        """Return whether the first cell of each pair has the lower perplexity, without and with fine-tuning."""
        verdicts: list[str] = []
        pairs = list(pairs)
        for when, found in (("", self.untuned), ("fine-tuned ", self.tuned)):
            ahead = {
                one: perplexity_on_test(found[one]) < perplexity_on_test(found[other])
                for one, other in pairs
                if {one, other} <= found.keys()
            }
            lost = ", ".join(" ".join(map(str, cell)) for cell, won in ahead.items() if not won)
            if ahead or not when:
                verdicts.append(when + verdict(list(ahead.values())) + (f", {otherwise} at {lost}" if lost else ""))
        return "; ".join(verdicts)

    # ---- the sections ----

    def summary(self) -> str:
        """Return which dense model was used, and which cells were run."""
        return f"- {self.name}: {self._dense_model()}\n  " + "\n  ".join(self._coverage())

    def _dense_model(self) -> str:
        paper = self.paper["baseline"]["AWD-LSTM"]["ppl"]
        how = training_of(self.trained) if self.trained else "was trained in a way that is not recorded"
        base = self.base["perplexity"]
        far = (
            f"Because our perplexity is {base / paper - 1:.0%} higher than the paper's, compare changes from dense to "
            "compressed, not perplexities. They show which method, matrix and rank cost more in this model; a fully "
            "trained one may differ."
        )
        near = "Our perplexities can be compared with the printed ones."
        return (
            f"The dense model {how}. It has a test perplexity of {base:.2f}; the published AWD-LSTM has {self.published}, "
            f"the paper's {paper}. {near if base < 1.1 * paper else far}"
        )

    def _coverage(self) -> Iterator[str]:
        yield f"Without fine-tuning, {_coverage_of(self.untuned, self.printed, 'ppl')}."
        ways = sorted({_tuning_of(found) for found in self.tuned.values()})
        if ways or any("ppl_finetuned" in row for row in self.printed.values()):
            yield f"Fine-tuned, {_coverage_of(self.tuned, self.printed, 'ppl_finetuned', ' or '.join(ways))}."

    def section(self) -> str:
        """Return the table and the picture."""
        link = f"{self.sources.link}/{self.key}"
        tuned = [(*row[:NAMES], *row[TUNED:]) for row in self._rows() if any(entry is not None for entry in row[TUNED:])]
        fine_tuned = f"### {self.name}, fine-tuned\n\n{markdown((*HEADER[:NAMES], *HEADER[TUNED:]), tuned, left=3)}\n\n"
        return (
            f"## {self.name}\n\n{markdown(HEADER[:TUNED], (row[:TUNED] for row in self._rows()), left=3)}\n\n"
            f"{fine_tuned * bool(tuned)}"
            f"Also as [CSV]({link}.csv) and [LaTeX]({link}.tex).\n\n"
            f"![Perplexity against rank, {self.name}]({link}-perplexity.png)"
        )

    def beyond_paper(self) -> str:
        """Return the table of methods at the bytes of the paper's cells, empty if no plan was measured."""
        if not self.planned:
            return ""
        rows = [self._row_at_bytes(target, rank) for _, target, rank in self.planned]
        header = ("target", "rank", "MB", *SAME_BYTES, *(f"{method}, tuned" for method in SAME_BYTES))
        return f"""### {self.name}, the same bytes

{markdown(header, rows)}

*{TOGETHER}* chooses rank and bits of every matrix together, in the bytes that float32 factors of the rank take. *MB* counts
the whole model; its other parts stay in float32."""

    def _row_at_bytes(self, target: str, rank: int) -> Row:
        cells: list[Cell] = [(method, target, rank) for method in SAME_BYTES]
        found = [self.untuned.get(cell) for cell in cells] + [self.tuned.get(cell) for cell in cells]
        size = f"{self.untuned[TOGETHER, target, rank]['bytes'] / 1e6:.1f}"
        return (target, rank, size, *(one and marked(f"{perplexity_on_test(one):.2f}", one) for one in found))

    def learning(self) -> str:
        """Return the section on a training from random weights, empty if none exists."""
        if not self.log or self.from_start is None:
            return ""
        rows = [
            (
                *(entry["epoch"] + 1, f"{math.exp(entry['train_loss']):.1f}", f"{entry['valid_perplexity']:.1f}"),
                *("averaged" if entry["averaged"] else "last", f"{entry['seconds'] / 60:.0f}"),
            )
            for entry in self.log
        ]
        header = ("epoch", "training perplexity", "validation perplexity", "weights", "minutes")
        perplexity = marked(f"{perplexity_on_test(self.from_start):.2f}", self.from_start)
        return f"""## Training from random weights, {self.name}

A second model {training_of(self.from_start)}. Its test perplexity is {perplexity}.

{markdown(header, rows)}"""


def _dropout_of(config: Mapping[str, Any]) -> str:
    factor = config["dropout"]
    return "the published dropout rates" if factor == 1.0 else f"dropout at {factor:g} of the published rates"


def _tuning_of(found: Result) -> str:
    config = found["config"]
    return (
        f"for {counted(found['epochs'], 'epoch')} by {OPTIMIZERS[config['optimizer']]} (rate {config['lr']:g}) "
        f"with {_dropout_of(config)}"
    )


def _coverage_of(
    found: Mapping[Cell, Result], printed: Mapping[Cell, Mapping[str, Any]] | Any, name: str, how: str = ""
) -> str:
    """Return how many cells have been run, and which of the printed ones are missing."""
    run = sum(cell in found for cell in CELLS)
    text = f"{run} of {len(CELLS)} cells have been run" + (f", each {how}" if how else "")
    of_paper = [cell for cell, row in printed.items() if name in row]
    if not of_paper:
        return text
    missing = [" ".join(map(str, cell)) for cell in of_paper if cell not in found]
    return f"{text}; missing, of the {len(of_paper)} that the paper prints: {', '.join(missing) or 'none'}"
