"""The observer of a PyTorch module, for :func:`slimlstm.calibration.refit.refit`."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slimlstm.calibration.losses import Loss, LossState, call, copied, costs_of, observed_losses
from slimlstm.calibration.observe import observing
from slimlstm.calibration.recorder import Keys, Recorder, Rows
from slimlstm.calibration.refit import Observation
from slimlstm.modules.host import Host
from slimlstm.modules.modes import ambient_defaults
from slimlstm.modules.state import KeptState, kept_state
from slimlstm.ops.weights import Matrix
from slimlstm.progress import count_of


class ModuleObserver:
    """Runs one model with its own and with compressed matrices, without changing it.

    Args:
        model: the uncompressed model.
        hosts: its hosts to observe.
        batches: an iterable that can be iterated more than once.
        loss: as for :func:`slimlstm.calibrate`, or None. A loss that carries a state from batch to batch has
            ``state_dict`` and ``load_state_dict``, so that each of the two models gets a state of its own. Where the loss
            returns a distribution, the cost is the divergence from the uncompressed model's distribution.
    """

    def __init__(self, model: nn.Module, hosts: Sequence[Host], batches: Iterable[Any], loss: Loss | None) -> None:
        self._model, self._hosts, self._batches, self._loss = model, hosts, batches, loss
        self._judging: dict[int, Any] = {}

    @property
    def batch_count(self) -> int:
        """The number of batches in one pass."""
        return count_of(self._batches)

    @property
    def has_costs(self) -> bool:
        """Whether a loss was given."""
        return self._loss is not None

    def observe(self, weights: Mapping[str, Matrix], fitting: range, judging: range) -> Generator[Observation]:
        """Yield the observations of one pass; see :class:`slimlstm.calibration.refit.Observer`."""
        with (
            LossState(self._loss).kept(),
            kept_state(self._model) as state,
            torch.random.fork_rng(),
        ):
            dense, compressed = (_Runner(self._model, self._hosts, own, self._loss, state) for own in ({}, weights))
            for number, batch in enumerate(self._batches):
                if number not in fitting and number not in judging and not dense.loss_state.exists:
                    continue
                # Judge on the same batches at every pass, even if the iterable shuffles them.
                given = self._judging.setdefault(number, batch) if number in judging else batch
                with_gradients = self._loss is not None and number in fitting
                rows = dense.run(number, given, with_gradients), compressed.run(number, given, False)
                is_judged = self._loss is not None and number in judging
                yield Observation(number, *rows, costs_of(dense.result, compressed.result) if is_judged else None)


class _Runner:
    """Runs the model with certain matrices, and keeps its own state of the model and of the loss, and its last result."""

    result: object = None

    def __init__(
        self,
        model: nn.Module,
        hosts: Sequence[Host],
        weights: Mapping[str, Matrix],
        loss: Loss | None,
        state: KeptState,
    ) -> None:
        self._state = state
        self._model, self._hosts, self._weights, self._loss = model, hosts, weights, loss
        self.loss_state = LossState(loss)
        self._carried = self.loss_state.read()

    def run(self, number: int, batch: Any, with_gradients: bool) -> dict[Keys, Rows]:
        """Run one batch and return its rows; its number is the seed, so that both models draw the same random numbers."""
        torch.manual_seed(number)
        self.loss_state.restore(self._carried)
        self._state.restore()
        batch = copied(batch)
        recorder = Recorder(with_gradients)
        with (
            observing(self._model, self._hosts, recorder, self._weights),
            torch.set_grad_enabled(with_gradients),
            ambient_defaults(),
        ):
            if self._loss is None:
                call(self._model, batch)
            else:
                self.result = self._loss(self._model, batch)
            rows = recorder.take(observed_losses(self.result)[0].sum() if with_gradients else None)
        self._carried, self._state = self.loss_state.read(), self._state.now()
        return rows
