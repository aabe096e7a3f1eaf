"""Measure the mean loss of a model with other matrices, on held-out batches; the model does not change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimlstm.calibration.collect import NO_BATCH
from slimlstm.calibration.losses import Loss, LossState, copied, costs_of
from slimlstm.calibration.observe import build_like, forwards_replaced, key_of
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.host import Host
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.modes import ambient_defaults, evaluation_mode, plain_mode, uncompiled
from slimlstm.modules.state import KeptState, kept_state
from slimlstm.ops.weights import Matrix

_WARM_UP = 2
"""Number of batches to run before the first one that counts, for losses that carry a state."""


class _State(NamedTuple):
    """The states of the loss and of the model before a batch."""

    loss: Any
    model: KeptState


class ModuleJudge:
    """Measures the mean loss of a module with certain matrices.

    Where the loss returns a distribution, the cost is the divergence from the uncompressed model's distribution.

    Args:
        model: the uncompressed model.
        hosts: its hosts that may hold other matrices.
        batches: an iterable that can be iterated more than once.
        loss: as for :func:`slimlstm.calibrate`. A loss that carries a state from batch to batch has ``state_dict`` and
            ``load_state_dict``; each model keeps its own.
        held_out: the numbers of the batches that count. They are kept from the first pass on, so that all matrices are
            measured on the same batches, even if the iterable shuffles them.
    """

    def __init__(
        self, model: nn.Module, hosts: Sequence[Host], batches: Iterable[Any], loss: Loss, held_out: range
    ) -> None:
        self._model, self._hosts, self._batches, self._loss = model, hosts, batches, loss
        self._held_out = held_out
        self._loss_state = LossState(loss)
        self._first: _State | None = None
        self._kept: list[tuple[int, Any]] | None = None

    @plain_mode()
    def cost(self, weights: Mapping[str, Matrix]) -> float:
        """Return the mean cost with these matrices, by key; all others stay as they are.

        Raises:
            SlimLSTMError: no batch was given, or the loss returned no finite losses.
        """
        modules = [(host.lstm, made) for host in self._hosts if (made := _replaced(host, weights)) is not None]
        with (
            self._loss_state.kept(),
            uncompiled(),
            torch.random.fork_rng(),
            torch.no_grad(),
            evaluation_mode(self._model),
            kept_state(self._model) as state,
        ):
            found = [costs.double().flatten() for costs in self._costs(modules, state)]
        if not found:
            raise SlimLSTMError(NO_BATCH)
        return float(torch.cat(found).mean())

    def _costs(self, modules: Sequence[tuple[nn.Module, nn.Module]], state: KeptState) -> Iterable[Tensor]:
        if self._kept is None or self._first is None:
            self._kept, self._first = self._first_pass(state)
        dense = compressed = self._first
        for number, batch in self._kept:
            result, compressed = self._run(number, batch, modules, compressed)
            reference = result
            if modules and not isinstance(result, Tensor):
                reference, dense = self._run(number, batch, [], dense)
            yield costs_of(reference, result)

    def _first_pass(self, state: KeptState) -> tuple[list[tuple[int, Any]], _State]:
        """Return the batches that count, with their numbers, and the state before the first of them.

        A loss that carries a state first sees a few batches before them, with the uncompressed model.
        """
        kept: list[tuple[int, Any]] = []
        first = _State(self._loss_state.read(), state)
        for number, batch in enumerate(self._batches):
            if number in self._held_out:
                kept.append((number, batch))
            elif self._loss_state.exists and self._held_out.start - _WARM_UP <= number < self._held_out.start:
                _, first = self._run(number, batch, [], first)
        return kept, first

    def _run(
        self, number: int, batch: Any, modules: Sequence[tuple[nn.Module, nn.Module]], before: _State
    ) -> tuple[object, _State]:
        """Run one batch from a state; return the result and the next state."""
        torch.manual_seed(number)
        self._loss_state.restore(before.loss)
        before.model.restore()
        with forwards_replaced(modules), ambient_defaults():
            result = self._loss(self._model, copied(batch))
        return result, _State(self._loss_state.read(), before.model.now())


def _replaced(host: Host, weights: Mapping[str, Matrix]) -> LowRankLSTM | LowRankLSTMCell | None:
    """Return a module like the host's with these matrices in place of its own, or None where none belongs to the host."""
    path = host.paths[0]
    if not any(site.key in weights for site in host.sites()):
        return None
    return build_like(host, LowRankLSTM, LowRankLSTMCell, lambda name: weights.get(key_of(path, name), host.matrix(name)))
