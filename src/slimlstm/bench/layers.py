"""Time the layers of a model, dense and compressed, in every engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from slimlstm.bench.candidates import Candidate, check_and_time
from slimlstm.bench.comparison import relative_difference
from slimlstm.bench.engines import dense_rivals, exact_output, low_rank_rivals
from slimlstm.bench.timing import MIN_TURNS, SECONDS, using_threads
from slimlstm.errors import SlimLSTMError
from slimlstm.methods import storage_called
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.modes import plain_defaults, plain_mode
from slimlstm.ops import native
from slimlstm.progress import Progress, shown
from slimlstm.provenance import provenance
from slimlstm.tables import new_table

LARGE_DIFFERENCE = 0.1
"""Relative difference of outputs above which a warning precedes every speed."""


_MOST_NUMBERS = 10**9
"""Largest number of inputs and gates that a layer may have in all."""


@dataclass(frozen=True)
class LayerTimes:
    """One layer in every engine.

    Attributes:
        name: the layer's name.
        sizes: its input, hidden and projection size, and whether it is bidirectional.
        ranks, storages: the ranks and storages of the compressed layer, by the name of the matrix.
        difference: norm of the difference of compressed and dense outputs, over the norm of the dense outputs.
        candidates, refused: the result of :func:`slimlstm.bench.candidates.check_and_time`.
    """

    name: str
    sizes: dict[str, int]
    ranks: dict[str, int]
    storages: dict[str, str]
    difference: float
    candidates: dict[str, dict[str, Any]]
    refused: dict[str, str]


@dataclass(frozen=True)
class LayerBench:
    """Result of :func:`bench_layers`; rich can print it.

    Attributes:
        layers: the layers of a model, each in every engine.
        steps, batch: T and B of the inputs.
        threads: the number of threads of every engine.
    """

    layers: list[LayerTimes]
    steps: int
    batch: int
    threads: int

    def totals(self) -> dict[str, float]:
        """Return the sum of the layers' median microseconds, for each engine that runs all layers."""
        names = self.layers[0].candidates
        return {
            name: sum(layer.candidates[name]["microseconds"] for layer in self.layers)
            for name in names
            if all(name in layer.candidates for layer in self.layers)
        }

    def faster(self) -> dict[str, dict[str, Any]]:
        """Return, for each of our candidates, the best rival in each precision and its total time over ours."""
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
        """Return the times as JSON types, with their provenance."""
        origin = provenance() | {"instruction_set": None if native.missing else native.instruction_set()}
        return asdict(self) | {"totals": self.totals(), "faster": self.faster(), "provenance": origin}

    def __rich__(self) -> Table:
        table = new_table(["layer", "engine", "computes"], ["median us", "quartiles", "error", "best rival / ours"])
        for layer in self.layers:
            _add_rows(table, layer)
        for index, (name, total) in enumerate(self.totals().items()):
            table.add_row("all layers" if index == 0 else "", name, "", f"{total:,.1f}", "", "", "")
        refused = dict.fromkeys(f"{name}: {reason}" for layer in self.layers for name, reason in layer.refused.items())
        differences = ", ".join(f"{layer.name} {layer.difference:.2%}" for layer in self.layers)
        changed = f"Difference of compressed and dense outputs on these inputs: {differences}"
        table.caption = "\n".join([*refused, changed, *self._verdicts()])
        return table

    def _verdicts(self) -> Iterator[str]:
        timed = [layer for layer in self.layers if layer.candidates]
        turns = {layer.name: min(one["turns"] for one in layer.candidates.values()) for layer in timed}
        early = [f"{name} after {count} turns" for name, count in turns.items() if count < MIN_TURNS]
        if early:
            yield (
                f"Timing of an engine ended early ({', '.join(early)}): waiting threads or other programs held the cores; "
                "use fewer threads, or a quiet machine"
            )
        largest = max((layer.difference for layer in self.layers), default=0.0)
        for name, ratios in self.faster().items():
            if largest > LARGE_DIFFERENCE and self.layers[0].candidates[name]["model"] != "dense":
                yield (
                    f"The outputs of {name} differ from the dense ones by up to {largest:.0%}: measure quality before speed"
                )
            against = " and ".join(
                f"{entry['ratio']:.2f}x as fast as the best {precision} rival, {entry['than']}"
                for precision, entry in ratios.items()
            )
            yield f"All layers, T = {self.steps}, B = {self.batch}, threads = {self.threads}: {name} is {against}"


def _add_rows(table: Table, layer: LayerTimes) -> None:
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


def _is_rival(other: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    """Return whether ``one`` is ours, and ``other`` is another engine with the same or the dense model."""
    return one["ours"] and not other["ours"] and other["model"] in ("dense", one["model"])


def bench_layers(
    dense: Mapping[str, LowRankLSTM],
    compressed: Mapping[str, LowRankLSTM],
    *,
    steps: int = 35,
    batch: int = 1,
    threads: int = 1,
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> LayerBench:
    """Time every layer: the dense one in all engines, the compressed one in ours and as an ONNX Scan.

    The input of a layer is the output of the dense layer before it if the sizes fit, and random otherwise. All outputs are
    first checked against the float64 output for the same weights.

    Args:
        dense, compressed: layers of one or two directions, by name, as from :func:`slimlstm.weight_files.layers_of`.
        steps, batch: T and B of the inputs [T, B, I].
        threads: the number of PyTorch's threads.
        seconds: about how long each engine is timed.
        progress: called with a layer's name and the fraction done; None draws a bar on a terminal.

    Raises:
        SlimLSTMError: the mapping is empty, layers do not correspond, or a number is below 1.

    Examples:
        >>> layers = {"lstm": LowRankLSTM(3, 4)}
        >>> found = bench_layers(layers, layers, steps=2, seconds=0.01)
        >>> "slimlstm dense" in found.totals()
        True
    """
    if not dense or min(steps, batch, threads) < 1:
        raise SlimLSTMError(
            f"{len(dense)} layers of {steps} steps, {batch} sequences, {threads} threads cannot be timed; give at least "
            "one of each"
        )
    largest = max(layer.input_size + 8 * layer.hidden_size for layer in dense.values())
    if steps * batch * largest > _MOST_NUMBERS:
        raise SlimLSTMError(
            f"{steps:,} steps of {batch:,} sequences would need more than {_MOST_NUMBERS:,} numbers; give fewer of them"
        )
    for name, layer in dense.items():
        if name not in compressed or layer.matrix_shapes != compressed[name].matrix_shapes:
            found = ", ".join(compressed) or "none"
            raise SlimLSTMError(
                f"the compressed model has no layer {name} of the same sizes, only {found}; compress this file"
            )
    layers: list[LayerTimes] = []
    torch.manual_seed(0)
    with plain_mode(), plain_defaults(), shown("layers", progress) as report_progress:
        x = torch.empty(0)
        for index, (name, layer) in enumerate(dense.items()):
            report_progress(name, index / len(dense))
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
    with using_threads(threads), torch.no_grad():
        candidates = dict(dense_rivals(plain.to_dense().eval(), x, threads, refused))
        if compressed.ranks:
            candidates |= low_rank_rivals(compressed, "compressed", x, threads, refused)
    candidates["slimlstm dense"] = Candidate(True, "float32", "dense", lambda: plain(x)[0])
    if compressed.ranks or compressed.storages:
        candidates["slimlstm compressed"] = Candidate(True, _precision(compressed), "compressed", lambda: compressed(x)[0])
    result = check_and_time(candidates, exact, refused, threads=threads, seconds=seconds)
    sizes = {key: int(getattr(dense, key)) for key in ("input_size", "hidden_size", "proj_size", "bidirectional")}
    difference = relative_difference([exact["dense"]], [exact["compressed"]])
    return LayerTimes(name, sizes, compressed.ranks, dict(compressed.storages), difference, **result)


def _precision(layer: LowRankLSTM) -> str:
    """Return the coarsest format in which the kernel keeps a layer's matrices."""
    formats = {storage_called(layer.storages.get(name, "float32")).kernel_format for name in layer.matrix_shapes}
    return next(name for name in ("int8", "bfloat16", "float32") if name in formats)
