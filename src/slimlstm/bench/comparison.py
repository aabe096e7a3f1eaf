"""Compare the outputs and the speed of a model before and after compression."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimlstm.bench.timing import SECONDS, interleaved_seconds, using_threads
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.modes import evaluation_mode
from slimlstm.modules.state import kept_state
from slimlstm.provenance import provenance


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a dense and a compressed model on the same inputs.

    Attributes:
        difference: norm of the difference of all outputs, over the norm of the dense model's outputs.
        dense, compressed: the three quartiles of each model's latency, in seconds.
        faster: ratio of the medians, dense over compressed.
        threads: the number of PyTorch's threads.
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
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"dense {dense}, compressed {compressed}: {self.faster:.2f}x with {threads}; "
            f"outputs differ by {self.difference:.2%}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON types, with its provenance."""
        return asdict(self) | {"provenance": provenance()}


def compare(
    dense: nn.Module, compressed: nn.Module, *inputs: Any, threads: int | None = None, seconds: float = SECONDS
) -> Comparison:
    """Compare a model before and after compression, in evaluation mode and without gradients.

    Args:
        dense, compressed: the models, called as ``model(*inputs)``. They return tensors, also within tuples, lists and
            dictionaries.
        inputs: arguments of the models.
        threads: the number of PyTorch's threads, unchanged if None.
        seconds: about how long each model is timed.

    Raises:
        SlimLSTMError: the models return no floating-point tensors or tensors of different shapes, or the outputs of the
            compressed model are not finite.

    Examples:
        >>> from slimlstm import LowRankLSTM
        >>> x, lstm = torch.randn(5, 1, 3), nn.LSTM(3, 4)
        >>> found = compare(lstm, LowRankLSTM.from_dense(lstm), x, seconds=0.01)
        >>> found.difference < 1e-5
        True
    """
    threads = threads or torch.get_num_threads()
    both = nn.ModuleList((dense, compressed))
    with evaluation_mode(both), kept_state(both):
        with using_threads(threads), torch.no_grad(), parametrize.cached():
            difference = relative_difference(*(list(_tensors(model(*inputs))) for model in (dense, compressed)))
        calls = {"dense": lambda: dense(*inputs), "compressed": lambda: compressed(*inputs)}
        times = interleaved_seconds(calls, seconds=seconds, threads=threads)
    (a, b, c), (d, e, f) = (statistics.quantiles(times[name], n=4, method="inclusive") for name in calls)
    return Comparison(difference, (a, b, c), (d, e, f), b / e, threads)


def relative_difference(dense: Sequence[Tensor], compressed: Sequence[Tensor]) -> float:
    """Return the norm of the difference of all outputs, over the norm of the dense outputs.

    Raises:
        SlimLSTMError: the shapes differ, both models have no outputs, or the compressed outputs are not finite.
    """
    if [tensor.shape for tensor in dense] != [tensor.shape for tensor in compressed] or not dense:
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (dense, compressed)]
        raise SlimLSTMError(
            f"the models' outputs cannot be compared: {shapes[0]} and {shapes[1]}; both have to return the same "
            "floating-point tensors"
        )
    one, other = (torch.cat([tensor.detach().double().flatten() for tensor in tensors]) for tensors in (dense, compressed))
    if not bool(other.isfinite().all()):
        raise SlimLSTMError("the compressed model's outputs are not finite; its speed is not measured, compress it again")
    return float((one - other).norm() / one.norm().clamp_min(1e-30))


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for entry in value.values():  # pyright: ignore
            yield from _tensors(entry)  # pyright: ignore
    elif isinstance(value, tuple | list):
        for entry in value:  # pyright: ignore
            yield from _tensors(entry)  # pyright: ignore
