"""The observer of an ONNX graph, for :func:`slimlstm.calibration.refit.refit`."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimlstm.calibration.recorder import Keys, Rows
from slimlstm.calibration.refit import CallMismatchError, Observation
from slimlstm.onnx.graph import OnnxLSTM
from slimlstm.onnx.probes import ProbedModel
from slimlstm.onnx.rows import observed_rows
from slimlstm.onnx.runtime import RunInputs
from slimlstm.ops.weights import Matrix
from slimlstm.progress import count_of


class GraphObserver:
    """Runs a graph with its own and with compressed matrices in ONNX Runtime, without changing it.

    The cost of compressed matrices is the squared change of every number in the graph's outputs. In an integer output, a
    changed number costs 1.

    Args:
        model: the uncompressed ``onnx.ModelProto``; the observer keeps a copy.
        groups: its LSTMs to observe; LSTMs with the same weights form one group. The keys ``"<lstm>.<weight>"`` begin with
            the name of the first LSTM of the group.
        batches: inputs by name, one mapping a run; an iterable that can be iterated more than once.

    Raises:
        SlimLSTMError: ONNX Runtime is not installed or cannot load the model.
    """

    has_costs = True

    def __init__(self, model: Any, groups: Sequence[Sequence[OnnxLSTM]], batches: Iterable[RunInputs]) -> None:
        self._model = type(model)()
        self._model.CopyFrom(model)
        self._first = {lstm.name: group[0].name for group in groups for lstm in group}
        self._batches = batches
        self._dense = ProbedModel(self._model, self._first)

    @property
    def batch_count(self) -> int:
        """The number of batches in one pass."""
        return count_of(self._batches)

    def observe(self, weights: Mapping[str, Matrix], fitting: range, judging: range) -> Generator[Observation]:
        """Yield the observations of one pass; see :class:`slimlstm.calibration.refit.Observer`."""
        compressed = ProbedModel(self._model, self._first, self._of_members(weights))
        for number, inputs in enumerate(self._batches):
            if number not in fitting and number not in judging:
                continue
            outputs, rows = self._run(self._dense, inputs, number)
            changed, compressed_rows = self._run(compressed, inputs, number)
            costs = _costs(outputs, changed) if number in judging else None
            yield Observation(number, rows, compressed_rows, costs)

    def _of_members(self, weights: Mapping[str, Matrix]) -> dict[str, Matrix]:
        """Return ``weights`` under the names of every member of a group."""
        found: dict[str, Matrix] = {}
        for key, matrix in weights.items():
            first, _, name = key.rpartition(".")
            found |= {f"{member}.{name}": matrix for member, own in self._first.items() if own == first}
        return found

    def _run(self, probed: ProbedModel, inputs: RunInputs, number: int) -> tuple[list[NDArray[Any]], dict[Keys, Rows]]:
        """Return the outputs of one run, and the rows of every group."""
        outputs, values = probed.run(inputs, number)
        seen: dict[Keys, list[Rows]] = {}
        for probe, shown in zip(probed.probes, values, strict=True):
            for keys, rows in observed_rows(probe, shown).items():
                own = self._first[probe.lstm.name]
                seen.setdefault(tuple(f"{own}.{key.rpartition('.')[2]}" for key in keys), []).append(rows)
        return outputs, {keys: _joined(several) for keys, several in seen.items()}


def _joined(several: Sequence[Rows]) -> Rows:
    return Rows(tuple(torch.cat(parts) for parts in zip(*(rows.inputs for rows in several), strict=True)), None)


def _costs(expected: Sequence[Any], found: Sequence[Any]) -> Tensor:
    """Return the squared change of every number in the outputs; outputs that are no tensors do not count."""
    costs: list[Tensor] = []
    for one, other in zip(expected, found, strict=True):
        if not isinstance(one, np.ndarray):
            continue
        if one.shape != np.shape(other):
            raise CallMismatchError("the shape of an output depends on the weights")
        if one.dtype.kind == "f":
            costs.append(torch.from_numpy((one.astype(np.float64) - other) ** 2).flatten())
        elif one.dtype.kind in "iub":
            costs.append(torch.from_numpy((one != other).astype(np.float64)).flatten())
    return torch.cat(costs) if costs else torch.zeros(1, dtype=torch.float64)
