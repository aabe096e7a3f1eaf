"""Measurements of trained task models with compressed ELMos: one file for every cell of a table and seed; latencies."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from paper.elmo import BiLM
from paper.runs import Pace, read_json
from paper.task_cells import (
    Target,
    TaskCompressor,
    compressed_alone,
    first_examples,
    latencies,
    median_example,
    parameters_of,
    with_elmo,
)
from paper.task_runs import TaskRun, check_file, spread
from paper.task_training import predictions_of
from paper.tasks import scores
from slimlstm.files import write_json
from slimlstm.methods import calibrated_methods
from slimlstm.pipeline.report import Report

_CALIBRATION_SEED = 0


class Cell(NamedTuple):
    """A way to compress the ELMo; the method ``"dense"`` leaves it whole."""

    method: str
    target: str
    rank: int

    @property
    def is_calibrated(self) -> bool:
        """Whether every seed gets an ELMo of its own, since the loss of its task model calibrates the method."""
        return self.method in calibrated_methods()

    @property
    def name(self) -> str:
        """The beginning of its files' names.

        Examples:
            >>> Cell("svd", "hh", 10).name
            'svd-hh-010'
        """
        return "dense" if self.method == "dense" else f"{self.method}-{self.target}-{self.rank:03d}"


def cells_of(methods: Iterable[str], targets: Iterable[str], ranks: Iterable[int]) -> list[Cell]:
    """Return the cells of a table: the dense ELMo, then every combination."""
    return [Cell("dense", "none", 0), *itertools.starmap(Cell, itertools.product(methods, targets, ranks))]


class ScoreTable:
    """Scores of the trained models of a run with compressed ELMos, without training.

    Args:
        run: a run with an ELMo.
        results: of its seeds, as :meth:`TaskRun.results` returns them.
        folder: of the cells' files.
        limit: measure on the first examples only, this many; None for all.
        calibration: training examples that calibrated methods see.
    """

    def __init__(
        self, run: TaskRun, results: Sequence[Mapping[str, Any]], folder: Path, limit: int | None, calibration: int
    ) -> None:
        self.run, self.folder, self.limit, self.calibration = run, folder, limit, calibration
        self.parameters: dict[int, Mapping[str, int]] = {result["seed"]: result["parameters"] for result in results}
        self.models = {number: run.trained(number) for number in self.parameters}
        self.test = run.batches(first_examples(run.texts.test, limit))
        train = run.texts.train
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(_CALIBRATION_SEED)).tolist()
        seen = run.batches(first_examples([train[index] for index in drawn], calibration))
        self._compress_inside = TaskCompressor(cast(BiLM, run.bilm), seen)

    def path_of(self, cell: Cell, number: int) -> Path:
        """Return the file of a cell and seed."""
        return self.folder / f"{cell.name}-seed{number}.json"

    def read(self, cell: Cell, number: int) -> dict[str, Any]:
        """Return the content of a file.

        Raises:
            SlimLSTMError: it is of a run with other settings.
        """
        path = self.path_of(cell, number)
        result = read_json(path)
        check_file(path, result["config"], self._settings_of(cell))
        return result

    def _settings_of(self, cell: Cell) -> dict[str, str]:
        """Return the settings in which two files of the table have to agree."""
        calibration = str(self.calibration) if cell.is_calibrated else "none"
        return self.run.settings | {"limit": str(self.limit), "calibration": calibration}

    def fill(self, cells: Sequence[Cell], pace: Pace, console: Console) -> None:
        """Measure the cells that have no file, or until ``pace`` ends the process.

        Raises:
            SlimLSTMError: a file is of a run with other settings.
        """
        for cell, number in itertools.product(cells, self.models):
            if self.path_of(cell, number).exists():
                self.read(cell, number)
        for cell in track(cells, "compressed ELMos", console=console, transient=True):
            missing = [number for number in self.models if not self.path_of(cell, number).exists()]
            together = [missing] if missing else []
            for numbers in [[number] for number in missing] if cell.is_calibrated else together:
                if pace.is_over():
                    pace.stop()
                self._measure(cell, numbers)

    def _measure(self, cell: Cell, numbers: Sequence[int]) -> None:
        """Measure one cell for seeds whose task models get the same compressed ELMo, and write their files."""
        started = time.monotonic()
        bilm, report = self._compressed(cell, numbers[0])
        solved = time.monotonic()
        predicted = predictions_of([self.models[number] for number in numbers], self.test, bilm)
        seconds = {
            "compress": round(solved - started, 2),
            "evaluate": round(time.monotonic() - solved, 2),
            # Not a time: the seeds that the other two are for.
            "seeds": len(numbers),
        }
        for number, answers in zip(numbers, predicted, strict=True):
            write_json(self.path_of(cell, number), self._content(cell, number, answers, report, seconds))

    def _compressed(self, cell: Cell, number: int) -> tuple[BiLM, Report | None]:
        """Return the language model of a cell, for one seed if the cell is calibrated, and the report."""
        if cell.method == "dense":
            return cast(BiLM, self.run.fast_bilm), None
        target = cast(Target, cell.target)
        if cell.is_calibrated:
            return self._compress_inside(self.models[number], number, cell.method, target, cell.rank)
        return compressed_alone(cast(BiLM, self.run.bilm), cell.method, target, cell.rank)

    def _content(
        self, cell: Cell, number: int, answers: Sequence[Any], report: Report | None, seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        run = self.run
        limit = f"first {len(answers):,} of {run.texts.splits[run.task.splits[2]]['label']}"
        common = run.common()
        common["config"] |= self._settings_of(cell)
        return {
            **{**cell._asdict(), "seed": number, "metric": run.task.metric},
            "scores": scores(answers, self.test),
            "examples": len(answers),
            "limit": limit if self.limit else None,
            "parameters": parameters_of(self.parameters[number], report),
            "calibration_loss": {"before": report.loss_before, "after": report.loss_after} if report else None,
            "sites": [asdict(site) for site in report.sites] if report else [],
            "seconds": seconds,
            **common,
        }

    def row(self, cell: Cell) -> dict[str, Any]:
        """Return the spread of a cell's score over the seeds, and its ELMo's parameters."""
        found = [self.read(cell, number) for number in self.models]
        return {
            **spread([result["scores"][self.run.task.metric] for result in found]),
            "parameters": found[0]["parameters"]["elmo"]["after"],
        }


def latency(
    run: TaskRun, model: nn.Module, parameters: Mapping[str, int], targets: Iterable[Target], ranks: Iterable[int]
) -> dict[str, Any]:
    """Time one example of median length through the ELMo and through the whole model, dense and compressed by SVD.

    Args:
        run: a run with an ELMo.
        model: a trained model of the run.
        parameters: of the dense model and ELMo, as in the run's results.
        targets, ranks: of the compressed ELMos.
    """
    batch = run.batches([median_example(run.texts.test)], 1)[0]
    bilm, fast_bilm = cast(BiLM, run.bilm), cast(BiLM, run.fast_bilm)
    versions: dict[str, tuple[BiLM, Report | None]] = {"dense": (bilm, None), "dense, kernel": (fast_bilm, None)}
    for target, rank in itertools.product(targets, ranks):
        versions[f"svd, {target}, {rank}"] = compressed_alone(bilm, "svd", target, rank)
    wholes = {name: with_elmo(model, other) for name, (other, _) in versions.items()}
    found: dict[str, Any] = {"tokens": [text[0].shape[1] for text in batch.inputs[:2]]}
    for part, inputs in (("elmo", batch.inputs[0][1:]), ("model", batch.inputs)):
        modules = {name: whole.embedder.elmo if part == "elmo" else whole for name, whole in wholes.items()}
        found[part] = {
            name: {**timed, "parameters": parameters_of(parameters, versions[name][1])[part]}
            for name, timed in latencies(modules, inputs, part).items()
        }
    return found
