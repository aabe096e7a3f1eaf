"""Collect moments at the LSTMs of an ONNX model, which ONNX Runtime runs on given inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch

from slimlstm.calibration.collect import NO_BATCH, MomentSums, moments_of
from slimlstm.calibration.moments import Moments
from slimlstm.calibration.recorder import Keys
from slimlstm.errors import SlimLSTMError, refusing
from slimlstm.files import check_memory, check_regular, memory_limit
from slimlstm.onnx.graph import OnnxLSTM
from slimlstm.onnx.probes import ProbedModel
from slimlstm.onnx.rows import DRAWS, observed_rows, rows_with_gradients
from slimlstm.onnx.runtime import RunInputs


def read_batches(path: Path) -> list[RunInputs]:
    """Return the runs in a ``.npz`` file. Each array is the input of its name; its first axis counts the runs.

    Raises:
        SlimLSTMError: the file is missing or damaged, or its arrays differ in their number of runs.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "runs.npz"
        >>> np.savez(path, x=np.zeros((2, 5, 1, 10)))
        >>> [run["x"].shape for run in read_batches(path)]
        [(5, 1, 10), (5, 1, 10)]
    """
    check_regular(path)
    with refusing(f"{path} is no intact .npz file"):
        with ZipFile(path) as archive:
            check_memory(sum(entry.file_size for entry in archive.infolist()), memory_limit(path), f"the content of {path}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise SlimLSTMError(f"the arrays in {path} need the runs as a common first axis; their lengths are {counts}")
    # The ellipsis keeps an input without axes an array: ONNX Runtime takes no NumPy scalars.
    return [{name: array[run, ...] for name, array in arrays.items()} for run in range(min(counts.values()))]


def calibrate_graph(
    model: Any,
    lstms: Sequence[OnnxLSTM],
    batches: Iterable[RunInputs],
    with_gradients: bool = False,
    *,
    seed: int = 0,
) -> dict[str, list[Moments]]:
    """Run batches through a model and collect the moments at its LSTMs.

    A file has no loss. The gradients are therefore taken from the outputs of every LSTM on its own: with random signs v for
    every output y, δ is the gradient of v·y at the gates. The moment E[δ δᵀ] is then the Gauss-Newton matrix of half the
    squared change of the layer's outputs (Hutchinson's estimate). Gradients flow back through all steps of an operator, but
    through one step only of an LSTM that is written out in single operators. Outputs that the model does not read do not
    count.

    Args:
        model: an ``onnx.ModelProto``, which does not change.
        lstms: its LSTMs to observe.
        batches: inputs by name, one mapping a run.
        with_gradients: whether the moments of gradients are needed, as for ``"fisher"``.
        seed: the seed of the random signs.

    Returns:
        The moments of every matrix that a batch reached, by ``"<lstm>.<weight>"``.

    Raises:
        SlimLSTMError: ONNX Runtime is not installed or cannot run the model on a batch, no batch was given, or gradients
            are needed of an LSTM operator with attributes that PyTorch's LSTM lacks.
    """
    probed, generator = ProbedModel(model, {lstm.name for lstm in lstms}), torch.Generator().manual_seed(seed)
    sums, count = dict[Keys, MomentSums](), 0
    for inputs in batches:
        _, values = probed.run(inputs, count)
        for probe, shown in zip(probed.probes, values, strict=True):
            found = rows_with_gradients(probe, shown, generator) if with_gradients else observed_rows(probe, shown)
            for keys, rows in found.items():
                sums.setdefault(keys, MomentSums()).add(rows)
        count += 1
    if not count:
        raise SlimLSTMError(NO_BATCH)
    return _per_row(moments_of(sums), DRAWS if with_gradients else 1)


def _per_row(moments: Mapping[str, Moments], draws: int) -> dict[str, list[Moments]]:
    """Divide the number of rows by the number of draws, because every draw of signs counted each row again."""
    return {key: [Moments(one.inputs, one.gradients, max(1, one.rows // draws))] for key, one in moments.items()}
