"""One training run: steps, validations and checkpoints until the budget is used."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.modules.modes import evaluation_mode
from slimlstm.progress import Progress
from slimlstm.tuning.checkpoint import check_same_model, check_settings, read_checkpoint, write_checkpoint
from slimlstm.tuning.grid import Grid
from slimlstm.tuning.history import History, RunRecord
from slimlstm.tuning.losses import Loss, StatefulLoss, check_losses
from slimlstm.tuning.processes import Processes
from slimlstm.tuning.sampling import Batches, check_not_of_inference, own_batches, seed_with

_WARM_UP = 0.05
"""Fraction of the budget during which the learning rate rises."""
_LARGEST_NORM = 1.0
"""The norm that gradients are clipped to."""
_SECONDS_BETWEEN_WRITES = 60.0
"""Seconds between two checkpoints without a validation."""


@dataclass(frozen=True)
class Settings:
    """The numbers that decide a run; a checkpoint can be resumed only with the same ones.

    Raises:
        SlimLSTMError: a value out of range, or not exactly one of ``steps`` and ``minutes``.
    """

    steps: int | None
    minutes: float | None
    lr: float
    validations: int
    patience: int | None
    dtype: torch.dtype | None
    seed: int

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise SlimLSTMError("a run needs one budget: give either steps or minutes")
        for name, value in (("steps", self.steps), ("minutes", self.minutes), ("lr", self.lr)):
            _check_is_number(name, value)
            if value is not None and not 0 < value < math.inf:
                raise SlimLSTMError(f"{name} has to be above zero, not {value}")
        for name, value in (("validations", self.validations), ("patience", self.patience)):
            _check_is_number(name, value)
            if value is not None and value < 1:
                raise SlimLSTMError(f"{name} has to be at least 1, not {value}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {**vars(self), "dtype": str(self.dtype)}


def _check_is_number(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise SlimLSTMError(f"{name} has to be a number, not {value!r}")


class Run:
    """A training run of ``model``, whose ``trained`` parameters and buffers change."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss,
        trained: Mapping[str, nn.Parameter],
        settings: Settings,
        processes: Processes,
        validate: Callable[[nn.Module], float] | None,
        checkpoint: Path | None,
        progress: Progress,
    ) -> None:
        self.model, self.batches, self.loss, self.trained = model, batches, loss, trained
        self.settings, self.processes = settings, processes
        self.validate, self.checkpoint, self.progress = validate, checkpoint, progress
        dtype = settings.dtype
        self.autocast = nullcontext() if dtype is None else torch.autocast(processes.device.type, dtype)
        self.grid = Grid(model, trained)
        self.optimizer = torch.optim.AdamW(trained.values(), lr=settings.lr, weight_decay=0.0)
        self.record = RunRecord()
        self.norms = {name: float(tensor.detach().double().norm()) for name, tensor in self._tensors().items()}
        if any(norms != self.norms for norms in processes.gather(self.norms)):
            raise SlimLSTMError("the processes have different models; give each the same one, seeds included")
        self.best = _copies(self._tensors())
        self.seconds_at_last_write = -math.inf

    def go(self) -> History:
        """Train until the budget is used or patience ends."""
        record = self.record = self._resumed() or self.record
        began = time.monotonic() - record.seconds
        source = own_batches(self.batches, record, self.processes, self.settings.seed)
        while not record.stopped:
            record.seconds = self.processes.number_of_first(time.monotonic() - began)
            validated = self._validate_if_due()
            record.seconds = self.processes.number_of_first(time.monotonic() - began)
            record.stopped = self._reason_to_stop()
            if validated or record.stopped or record.seconds - self.seconds_at_last_write >= _SECONDS_BETWEEN_WRITES:
                self._write()
            if not record.stopped and self._fraction() < 1.0:
                self._step(next(source))
        if self.validate is not None:
            self.restore()
        return record.history(has_best_weights=self.validate is not None)

    def restore(self) -> None:
        """Give the model its best weights."""
        _fill(self._tensors(), self.best)

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors that training changes, by name."""
        in_state_dict = self.model.state_dict().keys()
        return {**self.trained, **{name: buffer for name, buffer in self.model.named_buffers() if name in in_state_dict}}

    def _fraction(self) -> float:
        """Return the fraction of the budget that is used; the budget includes the time of the last validation."""
        if self.settings.minutes is None:
            return self.record.step / (self.settings.steps or 1)
        seconds = 60.0 * self.settings.minutes - self.record.seconds_to_validate
        return min(1.0, self.record.seconds / seconds) if seconds > 0.0 else 1.0

    def _reason_to_stop(self) -> str:
        record, patience = self.record, self.settings.patience
        if self._fraction() >= 1.0 and (self.validate is None or record.validations[-1][0] == record.step):
            return "steps" if self.settings.minutes is None else "minutes"
        if patience is not None:
            since_best = sum(step > record.best_step for step, _ in record.validations)
            return "patience" if since_best >= patience else ""
        return ""

    def _validate_if_due(self) -> bool:
        record, mark = self.record, int(self._fraction() * self.settings.validations)
        if self.validate is None or mark <= record.mark:
            return False
        began, value = time.monotonic(), self._validated(self.validate)
        if record.mark < 0:
            if not math.isfinite(value):
                raise SlimLSTMError(
                    f"validate returned {value} before the first step, so no later value could be better; it has to return "
                    "a finite number"
                )
            record.seconds_to_validate = self.processes.number_of_first(time.monotonic() - began)
        if value < record.best_value:
            record.best_step, record.best_value, self.best = record.step, value, _copies(self._tensors())
        record.mark = mark
        record.validations.append((record.step, value))
        return True

    def _validated(self, validate: Callable[[nn.Module], float]) -> float:
        """Return the value of ``validate``, which process 0 computes for all."""
        value = math.nan
        if self.processes.rank == 0:
            with evaluation_mode(self.model), torch.no_grad():
                found: object = validate(self.model)
            try:
                value = float(found)  # pyright: ignore[reportArgumentType]
            except (TypeError, ValueError):
                raise SlimLSTMError(
                    f"validate returned {type(found).__name__}; it has to return a number, lower being better"
                ) from None
        return self.processes.number_of_first(value)

    def _step(self, batch: Any) -> None:
        record, fraction, lr = self.record, self._fraction(), self.settings.lr
        check_not_of_inference(batch, "a batch holds tensors")
        seed_with(self.settings.seed, "step", record.step, self.processes.rank)
        self.optimizer.zero_grad()
        with self.autocast:
            losses = self.loss(self.model, batch)
        check_losses(losses)
        value = losses.mean()
        value.backward()
        mean = self.processes.average(self.trained.values(), value)
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), _LARGEST_NORM))
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise SlimLSTMError(
                f"at step {record.step} the loss is {mean} and the norm of its gradient {norm}; try a lower lr than {lr}. "
                "The model has the best weights of the steps before"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * _schedule(fraction)
        self.grid.leave()
        self.optimizer.step()
        self.grid.enter()
        record.losses.append(mean)
        if self.processes.rank == 0:
            best = "" if self.validate is None else f", best {record.best_value:.4f}"
            self.progress(f"step {record.step}: loss {mean:.4f}{best}", self._fraction())

    def _settings_of_file(self) -> dict[str, Any]:
        return {**self.settings.to_dict(), "validate": self.validate is not None, "processes": self.processes.count}

    def _write(self) -> None:
        if self.checkpoint is None:
            return
        self.seconds_at_last_write = self.record.seconds
        loss_states = self.processes.gather(self.loss.state_dict() if isinstance(self.loss, StatefulLoss) else None)
        if self.processes.rank:
            return
        content = {
            "settings": self._settings_of_file(),
            "norms": self.norms,
            "place": asdict(self.record),
            "tensors": {name: tensor.detach() for name, tensor in self._tensors().items()},
            "best": self.best,
            "exact": self.grid.exact,
            "optimizer": self.optimizer.state_dict(),
            "carried": loss_states,
        }
        write_checkpoint(self.checkpoint, content)

    def _resumed(self) -> RunRecord | None:
        """Restore model, optimizer and loss from the checkpoint and return its record; None without a checkpoint."""
        if self.checkpoint is None:
            return None
        content = self.processes.object_of_first(read_checkpoint(self.checkpoint) if self.processes.rank == 0 else None)
        if content is None:
            return None
        check_settings(self.checkpoint, content["settings"], self._settings_of_file())
        check_same_model(self.checkpoint, content, self._tensors(), self.norms)
        loss_state = content["carried"][self.processes.rank]
        if (content["carried"][0] is not None) != isinstance(self.loss, StatefulLoss):
            raise SlimLSTMError(
                f"{self.checkpoint} belongs to a run with another loss: only one of them has a state_dict; give the same "
                "loss, or name another file"
            )
        _fill(self._tensors(), content["tensors"])
        _fill(self.best, content["best"])
        _fill(self.grid.exact, content["exact"])
        self.optimizer.load_state_dict(content["optimizer"])
        if isinstance(self.loss, StatefulLoss):
            self.loss.load_state_dict(loss_state)
        record = RunRecord(**content["place"])
        self.seconds_at_last_write = record.seconds
        return record


def _schedule(fraction: float) -> float:
    """Return the factor of the learning rate after this fraction of the budget: a linear rise, then a cosine."""
    return min(1.0, 0.1 + 0.9 * fraction / _WARM_UP) * (1.0 + math.cos(math.pi * fraction)) / 2.0


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
