"""Observe the inputs of recurrent matrices, and the gradients at their gates, while any model runs.

The model needs no changes. While it is observed, every LSTM computes by a plain recurrence, and a zero probe that is
added to its gates captures their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from slimlstm.calibration.recorder import Keys, Recorder, states_before
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.host import Host, parameter_names
from slimlstm.modules.hosts import find_hosts
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.modes import evaluation_mode, restoring, uncompiled
from slimlstm.modules.shapes import LSTMState, clips, lstm_arguments
from slimlstm.ops import training
from slimlstm.ops.reference import product, recurrence, step
from slimlstm.ops.weights import Direction, Matrix, is_clipped

AnyLSTM = TypeVar("AnyLSTM", bound=LowRankLSTM)
AnyCell = TypeVar("AnyCell", bound=LowRankLSTMCell)


def observable_hosts(model: nn.Module) -> list[Host]:
    """Return the hosts of the sites that can be observed.

    Raises:
        SlimLSTMError: the model has none.

    Examples:
        >>> [host.paths for host in observable_hosts(nn.Sequential(nn.LSTM(3, 4), nn.LSTM(4, 4)))]
        [['0'], ['1']]
    """
    hosts = [host for host in find_hosts(model) if host.problem is None]
    if not hosts:
        raise SlimLSTMError("the model holds no LSTM that can be calibrated; find_sites(model) lists its LSTMs and why not")
    return hosts


@contextmanager
def observing(
    model: nn.Module, hosts: Iterable[Host], recorder: Recorder, weights: Mapping[str, Matrix] | None = None
) -> Generator[None]:
    """Put the model in evaluation mode and let its LSTMs report to ``recorder`` within the block.

    Args:
        model: the model that will be called.
        hosts: its hosts to observe.
        recorder: receives the rows of every call.
        weights: matrices to compute with instead of the model's own, by key.
    """
    observers = ((host.lstm, _observer(host, recorder, weights or {})) for host in hosts)
    with uncompiled(), evaluation_mode(model), forwards_replaced(observers):
        yield


@contextmanager
def forwards_replaced(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> Generator[None]:
    """Give the first module of every pair the forward pass of the second within the block."""
    before: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    def restore() -> None:
        for module, forward in reversed(before):
            _set_forward(module, forward)

    with restoring(restore):
        for module, other in pairs:
            # The module itself stays in place, because the model's own code may hold references to it.
            before.append((module, vars(module).get("forward")))
            _set_forward(module, other.forward)
        yield


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Set the forward pass of one module; None restores its class's."""
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward


class _ObservedLSTM(LowRankLSTM):
    recorder: Recorder
    path: str

    def _run(self, x: Tensor, batch_sizes: Tensor | None, hx: LSTMState | None) -> tuple[Tensor, LSTMState]:
        sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else [int(size) for size in batch_sizes]
        if hx is None:
            shape = self.num_layers * self._directions, sizes[0] if sizes else 0
            hx = x.new_zeros(*shape, self.proj_size or self.hidden_size), x.new_zeros(*shape, self.hidden_size)
        h0, c0 = hx
        rows = x if batch_sizes is not None else x.flatten(0, 1)
        last: list[LSTMState] = []
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for suffix in self._suffixes(layer):
                index = len(last)
                output, state = self._run_direction(suffix, rows, sizes, (h0[index], c0[index]))
                outputs.append(output)
                last.append(state)
            rows = torch.cat(outputs, dim=-1)
        output = rows if batch_sizes is not None else rows.unflatten(0, x.shape[:2])
        return output, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))

    def _run_direction(self, suffix: str, rows: Tensor, sizes: list[int], state: LSTMState) -> tuple[Tensor, LSTMState]:
        """Run one layer and direction over packed rows [N, I], and record what its matrices see."""
        weights, reverse = self.direction(suffix), suffix.endswith("_reverse")
        probe = self.recorder.probe(rows, 4 * self.hidden_size)
        gates, first = product(rows, weights.ih, weights.bias_ih) + probe, state[0].detach()
        if weights.hr is None and not is_clipped([weights]) and len(set(sizes)) == 1:
            gates = gates if weights.bias_hh is None else gates + weights.bias_hh
            output, h, c = training.recurrence(gates.unflatten(0, (len(sizes), -1)), *state, weights.hh, reverse=reverse)
            lengths = torch.full((sizes[0],), len(sizes), device=output.device)
            before = states_before(output.detach(), first, lengths, reverse).flatten(0, 1)
            output = output.flatten(0, 1)
        else:
            output, h, c = recurrence(gates, sizes, *state, weights, reverse)
            before = _packed_states_before(output.detach(), sizes, first, reverse)
        # A copy, because the model may overwrite its inputs before they are counted.
        self.recorder.add(_keys(self.path, suffix), (rows.detach().clone(), before), probe)
        return output, (h, c)


class _ObservedCell(LowRankLSTMCell):
    recorder: Recorder
    path: str

    def _step(self, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Direction]) -> LSTMState:
        (own,) = weights
        probe = self.recorder.probe(x, 4 * self.hidden_size)
        # Copies, because the model's loop may overwrite its states.
        self.recorder.add(_keys(self.path, ""), (x.detach().clone(), h.detach().clone()), probe)
        gates = product(x, own.ih, own.bias_ih) + product(h, own.hh, own.bias_hh) + probe
        return step(gates, c, own)


def _observer(host: Host, recorder: Recorder, weights: Mapping[str, Matrix]) -> _ObservedLSTM | _ObservedCell:
    path = host.paths[0]

    def matrix(name: str) -> Matrix:
        return weights.get(key_of(path, name), host.matrix(name))

    observer = build_like(host, _ObservedLSTM, _ObservedCell, matrix)
    observer.recorder, observer.path = recorder, path
    return observer


def build_like(host: Host, lstm: type[AnyLSTM], cell: type[AnyCell], matrix: Callable[[str], Matrix]) -> AnyLSTM | AnyCell:
    """Build a module like the host's, of the class ``lstm`` or ``cell``, in evaluation mode, with frozen parameters.

    Args:
        host: the host to imitate.
        lstm: the class to build where the host is an LSTM.
        cell: the class to build where the host is a cell.
        matrix: takes the name of a parameter and returns the weight, as factors or dense.
    """
    old = cast(Any, host.lstm)
    if hasattr(old, "num_layers"):
        made = lstm(**lstm_arguments(old), **clips(old), device="meta")
    else:
        made = cell(old.input_size, old.hidden_size, old.bias, device="meta")
    for name in parameter_names(old):
        weight = matrix(name)
        if isinstance(weight, tuple):
            made.set_factors(name, *map(_frozen, weight))
        else:
            made.register_parameter(name, _frozen(weight))
    made.eval()
    return made


def _frozen(weight: Tensor) -> nn.Parameter:
    # Tensors from inference mode cannot be saved for a backward pass, but their copies can.
    weight = weight.detach()
    return nn.Parameter(weight.clone() if weight.is_inference() else weight, requires_grad=False)


def key_of(path: str, name: str) -> str:
    """Return the key of the matrix ``name`` of the module at ``path``."""
    return f"{path}.{name}" if path else name


def _keys(path: str, suffix: str) -> Keys:
    return key_of(path, f"weight_ih{suffix}"), key_of(path, f"weight_hh{suffix}")


def _packed_states_before(outputs: Tensor, sizes: list[int], first: Tensor, reverse: bool) -> Tensor:
    """Return :func:`states_before` for packed outputs [N, P], of ``sizes`` sequences at every step."""
    counts = torch.tensor(sizes, device=outputs.device)
    is_active = torch.arange(len(first), device=outputs.device) < counts[:, None]
    padded = outputs.new_zeros(*is_active.shape, outputs.shape[1])
    padded[is_active] = outputs
    return states_before(padded, first, is_active.sum(0), reverse)[is_active]
