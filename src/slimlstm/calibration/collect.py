"""Run batches through a model to collect the moments of its sites, or its mean loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from slimlstm.calibration.losses import Loss, LossState, call, checked_losses, copied, observed_losses
from slimlstm.calibration.moments import Calibration, Moments
from slimlstm.calibration.observe import observable_hosts, observing
from slimlstm.calibration.recorder import Keys, Recorder, Rows
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.arguments import check_batches, check_loss, check_model
from slimlstm.modules.modes import ambient_defaults, evaluation_mode, plain_mode
from slimlstm.modules.state import kept_state
from slimlstm.progress import Progress, counted, shown

_BLOCK = 512
"""Columns in a block of a moment, and rows that are summed at once where batches have fewer."""
_MOST_DRAWS = 8
"""How often gradients are drawn from predicted distributions at most."""
_ROWS_WANTED = 4
"""Effective rows for each direction of a matrix, below which gradients are drawn again."""
NO_BATCH = "no batch was given; if the batches came from an iterator, it may have been used up before"


@plain_mode()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Run ``batches`` through the model in evaluation mode and collect the moments of all its sites.

    Neither parameters nor their ``.grad`` change, and memory does not grow with the number of batches. Gradients flow back
    in time as far as a batch reaches.

    Args:
        model: any module with LSTMs, dense or compressed.
        batches: an iterable of batches; each is passed to ``loss``.
        loss: takes the model and a batch; see :data:`slimlstm.calibration.losses.Loss`. Labels drawn from a distribution
            give the true Fisher information, observed labels the empirical one. Where most of the gradients come from few
            predictions, the batches run again for more draws, up to eight times in all, unless they are an iterator; a
            loss that carries a state from batch to batch then needs ``state_dict`` and ``load_state_dict``. Without a
            loss, the model is called on each batch (a tuple or list gives its arguments, a mapping its named arguments),
            and only inputs are recorded, which is enough for ``"activation"``.
        seed: the seed for drawing labels.
        progress: called after every batch with its number in words and the fraction done, which is NaN where the number of
            batches is unknown; None draws a bar on a terminal.

    Returns:
        The moments of every site that a batch reached, and the mean loss.

    Raises:
        SlimLSTMError: the model holds no LSTM that can be observed, no batch was given, the loss returned no finite losses
            or does not depend on the LSTMs, or an LSTM's inputs are not finite.

    Examples:
        >>> model = nn.Sequential(nn.LSTM(3, 4))
        >>> found = calibrate(model, [torch.randn(5, 2, 3)], lambda model, batch: model(batch)[0].square())
        >>> {key: tuple(moments.inputs.shape) for key, moments in found.sites.items()}
        {'0.weight_ih_l0': (3, 3), '0.weight_hh_l0': (4, 4)}
        >>> found.predictions
        40
    """
    check_model(model)
    check_batches(batches)
    if loss is not None:
        check_loss(loss)
    recorder, sums = Recorder(loss is not None), dict[Keys, MomentSums]()
    with (
        shown("calibrating", progress) as report_progress,
        observing(model, observable_hosts(model), recorder),
        torch.random.fork_rng(),
        ambient_defaults(),
    ):
        torch.manual_seed(seed)
        found, draws = _collect(model, counted(batches, report_progress), loss, recorder, sums), 1
        while found.is_drawn and not isinstance(batches, Iterator) and draws < _MOST_DRAWS and _are_scarce(sums):
            again = counted(batches, report_progress, f"draw {draws + 1}, batch")
            if not _collect(model, again, loss, recorder, sums, is_again=True).batches:
                break  # the batches came from a stream
            draws += 1
    if not found.batches:
        raise SlimLSTMError(NO_BATCH)
    mean = found.total / found.predictions if found.predictions else None
    return Calibration(moments_of(sums), mean, found.predictions, found.is_scaled)


@dataclass
class _Pass:
    """Result of one pass over all batches.

    Attributes:
        batches: the number of batches.
        total: the sum of all losses.
        predictions: the number of losses.
        is_scaled: False where a batch's loss was a single mean.
        is_drawn: whether the labels of any batch were drawn from a distribution.
    """

    batches: int = 0
    total: float = 0.0
    predictions: int = 0
    is_scaled: bool = True
    is_drawn: bool = False


def _collect(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    recorder: Recorder,
    sums: dict[Keys, MomentSums],
    *,
    is_again: bool = False,
) -> _Pass:
    """Run the batches, and add their rows to the sums; with ``is_again`` only the gradients, as another draw."""
    found = _Pass()
    with LossState(loss).kept(), kept_state(model):
        for batch in batches:
            found.batches += 1
            for keys, rows in _run(model, batch, loss, recorder, found).items():
                sums.setdefault(keys, MomentSums()).add(rows, is_again=is_again)
    return found


def _run(model: nn.Module, batch: Any, loss: Loss | None, recorder: Recorder, found: _Pass) -> dict[Keys, Rows]:
    """Run one batch, add its losses to ``found``, and return its rows."""
    if loss is None:
        with torch.no_grad():
            call(model, copied(batch))
        return recorder.take(None)
    with torch.enable_grad():
        result = loss(model, copied(batch))
        losses, is_scaled = observed_losses(result)
        rows = recorder.take(losses.sum())
    found.total += float(losses.detach().double().sum())
    found.predictions += losses.numel()
    found.is_scaled = found.is_scaled and is_scaled
    found.is_drawn = found.is_drawn or isinstance(result, Distribution)
    return rows


def _are_scarce(sums: Mapping[Keys, MomentSums]) -> bool:
    """Return whether the gradients of some matrix come from too few effective rows for its number of directions."""
    for entry in sums.values():
        effective = entry.effective_rows
        if effective is not None and 0 < effective < _ROWS_WANTED * entry.directions:
            return True
    return False


@plain_mode()
def mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss) -> float | None:
    """Return the mean of the losses of all batches in evaluation mode; the model's own mode is restored.

    Args:
        model: any module.
        batches: an iterable of batches; each is passed to ``loss``.
        loss: takes the model and a batch; see :data:`slimlstm.calibration.losses.Loss`.

    Returns:
        The mean loss, or None where the loss returns a distribution: labels are then sampled for each model, so losses of
        different models are not comparable.

    Raises:
        SlimLSTMError: no batch was given, or the loss returned no finite losses.

    Examples:
        >>> mean_loss(nn.Identity(), [torch.tensor([1.0, 2.0]), torch.tensor([6.0])], lambda model, batch: model(batch))
        3.0
    """
    total, count = 0.0, 0
    with (
        LossState(loss).kept(),
        kept_state(model),
        shown("measuring the loss") as report,
        evaluation_mode(model),
        torch.no_grad(),
        ambient_defaults(),
    ):
        for batch in counted(batches, report):
            result = loss(model, copied(batch))
            if isinstance(result, Distribution):
                return None
            losses = checked_losses(result)
            total, count = total + float(losses.double().sum()), count + losses.numel()
    if not count:
        raise SlimLSTMError(NO_BATCH)
    return total / count


class MomentSums:
    """Sums of z zᵀ for every matrix of a group, and of δ δᵀ, ‖δ‖² and ‖δ‖⁴, over rows."""

    def __init__(self) -> None:
        self.rows = self.drawn_rows = 0
        self.squares = self.fourths = 0.0
        self._inputs: list[_SquareSum] = []
        self._gradients: _SquareSum | None = None

    def add(self, rows: Rows, *, is_again: bool = False) -> None:
        """Add the rows that receive a gradient, or all rows where no gradients are known.

        Args:
            rows: the rows of one batch.
            is_again: whether the inputs were added before, so that only the gradients are new.
        """
        inputs, gradients, reached = list(rows.inputs), rows.gradients, rows.reached
        if gradients is not None and reached is not None and not bool(reached.all()):
            inputs, gradients = [values[reached] for values in inputs], gradients[reached]
        self.drawn_rows += len(inputs[0])
        if not is_again:
            self.rows += len(inputs[0])
            self._inputs = self._inputs or [_SquareSum(values) for values in inputs]
            for entry, values in zip(self._inputs, inputs, strict=True):
                entry.add(values)
        if gradients is not None:
            self._gradients = self._gradients or _SquareSum(gradients)
            self._gradients.add(gradients)
            sizes = gradients.detach().float().square().sum(dim=1).double()
            self.squares, self.fourths = self.squares + float(sizes.sum()), self.fourths + float(sizes.square().sum())

    @property
    def inputs(self) -> list[Tensor]:
        """Σ z zᵀ [n, n] for every matrix, in float64."""
        return [entry.total() for entry in self._inputs]

    @property
    def gradients(self) -> Tensor | None:
        """Σ δ δᵀ [m, m] in float64, or None without gradients."""
        return None if self._gradients is None else self._gradients.total()

    @property
    def directions(self) -> int:
        """The directions of the group's largest matrix, min(m, n)."""
        m = 0 if self._gradients is None else self._gradients.width
        return max(min(m, entry.width) for entry in self._inputs)

    @property
    def effective_rows(self) -> float | None:
        """(Σ ‖δ‖²)² / Σ ‖δ‖⁴: so many rows of equal gradients would hold as much information. None without gradients."""
        return None if self._gradients is None else self.squares**2 / self.fourths if self.fourths > 0 else 0.0


class _SquareSum:
    """The sum Σ v vᵀ over the rows v of many batches.

    Args:
        like: rows [N, width] of the first batch, of the dtype and on the device of all rows.
    """

    def __init__(self, like: Tensor) -> None:
        self.width = like.shape[1]
        self._block = like.new_empty(_BLOCK, self.width, dtype=torch.promote_types(like.dtype, torch.float32))
        self._filled = 0
        self._total = like.new_zeros(self.width, self.width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows [N, width]; few of them wait for more, because their product takes as long as one of a block."""
        rows = rows.detach()
        if len(rows) >= _BLOCK:
            self._total += _square(rows)
            return
        if self._filled + len(rows) > _BLOCK:
            self._empty()
        self._block[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def total(self) -> Tensor:
        """Return the sum [width, width] in float64."""
        self._empty()
        return self._total

    def _empty(self) -> None:
        if self._filled:
            self._total += _square(self._block[: self._filled])
            self._filled = 0


def moments_of(sums: Mapping[Keys, MomentSums]) -> dict[str, Moments]:
    """Return the moments of every matrix of every group that saw a row, by key.

    Raises:
        SlimLSTMError: a sum is not finite.
    """
    found: dict[str, Moments] = {}
    for keys, entry in sums.items():
        if entry.rows == 0:
            continue
        total = entry.gradients
        gradients = None if total is None else total / entry.drawn_rows
        for key, inputs in zip(keys, entry.inputs, strict=True):
            if not all(bool(torch.isfinite(tensor).all()) for tensor in (inputs, gradients) if tensor is not None):
                raise SlimLSTMError(f"the inputs of {key}, or their gradients, are not finite; check the batches")
            found[key] = Moments(inputs / entry.rows, gradients, entry.rows, entry.effective_rows)
    return found


def _square(rows: Tensor) -> Tensor:
    """Return Σ v vᵀ over the rows v of a matrix, in float64.

    The sum over the rows given here is computed in float32, unless they are in float64.
    """
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if rows.shape[1] < 2 * _BLOCK:
        return (rows.T @ rows).double()
    # The result is symmetric: one triangle of blocks is enough.
    found = rows.new_empty(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for start in range(0, rows.shape[1], _BLOCK):
        own = slice(start, start + _BLOCK)
        found[own, start:] = rows[:, own].T @ rows[:, start:]
        found[start:, own] = found[own, start:].T
    return found
