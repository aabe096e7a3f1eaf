"""Latency, measured side by side: the machine's moods fall on all candidates alike, and only ratios are told."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimlstm.bench.engines import (
    SECONDS,
    Candidate,
    dense_rivals,
    exact_output,
    low_rank_rivals,
    measure,
    only_threads,
    seconds_by_turns,
)
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.modes import evaluation_mode
from slimlstm.ops import cpu
from slimlstm.provenance import provenance


def interleaved_seconds(
    calls: Mapping[str, Callable[[], object]], *, repeats: int = 15, threads: int | None = None
) -> dict[str, list[float]]:
    """Wall-clock seconds of every call, ``repeats`` times each, taking turns; without gradients, after one warm-up round.

    ``threads`` is how many PyTorch may use meanwhile, as many as before if None.

    Masks and other parametrizations are applied once, in the warm-up round, as in a model that is shipped.

    Raises:
        SlimLSTMError: no call, or ``repeats`` below 1.
    """
    if not calls or repeats < 1:
        raise SlimLSTMError(f"{len(calls)} calls cannot be timed {repeats} times")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with only_threads(threads or torch.get_num_threads()), torch.no_grad(), parametrize.cached():
        for call in calls.values():
            call()
        for _ in range(repeats):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Median time of ``baseline`` over that of every call: above 1 is faster than the baseline."""
    reference = statistics.median(seconds[baseline])
    return {name: reference / statistics.median(times) for name, times in seconds.items()}


@dataclass(frozen=True)
class Comparison:
    """A dense and a compressed model on the same inputs.

    ``dense`` and ``compressed`` are the quartiles of their times in seconds, ``difference`` is the norm of the difference
    of all outputs over that of the dense model's, ``faster`` the ratio of the medians, dense over compressed.
    """

    difference: float
    dense: tuple[float, float, float]
    compressed: tuple[float, float, float]
    faster: float
    threads: int

    def __str__(self) -> str:
        dense, compressed = (
            f"{1e6 * m:,.0f} us ({1e6 * a:,.0f} to {1e6 * b:,.0f})" for a, m, b in (self.dense, self.compressed)
        )
        return (
            f"dense {dense}, compressed {compressed}: {self.faster:.2f}x with {self.threads} threads; "
            f"outputs differ by {self.difference:.2%}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types, with where it comes from."""
        return asdict(self) | {"provenance": provenance()}


def compare(
    dense: nn.Module, compressed: nn.Module, *inputs: Any, threads: int | None = None, seconds: float = SECONDS
) -> Comparison:
    """Times a model before and after compression, by turns, in evaluation mode and without gradients.

    Args:
        dense, compressed: called as ``model(*inputs)``; they may return tensors in tuples, lists and dictionaries.
        threads: how many PyTorch may use meanwhile, as many as before if None.
        seconds: about how long each is timed.

    Raises:
        SlimLSTMError: the outputs cannot be compared, or the compressed model's are not finite.
    """
    models, threads = (dense, compressed), threads or torch.get_num_threads()
    with evaluation_mode(nn.ModuleList(models)), only_threads(threads), torch.no_grad(), parametrize.cached():
        difference = _difference(*(list(_tensors(model(*inputs))) for model in models))
        calls = {"dense": lambda: dense(*inputs), "compressed": lambda: compressed(*inputs)}
        times = seconds_by_turns(calls, seconds)
    (a, b, c), (d, e, f) = (statistics.quantiles(times[name], n=4) for name in calls)
    return Comparison(difference, (a, b, c), (d, e, f), b / e, threads)


@dataclass(frozen=True)
class LayerTimes:
    """One layer in every engine: its sizes, how far the compressed layer's output is from the dense one's, and what
    :func:`slimlstm.bench.engines.measure` found."""

    name: str
    sizes: dict[str, int]
    ranks: dict[str, int]
    storages: dict[str, str]
    difference: float
    candidates: dict[str, dict[str, Any]]
    refused: dict[str, str]


@dataclass(frozen=True)
class LayerBench:
    """The layers of a model, each in every engine."""

    layers: list[LayerTimes]
    steps: int
    batch: int
    threads: int

    def totals(self) -> dict[str, float]:
        """Microseconds of all layers one after the other, for every engine that runs them all."""
        names = self.layers[0].candidates
        return {
            name: sum(layer.candidates[name]["microseconds"] for layer in self.layers)
            for name in names
            if all(name in layer.candidates for layer in self.layers)
        }

    def faster(self) -> dict[str, dict[str, Any]]:
        """How many times faster each of ours runs all layers than the best rival of each precision."""
        totals, first = self.totals(), self.layers[0].candidates
        found: dict[str, dict[str, Any]] = {}
        for name in (name for name in totals if first[name]["ours"]):
            for precision in ("float32", "int8"):
                rivals = [r for r in totals if _is_rival(first[r], first[name]) and first[r]["precision"] == precision]
                if rivals:
                    best = min(rivals, key=totals.__getitem__)
                    found.setdefault(name, {})[precision] = {"than": best, "ratio": totals[best] / totals[name]}
        return found

    def to_dict(self) -> dict[str, Any]:
        """The times as JSON types, with where they come from."""
        origin = provenance() | {"instruction_set": None if cpu.missing else cpu.instruction_set()}
        return asdict(self) | {"totals": self.totals(), "faster": self.faster(), "provenance": origin}

    def __rich__(self) -> Table:
        table = Table(caption_justify="left")
        for heading in ("layer", "engine", "computes"):
            table.add_column(heading, overflow="fold")
        for heading in ("median us", "quartiles", "error", "best rival / ours"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            for index, (name, one) in enumerate(layer.candidates.items()):
                rivals = [other["microseconds"] for other in layer.candidates.values() if _is_rival(other, one)]
                table.add_row(
                    layer.name if index == 0 else "",
                    name,
                    f"{one['model']}, {one['precision']}",
                    f"{one['microseconds']:,.1f}",
                    "{:,.1f} to {:,.1f}".format(*one["quartiles"]),
                    f"{one['error']:.1e}",
                    f"{min(rivals) / one['microseconds']:.2f}x" if rivals else "",
                    end_section=index == len(layer.candidates) - 1,
                )
        for index, (name, total) in enumerate(self.totals().items()):
            table.add_row("all layers" if index == 0 else "", name, "", f"{total:,.1f}", "", "", "")
        refused = dict.fromkeys(f"{name}: {reason}" for layer in self.layers for name, reason in layer.refused.items())
        differences = ", ".join(f"{layer.name} {layer.difference:.2%}" for layer in self.layers)
        changed = f"Compressed outputs differ from dense ones, for these inputs, by: {differences}"
        table.caption = "\n".join([*refused, changed, *self._verdicts()])
        return table

    def _verdicts(self) -> Iterator[str]:
        for name, ratios in self.faster().items():
            against = " and ".join(
                f"{entry['ratio']:.2f}x as fast as the best {precision} rival, {entry['than']}"
                for precision, entry in ratios.items()
            )
            yield f"All layers, T = {self.steps}, B = {self.batch}, threads = {self.threads}: {name} is {against}"


def _is_rival(other: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    """Whether ``other`` could be used instead of ``one``, which is ours: it computes the same model or the dense one."""
    return one["ours"] and not other["ours"] and other["model"] in ("dense", one["model"])


def bench_layers(
    dense: Mapping[str, LowRankLSTM],
    compressed: Mapping[str, LowRankLSTM],
    *,
    steps: int = 35,
    batch: int = 1,
    threads: int = 1,
    seconds: float = SECONDS,
    progress: Callable[[str, float], None] | None = None,
) -> LayerBench:
    """Times every layer, dense in all engines and compressed in ours, on inputs [T, B, I].

    These are the output of the dense layer before, where its size fits, and else random.
    Outputs are checked first, against float64 of the weights that each engine has. Factors at both matrices are also given
    to the engines that can run them, as an ONNX Scan.

    Args:
        dense, compressed: layers of one or two directions, by name, such as :func:`slimlstm.weight_files.layers_of` gives.
        progress: called with a layer's name and the fraction done.

    Raises:
        SlimLSTMError: no layers, layers that do not correspond, or numbers below 1.
    """
    if not dense or min(steps, batch, threads) < 1:
        raise SlimLSTMError(f"{len(dense)} layers of {steps} steps, {batch} sequences, {threads} threads: nothing to time")
    unlike = [name for name, layer in dense.items() if name not in compressed or not _alike(layer, compressed[name])]
    if unlike:
        raise SlimLSTMError(f"{', '.join(unlike)} is not there, or of other sizes, in the compressed model")
    layers: list[LayerTimes] = []
    torch.manual_seed(0)
    x = torch.empty(0)
    for index, (name, layer) in enumerate(dense.items()):
        if progress is not None:
            progress(name, index / len(dense))
        if x.shape[-1] != layer.input_size:
            x = torch.randn(steps, batch, layer.input_size)
        layers.append(_bench_layer(name, layer, compressed[name], x, threads, seconds))
        x = exact_output(layer, x).float()
    return LayerBench(layers, steps, batch, threads)


def _bench_layer(
    name: str, dense: LowRankLSTM, compressed: LowRankLSTM, x: Tensor, threads: int, seconds: float
) -> LayerTimes:
    refused: dict[str, str] = {}
    plain = LowRankLSTM.from_dense(dense.to_dense()).eval()
    exact = {"dense": exact_output(plain, x), "compressed": exact_output(compressed, x)}
    with only_threads(threads), torch.no_grad():
        candidates = dict(dense_rivals(plain.to_dense().eval(), x, threads, refused))
        if compressed.ranks:
            candidates |= low_rank_rivals(compressed, "compressed", x, threads, refused)
    candidates["slimlstm dense"] = Candidate(True, "float32", "dense", lambda: plain(x)[0])
    if compressed.ranks or compressed.storages:
        candidates["slimlstm compressed"] = Candidate(True, _precision(compressed), "compressed", lambda: compressed(x)[0])
    result = measure(candidates, exact, refused, threads=threads, seconds=seconds)
    sizes = {key: int(getattr(dense, key)) for key in ("input_size", "hidden_size", "proj_size", "bidirectional")}
    difference = _difference([exact["dense"]], [exact["compressed"]])
    return LayerTimes(name, sizes, compressed.ranks, dict(compressed.storages), difference, **result)


def _precision(layer: LowRankLSTM) -> str:
    kept = {layer.storages.get(name, "float32") for name in layer.matrix_shapes}
    return next(storage for storage in ("int8", "bfloat16", "float32") if storage in kept)


def _alike(one: LowRankLSTM, other: LowRankLSTM) -> bool:
    return one.matrix_shapes == other.matrix_shapes


def _difference(dense: list[Tensor], compressed: list[Tensor]) -> float:
    if [tensor.shape for tensor in dense] != [tensor.shape for tensor in compressed] or not dense:
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (dense, compressed)]
        raise SlimLSTMError(f"the models' outputs cannot be compared: {shapes[0]} and {shapes[1]}")
    one, other = (torch.cat([tensor.detach().double().flatten() for tensor in tensors]) for tensors in (dense, compressed))
    if not bool(other.isfinite().all()):
        raise SlimLSTMError("the compressed model's outputs are not finite; no speed is told of a wrong answer")
    return float((one - other).norm() / one.norm())


def _tensors(value: object) -> Iterator[Tensor]:
    """The floating-point tensors in what a model returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for entry in value.values():  # pyright: ignore
            yield from _tensors(entry)  # pyright: ignore
    elif isinstance(value, tuple | list):
        for entry in value:  # pyright: ignore
            yield from _tensors(entry)  # pyright: ignore
