"""Factors fitted again to what really goes into them once the whole model is compressed.

What is lost below a matrix and at earlier steps reaches it as other inputs: z' in the place of the dense model's z. With
z = [x; h] and W = [W_ih W_hh] of one direction, what its gates should be is W z, and what they can be is W' z'. So each
matrix is replaced by the ridge regression of what it should give on its own z', the other matrix being as it is, and that
is truncated to its rank in the metric of its method: a reduced-rank regression (Izenman 1975) on the moments E[z' z'ᵀ] and
E[z z'ᵀ]. Changed inputs were taken into account in the same spirit, one layer after another, for convolutional networks
by Zhang et al. (2016); recurrences have no order of layers in which their own inputs could be known, so that all matrices
are fitted at once and passes are repeated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from slimlstm.calibration.observe import Keys, Loss, Recorder, Rows, call, checked_losses, observed_losses, observing
from slimlstm.errors import SlimLSTMError
from slimlstm.methods.factorize import DAMPING
from slimlstm.modules.hosts import Host
from slimlstm.ops.dense import rebuilt
from slimlstm.ops.weights import Matrix

Solve = Callable[[Tensor, Tensor], Matrix]
"""Takes a matrix B [m, n] and the moment A [n, n] of its inputs; returns what stands for B, as factors or rounded."""

_ALTERNATIONS = 2
_HELD_OUT = 5
"""Of so many batches the last one judges; of fewer all do."""


class ControlFlowError(SlimLSTMError):
    """The compressed model did not call its LSTMs as the dense one did."""


def refit(
    model: nn.Module,
    hosts: list[Host],
    weights: Mapping[str, Matrix],
    solvers: Mapping[str, Solve],
    batches: Iterable[Any],
    loss: Loss | None,
    passes: int,
) -> tuple[int, dict[str, Matrix]]:
    """Fits the matrices of the ``solvers`` again in every pass over the batches; the model itself does not change.

    Args:
        model: the dense model, with its ``hosts``.
        weights: what stands for the matrices that are compressed, by key; all others are the model's own.
        solvers: make what stands for a matrix of what it should be now; by the keys of the matrices to be fitted.
        batches, loss: as of :func:`slimlstm.calibrate`; both models see every batch. A loss that carries something from
            batch to batch, such as a state, has ``state_dict`` and ``load_state_dict``, so that each model gets its own.
            With a loss, the last fifth of the batches is not fitted to but decides; fewer than five do both.

    Returns:
        After how many passes the loss on the deciding batches was lowest, or of distributions the divergence from the dense
        model's, and what stood for all matrices then. Without a loss those are all passes.

    Raises:
        ControlFlowError: how often an LSTM is called depends on its weights, so that rows cannot be paired.
        SlimLSTMError: as :func:`slimlstm.calibrate`.
    """
    matrices = {site.key: host.matrix(site.name).double() for host in hosts for site in host.sites()}
    now, lowest, best = dict(weights), math.inf, (0, dict(weights))
    fitting, judging = _shared_out(batches, loss)
    for number in range(passes + 1):
        is_last = number == passes
        if is_last and loss is None:
            return number, now
        seen, cost = _moments(model, hosts, now, batches, loss, range(0) if is_last else fitting, judging)
        if cost < lowest:
            lowest, best = cost, (number, now)
        if not is_last:
            now = _fitted(seen, matrices, now, solvers)
    return best


def _shared_out(batches: Iterable[Any], loss: Loss | None) -> tuple[range, range]:
    """The numbers of the batches to fit to, and of those that decide whether that was good."""
    count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    held_out = count // _HELD_OUT if loss is not None else 0
    return range(count - held_out), range(count - held_out if held_out else 0, count)


def _fitted(
    seen: Mapping[Keys, _Moments], matrices: Mapping[str, Tensor], now: Mapping[str, Matrix], solvers: Mapping[str, Solve]
) -> dict[str, Matrix]:
    after = dict(now)
    for keys, moments in seen.items():
        for _ in range(_ALTERNATIONS):
            # hh first: it sees what was lost at every step before.
            for index in (1, 0):
                if keys[index] in solvers:
                    current = [_of(key, after, matrices) for key in keys]
                    fitted = moments.regression([matrices[key] for key in keys], current, index)
                    after[keys[index]] = solvers[keys[index]](*fitted)
    return after


def _of(key: str, weights: Mapping[str, Matrix], matrices: Mapping[str, Tensor]) -> Tensor:
    return rebuilt(weights[key]).detach().double() if key in weights else matrices[key]


class _Moments:
    """Sums over N rows of z' z'ᵀ and z z'ᵀ [I + P, I + P], with z = [x; h] of the dense model and z' of the compressed."""

    def __init__(self, inputs: int, size: int) -> None:
        self.rows = 0
        self.own = self.cross = torch.zeros(size, size, dtype=torch.float64)
        self.parts = slice(0, inputs), slice(inputs, size)

    def add(self, dense: Rows, compressed: Rows) -> None:
        z, own = torch.cat(dense.inputs, dim=1), torch.cat(compressed.inputs, dim=1)
        if z.dtype != torch.float64:
            z, own = z.float(), own.float()
        if dense.reached is not None:
            z, own = z[dense.reached], own[dense.reached]
        self.rows += len(z)
        self.own = self.own.to(z.device) + (own.T @ own).double()
        self.cross = self.cross.to(z.device) + (z.T @ own).double()

    def regression(self, dense: list[Tensor], now: list[Tensor], index: int) -> tuple[Tensor, Tensor]:
        """B [m, n] for ih (0) or hh (1), and the moment A of its inputs.

        B minimises E‖W z - W'_other z'_other - B z'_own‖² + λ ‖B - W_own‖². What N rows cannot tell about n inputs is left
        at W by λ = (``DAMPING`` + n / N) times the mean of A's diagonal.
        """
        own, other = self.parts[index], self.parts[1 - index]
        moment = self.own[own, own] / self.rows
        wanted = (torch.cat(dense, dim=1) @ self.cross[:, own] - now[1 - index] @ self.own[other, own]) / self.rows
        n = len(moment)
        strength = (DAMPING + n / self.rows) * float(moment.diagonal().mean()) or 1.0
        damped = moment + strength * torch.eye(n, dtype=moment.dtype, device=moment.device)
        return torch.linalg.solve(damped, (wanted + strength * dense[index]).T).T, damped


def _moments(
    model: nn.Module,
    hosts: list[Host],
    weights: Mapping[str, Matrix],
    batches: Iterable[Any],
    loss: Loss | None,
    fitting: range,
    judging: range,
) -> tuple[dict[Keys, _Moments], float]:
    """What both models see in the batches of ``fitting``, row by row, without rows that the dense one's loss does not
    depend on; and the mean cost of the compressed one in those of ``judging``."""
    models = _Observed(model, hosts, {}, loss), _Observed(model, hosts, weights, loss)
    found: dict[Keys, _Moments] = {}
    costs: list[Tensor] = []
    with torch.random.fork_rng():
        for number, batch in enumerate(batches):
            if number not in fitting and number not in judging and not models[0].carries:
                continue
            with_gradients = loss is not None and number in fitting
            dense, compressed = models[0].run(number, batch, with_gradients), models[1].run(number, batch, False)
            if {keys: len(rows.inputs[0]) for keys, rows in dense.items()} != {
                keys: len(rows.inputs[0]) for keys, rows in compressed.items()
            }:
                raise ControlFlowError("the number of steps that an LSTM takes depends on its weights")
            for keys, rows in dense.items() if number in fitting else ():
                if keys not in found:
                    inputs, outputs = (part.shape[1] for part in rows.inputs)
                    found[keys] = _Moments(inputs, inputs + outputs)
                found[keys].add(rows, compressed[keys])
            if loss is not None and number in judging:
                costs.append(_costs(models[0].result, models[1].result).detach().double().flatten())
    cost = float(torch.cat(costs).mean()) if costs else 0.0
    return {keys: moments for keys, moments in found.items() if moments.rows}, cost


def _costs(dense: object, compressed: object) -> Tensor:
    """The compressed model's losses, or how far the distribution that it predicts is from the dense one's."""
    if not isinstance(dense, Distribution) or not isinstance(compressed, Distribution):
        return checked_losses(compressed)
    try:
        return kl_divergence(dense, compressed)
    except NotImplementedError:
        return -compressed.log_prob(dense.sample())


class _Observed:
    """The model by certain weights, what the loss carries for it from batch to batch, and its last result."""

    result: object = None

    def __init__(self, model: nn.Module, hosts: list[Host], weights: Mapping[str, Matrix], loss: Loss | None) -> None:
        self._model, self._hosts, self._weights, self._loss = model, hosts, weights, loss
        self.carries = hasattr(loss, "state_dict") and hasattr(loss, "load_state_dict")
        self._carried = self._state()

    def run(self, number: int, batch: Any, with_gradients: bool) -> dict[Keys, Rows]:
        torch.manual_seed(number)
        if self.carries:
            getattr(self._loss, "load_state_dict")(self._carried)
        recorder = Recorder(with_gradients)
        with observing(self._model, self._hosts, recorder, self._weights), torch.set_grad_enabled(with_gradients):
            if self._loss is None:
                call(self._model, batch)
            else:
                self.result = self._loss(self._model, batch)
            rows = recorder.take(observed_losses(self.result)[0].sum() if with_gradients else None)
        self._carried = self._state()
        return rows

    def _state(self) -> Any:
        # What is returned may be the very object that the next batch changes.
        return copy.deepcopy(getattr(self._loss, "state_dict")()) if self.carries else None
