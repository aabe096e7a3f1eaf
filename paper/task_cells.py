"""Task models whose ELMo is compressed: for the table of scores, and for latencies."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import quantiles
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import slimlstm as sl
from paper.elmo import BiLM
from paper.task_data import Example, Paragraph
from paper.tasks import Batch, losses, size_of, texts_of
from slimlstm.bench import explain, interleaved_seconds, median_ratios
from slimlstm.modules.sites import Site
from slimlstm.pipeline.config import configuration
from slimlstm.pipeline.report import Report

_MOST_ROUNDING = 1e-4

Target = Literal["ih", "hh", "both"]


def first_examples(examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    """Return the first ``limit`` sentences or pairs, or the first paragraphs with that many questions."""
    if limit is None:
        return examples
    counts = itertools.accumulate(map(size_of, examples))
    return examples[: 1 + sum(count < limit for count in counts)]


def median_example(examples: Sequence[Example]) -> Example:
    """Return the example of median length; of a paragraph, with one question."""
    median = sorted(examples, key=lambda example: len(texts_of(example)[0]))[len(examples) // 2]
    return replace(median, questions=median.questions[:1]) if isinstance(median, Paragraph) else median


def in_kernel(bilm: BiLM) -> BiLM:
    """Return the same language model with LSTM modules that the kernel runs where it can; parameters are shared."""
    other = copy.copy(bilm)
    other._modules = dict(bilm._modules)  # pyright: ignore[reportPrivateUsage]
    for name in ("forward_lstms", "backward_lstms"):
        lstms = cast("list[nn.LSTM]", getattr(bilm, name))
        setattr(other, name, nn.ModuleList(sl.LowRankLSTM.from_dense(lstm) for lstm in lstms))
    return other.eval()


def with_elmo(model: Any, bilm: nn.Module) -> Any:
    """Return a copy of a task model with another language model."""
    own, model.embedder.elmo.bilm = model.embedder.elmo.bilm, None
    other = copy.deepcopy(model)
    model.embedder.elmo.bilm, other.embedder.elmo.bilm = own, bilm
    return other.eval()


def compressed_alone(bilm: BiLM, method: str, target: Target, rank: int) -> tuple[BiLM, Report]:
    """Compress a copy of the language model without regard to a task; return it and the report."""
    other = copy.deepcopy(bilm)
    return other, sl.compress_(other, configuration(method, rank=rank, target=target))


class TaskCompressor:
    """Compresses the language model inside task models, calibrated with the loss of each.

    Args:
        bilm: the dense language model.
        batches: training examples to calibrate on.
    """

    def __init__(self, bilm: BiLM, batches: Sequence[Batch]) -> None:
        self._bilm, self._batches = bilm, batches
        self._calibrations: dict[int, Any] = {}

    def __call__(self, model: nn.Module, number: int, method: str, target: Target, rank: int) -> tuple[BiLM, Report]:
        """Return a compressed language model for the task model of seed ``number``, and the report."""
        other = with_elmo(model, copy.deepcopy(self._bilm))
        if number not in self._calibrations:
            self._calibrations[number] = sl.calibrate(other, self._batches, losses)
        rule = configuration(method, rank=rank, target=target, filter=_is_in_elmo)
        data = {"batches": self._batches, "loss": losses, "calibration": self._calibrations[number]}
        report = sl.compress_(other, rule, **cast(Any, data))
        return other.embedder.elmo.bilm, report


def _is_in_elmo(site: Site) -> bool:
    return site.module.startswith("embedder.elmo.")


def parameters_of(dense: Mapping[str, int], report: Report | None) -> dict[str, dict[str, int]]:
    """Return the parameters of each part before and after compression; pruned matrices count the weights left."""
    saved = report.model.parameters_before - report.model.parameters_after if report else 0
    return {name: {"before": count, "after": count - saved} for name, count in dense.items()}


def latencies(modules: Mapping[str, nn.Module], inputs: tuple[Any, ...], part: str) -> dict[str, dict[str, Any]]:
    """Check the modules' outputs, then time interleaved calls on the same inputs.

    Args:
        modules: by name; ``dense`` is what the others are compared with.
        inputs: of every module.
        part: names what is timed, in errors.

    Returns:
        By name: quartiles of the milliseconds, the median ratio, the rounding error, and the backends of the LSTM layers.

    Raises:
        SlimLSTMError: an output differs from the same weights' output in float64.
    """
    errors = {name: rounding_error(module, inputs) for name, module in modules.items()}
    for name, error in errors.items():
        if not error < _MOST_ROUNDING:
            raise sl.SlimLSTMError(
                f"{part}, {name}: the output differs by {error:.1e} from float64, more than {_MOST_ROUNDING:g}; "
                "wrong outputs are not timed"
            )
    calls = {name: partial(module, *inputs) for name, module in modules.items()}
    seconds = interleaved_seconds(calls)
    ratios = median_ratios(seconds, "dense")
    return {
        name: {
            "milliseconds": [1e3 * value for value in quantiles(seconds[name], n=4)],
            "faster": ratios[name],
            "rounding_error": errors[name],
            "backends": _backends_of(module, inputs),
        }
        for name, module in modules.items()
    }


def rounding_error(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return the norm of the output's difference to float64 with the same weights, relative to the output's norm."""
    with torch.no_grad():
        fast: Tensor = model(*inputs).double()
        exact: Tensor = copy.deepcopy(model).double()(*inputs)
    finite = exact.isfinite()
    return float((fast - exact)[finite].norm() / exact[finite].norm())


def _backends_of(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Return how many LSTM layers run with which backend."""
    with torch.no_grad():
        return dict(Counter(layer.backend for layer in explain(model, *inputs).layers))
