"""Compute the rows that the matrices of ONNX LSTMs receive in one run, and gradients at the LSTMs' gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimlstm.calibration.recorder import Keys, Recorder, Rows, states_before
from slimlstm.errors import SlimLSTMError
from slimlstm.onnx.graph import OnnxLSTM
from slimlstm.onnx.operators import peculiarity_of
from slimlstm.onnx.probes import Probe
from slimlstm.ops.gates import PYTORCH, reordered
from slimlstm.ops.reference import product, recurrence, step
from slimlstm.ops.weights import Direction, rebuilt

DRAWS = 4
"""Number of random sign vectors for every output in a batch; the estimate's variance falls with this number."""

Values = Mapping[str, NDArray[Any]]
"""The values at one LSTM by role; see :class:`slimlstm.onnx.probes.Probe`."""


@dataclass(frozen=True)
class _Call:
    """One call of an LSTM operator in float64: x [T, B, I], y [T, D, B, H], lengths [B], h0 and c0 [D, B, H]."""

    x: Tensor
    y: Tensor
    lengths: Tensor
    h0: Tensor
    c0: Tensor


def observed_rows(probe: Probe, values: Values) -> dict[Keys, Rows]:
    """Return the inputs of every matrix of an LSTM in one run, in float64; an empty dictionary where it did not run."""
    if not values["x"].size:
        return {}
    lstm = probe.lstm
    if not lstm.is_operator:
        inputs = [_rows(values[role]) for role in ("x", "h")]
        if len(inputs[0]) == len(inputs[1]):
            return {_keys(lstm): Rows(tuple(inputs), None)}
        # x·W may have been computed for all steps at once.
        return {(key,): Rows((rows,), None) for key, rows in zip(_keys(lstm), inputs, strict=True)}
    recorder = Recorder(with_gradients=False)
    for call in _calls(values):
        counted = torch.arange(len(call.x))[:, None] < call.lengths[None]
        for index, ending in enumerate(_endings(lstm)):
            before = states_before(call.y[:, index], call.h0[index], call.lengths, ending == "_reverse")
            recorder.add(_keys(lstm, ending), (call.x[counted], before[counted]), torch.empty(0))
    return recorder.take(None)


def rows_with_gradients(probe: Probe, values: Values, generator: torch.Generator) -> dict[Keys, Rows]:
    """Return :func:`observed_rows`, ``DRAWS`` times, with the gradients of v·y at the gates for random signs v.

    Args:
        probe: the LSTM.
        values: the values at the LSTM in one run, by role.
        generator: draws the signs v.

    Raises:
        SlimLSTMError: the LSTM has attributes that PyTorch's LSTM lacks or a computed bias, or x and h have different
            numbers of rows.
    """
    if not values["x"].size:
        return {}
    recorder = Recorder(with_gradients=True)
    with torch.enable_grad():
        if probe.lstm.is_operator:
            outputs = _run_operator(probe, values, recorder)
        else:
            outputs = _run_step(probe.lstm, values, recorder)
        total = torch.stack([(_signs(output, generator) * output).sum() for output in outputs]).sum()
        return recorder.take(total) if outputs and total.requires_grad else {}


def _run_step(lstm: OnnxLSTM, values: Values, recorder: Recorder) -> list[Tensor]:
    """Run one step of an LSTM of single operators from the gates' observed sum; return h' and c' [N, H]."""
    x, h, gates, cell = (_rows(values[role]) for role in ("x", "h", "gates", "cell"))
    if not len(x) == len(h) == len(gates):
        raise SlimLSTMError(
            f"{lstm.name}: 'fisher' needs the inputs of every step, but x·W has {len(x)} rows and h·R has {len(h)}; take "
            "'activation', or leave it out with filter="
        )
    x, h, cell = (rows.expand(len(gates), -1).repeat(DRAWS, 1) for rows in (x, h, cell))
    probe = recorder.probe(x, gates.shape[1])
    recorder.add(_keys(lstm), (x, h), probe)
    in_order = reordered(gates.T, PYTORCH, lstm.gates).T.repeat(DRAWS, 1)
    unused = torch.empty(0)
    return list(step(in_order + probe, cell, Direction(unused, unused, None, None, None)))


def _run_operator(probe: Probe, values: Values, recorder: Recorder) -> list[Tensor]:
    """Run an LSTM operator by the reference recurrence; return the outputs that the model reads."""
    lstm = probe.lstm
    _check_plain(lstm)
    outputs: list[Tensor] = []
    for call in _calls(values):
        rows, sizes, order = _packed(call)
        if not sizes:
            continue
        for index, ending in enumerate(_endings(lstm)):
            weights = _direction(lstm, ending)
            h0, c0 = (state[index][order].repeat_interleave(DRAWS, 0) for state in (call.h0, call.c0))
            gates = product(rows, weights.ih, weights.bias_ih)
            shift = recorder.probe(gates, gates.shape[1])
            y, h, c = recurrence(gates + shift, sizes, h0, c0, weights, ending == "_reverse")
            padded = _padded(y.detach(), sizes)
            counts = torch.tensor([sum(size > at for size in sizes) for at in range(sizes[0])])
            counted = torch.arange(len(sizes))[:, None] < counts[None]
            before = states_before(padded, h0, counts, ending == "_reverse")[counted]
            recorder.add(_keys(lstm, ending), (rows, before), shift)
            outputs += [(y, h, c)[output] for output in probe.used]
    return outputs


def _packed(call: _Call) -> tuple[Tensor, list[int], Tensor]:
    """Return x as packed rows [N, I] with every sequence ``DRAWS`` times, the number of sequences at every step, and the
    order of the sequences."""
    order = call.lengths.argsort(descending=True, stable=True)
    order = order[call.lengths[order] > 0]
    lengths = call.lengths[order].repeat_interleave(DRAWS)
    counted = torch.arange(len(call.x))[:, None] < lengths[None]
    sizes = [int(size) for size in counted.sum(1) if size]
    return call.x[:, order].repeat_interleave(DRAWS, 1)[counted], sizes, order


def _padded(rows: Tensor, sizes: list[int]) -> Tensor:
    padded = rows.new_zeros(len(sizes), sizes[0], rows.shape[1])
    padded[torch.arange(sizes[0])[None] < torch.tensor(sizes)[:, None]] = rows
    return padded


def _check_plain(lstm: OnnxLSTM) -> None:
    """Raise :class:`SlimLSTMError` if the operator has features that PyTorch's LSTM lacks, or an unknown bias."""
    problem = peculiarity_of(lstm.node) or ("a bias that is no constant of the file" if lstm.has_computed_bias else "")
    if problem:
        raise SlimLSTMError(
            f"{lstm.name} has {problem}, through which 'fisher' cannot differentiate; take 'activation', or leave it out "
            "with filter="
        )


def _direction(lstm: OnnxLSTM, ending: str) -> Direction:
    """Return the weights of one direction in float64."""
    matrices = {location.name: rebuilt(location.matrix).double() for location in lstm.locations}
    biases = {name: bias.double() for name, bias in lstm.biases.items()}
    ih, hh = (matrices[f"weight_{kind}_l0{ending}"] for kind in ("ih", "hh"))
    return Direction(ih, hh, biases.get(f"bias_ih_l0{ending}"), biases.get(f"bias_hh_l0{ending}"), None)


def _calls(values: Values) -> Iterator[_Call]:
    """Yield every call of an operator; values inside a Loop or Scan have one more first axis for the iterations of each."""
    y = torch.from_numpy(np.asarray(values["y"])).double()
    y = y.reshape(-1, *y.shape[-4:])
    x = torch.from_numpy(np.asarray(values["x"])).double()
    x = x.reshape(-1, *x.shape[-3:])
    for index, (x_of, y_of) in enumerate(zip(x, y, strict=True)):
        steps, directions, batch, hidden = y_of.shape
        states: list[Tensor] = []
        for role in ("h0", "c0"):
            shape = -1, directions, batch, hidden
            given = torch.from_numpy(np.asarray(values[role])).double().reshape(shape) if role in values else None
            states.append(y_of.new_zeros(shape[1:]) if given is None else given[index])
        lengths = torch.full((batch,), steps)
        if "lengths" in values:
            lengths = torch.from_numpy(np.asarray(values["lengths"])).long().reshape(-1, batch)[index]
        yield _Call(x_of, y_of, lengths, *states)


def _endings(lstm: OnnxLSTM) -> list[str]:
    return [one.name.removeprefix("weight_hh_l0") for one in lstm.locations if one.name.startswith("weight_hh")]


def _keys(lstm: OnnxLSTM, ending: str = "") -> Keys:
    return f"{lstm.name}.weight_ih_l0{ending}", f"{lstm.name}.weight_hh_l0{ending}"


def _rows(array: NDArray[Any]) -> Tensor:
    values = torch.from_numpy(np.asarray(array)).double()
    return values.reshape(-1, values.shape[-1])


def _signs(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
