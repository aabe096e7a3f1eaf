"""Search for the smallest ONNX file whose outputs stay nearly as they are."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from numpy.typing import ArrayLike
from torch import Tensor

from slimlstm.calibration.moments import Calibration
from slimlstm.errors import SlimLSTMError
from slimlstm.files import path_of, replacing
from slimlstm.modules.arguments import check_batches, check_function
from slimlstm.modules.modes import plain_defaults, plain_mode
from slimlstm.onnx.builder import INT4_OPSET
from slimlstm.onnx.calibrate import RunInputs
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.find import find_lstms
from slimlstm.onnx.opsets import opset_of
from slimlstm.onnx.reading import bytes_on_disk, check_onnx_output, read_model
from slimlstm.onnx.runtime import Session
from slimlstm.onnx.source import GraphSource
from slimlstm.pipeline.config import LowRank, Quantize
from slimlstm.pipeline.plan import Config
from slimlstm.pipeline.report import Report
from slimlstm.search.agreement import Outputs, disagreement, measures_of
from slimlstm.search.engine import Engine, run_search, smallest
from slimlstm.search.progress import TrialProgress
from slimlstm.search.result import Better, Goal, Measured, Search, Trial, limit_in_words, limit_of, share_of

FileMetric = Callable[[Path], "float | Tensor | ArrayLike"]
"""Takes the path of a file and returns a number, or one value for each held-out example [n]."""
_METRIC = "disagreement"


@plain_mode()
@plain_defaults()
def shrink_onnx(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    runs: Sequence[RunInputs],
    *,
    at_most: str | float = "1%",
    measure: str = "auto",
    metric: FileMetric | None = None,
    better: Better | None = None,
    evaluations: int = 10,
    metric_name: str = "metric",
    progress: TrialProgress | None = None,
) -> Search:
    """Write the smallest version of an ONNX file whose outputs agree with the outputs of the file, up to a limit.

    The last third of the runs measures the disagreement, the others calibrate; with a metric all runs calibrate. The output
    file is written at the first trial that meets the limit and replaced by every smaller one, so an interrupted search
    leaves the best version so far. Where gradients of an LSTM cannot be computed, because it has peepholes for instance,
    only storages of whole matrices are tried, and a note of the result says so.

    Args:
        path: the file.
        output: the file to write.
        runs: inputs by name, one mapping a run.
        at_most: the largest disagreement, a number from 0 to 1 or a percentage such as ``"1%"``. With a metric see
            :func:`slimlstm.find_smallest`.
        measure: ``"argmax"`` is the share of rows whose largest entry moves, ``"cosine"`` is 1 minus the cosine, and
            ``"noise"`` the squared difference over the squared output. ``"auto"`` chooses one for each output by its kind;
            the worst output counts.
        metric: takes the path of a file, and returns a number or one value for each example; used instead of a measure.
        better: ``"lower"`` or ``"higher"``, the direction in which the metric improves.
        evaluations: the largest number of files to measure, the uncompressed one included.
        metric_name: the name of the metric in tables.
        progress: see :func:`slimlstm.find_smallest`.

    Returns:
        The best trial, its report and plan, and every trial.

    Raises:
        SlimLSTMError: ``output`` is ``path`` or no name of a file, no runs are given, a metric is given without its
            direction or beside a measure, nothing smaller meets the limit, or see :func:`slimlstm.compress_onnx`.
    """
    path = path_of(path, "path", "name an ONNX file; find_smallest takes models")
    output = path_of(output, "output", "name the ONNX file to write")
    check_batches(runs, "runs")
    check_onnx_output(path, output)
    if not runs:
        raise SlimLSTMError("no runs are given; a search measures the outputs on inputs")
    if type(evaluations) is not int or evaluations < 2:
        raise SlimLSTMError(f"a search takes at least two evaluations, not {evaluations!r}")
    if metric is None:
        held_out, calibrating = _split(runs)
        goal, measured = _agreement(path, held_out, at_most, measure)
    else:
        calibrating = runs
        goal, measured = _own_metric(path, metric, better, at_most, measure, metric_name)
    calibration, obstacles = _calibration(path, calibrating)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)

    def keep(search: Search, best: Path) -> None:
        if search.best is search.trials[-1]:
            with replacing(output) as draft:
                shutil.copyfile(best, draft)

    def factors(budget: int, storage: str) -> LowRank | None:
        return None if obstacles else LowRank("fisher", bytes=budget, storage=storage)

    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".slimlstm-") as folder:
        engine = Engine(
            make=lambda config: _made(path, config, Path(folder), calibration),
            measure=measured,
            accepts=lambda found, _: goal.is_met_by(found),
            evaluations=evaluations - 1,
        )
        strategy = partial(smallest, engine, Quantize, factors, _storages(path))
        found, _ = run_search(engine, strategy, replace(goal, notes=obstacles), keep, progress)
    if metric is None and len(runs) == 1:
        found.notes.append("the one run both calibrated and measured; give more runs")
    return found


def _agreement(
    path: Path, runs: Sequence[RunInputs], at_most: str | float, measure: str
) -> tuple[Goal, Callable[[Path], Measured]]:
    """Return the goal that outputs agree with the uncompressed file's outputs, and a function that measures a file."""
    worst = share_of(at_most)
    model = read_model(path)
    names = [value.name for value in model.graph.output]
    expected = _outputs(model, names, runs)
    measures = measures_of(expected, names, measure)

    def measured(made: Path) -> Measured:
        return Measured(disagreement(expected, _outputs(read_model(made), names, runs), list(measures.values())))

    words = f"{_METRIC} of at most {worst:.3g} ({', '.join(f'{name} by {kind}' for name, kind in measures.items())})"
    return Goal(_dense_trial(path, 0.0), words, "lower", _METRIC, worst), measured


def _own_metric(
    path: Path, metric: FileMetric, better: Better | None, at_most: str | float, measure: str, name: str
) -> tuple[Goal, Callable[[Path], Measured]]:
    """Return the goal that a user's metric stays within its limit, and a function that measures a file."""
    check_function(metric, "metric", "path")
    if measure != "auto":
        raise SlimLSTMError(f"give either a metric or a measure, not measure={measure!r} beside a metric")
    if better is None:
        raise SlimLSTMError("a metric takes better='lower' or better='higher', the direction in which it improves")
    dense = Measured.of(metric(path))
    if not math.isfinite(dense.value):
        raise SlimLSTMError(f"the metric of the uncompressed file is {dense.value}; it has to be a finite number")
    worst = limit_of(dense.value, at_most, better)
    words = limit_in_words(name, better, worst, dense)
    goal = Goal(_dense_trial(path, dense.value), words, better, name, worst)
    return goal, lambda made: Measured.of(metric(made), dense)


def _dense_trial(path: Path, metric: float) -> Trial:
    return Trial("uncompressed", None, bytes_on_disk(path), metric, accepted=True)


def _split(runs: Sequence[RunInputs]) -> tuple[list[RunInputs], list[RunInputs]]:
    """Return the runs that measure, and the runs that calibrate; a single run does both."""
    if len(runs) == 1:
        return list(runs), list(runs)
    count = max(1, len(runs) // 3)
    return list(runs[-count:]), list(runs[:-count])


def _storages(path: Path) -> tuple[str, ...]:
    """Return the storages of whole matrices that the file's opset has."""
    return ("bfloat16", "int8", "int4") if opset_of(read_model(path)) >= INT4_OPSET else ("bfloat16", "int8")


def _outputs(model: object, names: Sequence[str], runs: Sequence[RunInputs]) -> Outputs:
    session = Session(model)
    return [session.run(names, inputs, number) for number, inputs in enumerate(runs)]


def _calibration(path: Path, runs: Sequence[RunInputs]) -> tuple[Calibration, list[str]]:
    """Return the moments of the runs, and in words why they lack the gradients that factors need, if they do."""
    model = read_model(path)
    source = GraphSource(model, [lstm for lstm in find_lstms(model, path) if lstm.locations])
    try:
        return source.calibrate(runs, with_gradients=True), []
    except SlimLSTMError as error:
        # A model that cannot run at all fails here again.
        moments = source.calibrate(runs, with_gradients=False)
        return moments, [f"no factors were tried, because {str(error).partition(';')[0]}"]


def _made(path: Path, config: Config, folder: Path, calibration: Calibration) -> tuple[Path, Report]:
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx", delete=False) as file:
        made = Path(file.name)
    return made, compress_onnx(path, config, made, calibration=calibration)
