"""``finetune``: a short run of training that gives a compressed model back what it lost; takes any ``nn.Module``."""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss

from slimlstm.errors import SlimLSTMError

Loss = Callable[[nn.Module, Any], Tensor]
Batches = Iterable[Any] | Callable[[int], Iterable[Any]]

_FORMAT = "slimlstm.tuning 1"
_WARM_UP = 0.05
_LARGEST_NORM = 1.0
_SECONDS_BETWEEN_WRITES = 60.0


@dataclass(frozen=True)
class History:
    """What a run did.

    Attributes:
        losses: the loss of every step, the mean over all processes.
        validations: after how many steps ``validate`` gave what; the first is of the model as it came.
        best_step: after how many steps the model had the weights that it has now.
        seconds: wall clock, that of earlier parts of a resumed run included.
        stopped: why the run ended: ``"steps"``, ``"minutes"`` or ``"patience"``.
    """

    losses: list[float]
    validations: list[tuple[int, float]]
    best_step: int
    seconds: float
    stopped: str

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """The history as JSON types."""
        return asdict(self) | {"steps": self.steps, "validations": [list(entry) for entry in self.validations]}


def finetune(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    lr: float = 3e-4,
    parameters: Iterable[nn.Parameter] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    validations: int = 10,
    patience: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> History:
    """Trains a compressed ``model`` in place for a number of steps or minutes: factors stay factors, masks stay on.

    AdamW without weight decay; the learning rate rises over the first twentieth of the budget and falls to zero at its end
    as a cosine; gradients are clipped to a norm of 1. The model is in training mode meanwhile, so that its own dropout
    acts. Modes, ``requires_grad`` and PyTorch's random numbers are afterwards what they were, and with ``validate``
    the model has the best weights that it saw, so that it never ends worse than it began; after an error or an interrupt
    likewise, or without ``validate`` the weights that it came with. Weights that are kept in int8 or bfloat16 are trained
    as the parameters they are, and have to be rounded again afterwards: ``compress_(model, Quantize(...))``.

    Launched by ``torchrun``, or in a process group of yours, the processes train together. All come with the same model, on
    a device of their own, and the same ``batches``, of which process k takes batch k, k + world size and so on; gradients
    are averaged, so that a step is one of a batch as many times larger. Process 0 validates, reports and writes.

    Args:
        batches: what ``loss`` takes, batch by batch, iterated anew for every epoch; or a function from the number of the
            epoch to such an iterable, endless ones too.
        loss: the losses of a batch's single predictions, of any shape, or their mean; :func:`distillation` makes it from
            the dense model. A loss that carries something from batch to batch, such as a language model's state, has
            ``state_dict`` and ``load_state_dict``, as modules have, so that a resumed run goes on with it.
        steps, minutes: the budget, one of the two. Minutes are wall clock, validations included.
        lr: the highest learning rate. Distillation, whose gradients are less noisy than those of labels, bears 1e-3.
        parameters: what to train; by default all that require gradients.
        validate: the value of the model in evaluation mode, lower being better.
        validations: how many times, evenly spread, ``validate`` is called beside once before the first step.
        patience: stop after so many validations in a row without a new best.
        dtype: ``torch.bfloat16`` computes under autocast; parameters and optimizer stay what they are.
        seed: of dropout and of whatever else draws PyTorch's random numbers, ``batches`` included.
        checkpoint: a file, written at every validation and every minute and replaced in one step. The same call with the
            same model, as it was before, goes on from there: after the same number of steps it has the same weights.
        progress: called with a line of text and the fraction done, after every step.

    Raises:
        SlimLSTMError: an argument that cannot be; a loss that is not finite or no tensor; batches that are empty or can be
            read only once; a checkpoint of another model or of other settings.
    """
    settings = {
        "steps": steps,
        "minutes": minutes,
        "lr": lr,
        "validations": validations,
        "patience": patience,
        "dtype": str(dtype),
        "seed": seed,
    }
    _check(batches, steps, minutes, lr, validations, patience)
    trained = _trained(model, parameters)
    device = next(iter(trained.values())).device
    processes = _processes(device)
    with _prepared(model, trained), _own_random_numbers(device):
        run = _Run(model, batches, loss, trained, settings, dtype, processes, validate, checkpoint, progress)
        try:
            run.go()
        except BaseException:
            run.restore()
            raise
    return run.history()


def distillation(teacher: nn.Module, outputs: Callable[[nn.Module, Any], Tensor], temperature: float | None = 1.0) -> Loss:
    """A loss for :func:`finetune`: how far ``outputs(model, batch)`` are from ``outputs(teacher, batch)``.

    ``teacher`` is put into evaluation mode. For the rest see :func:`divergence`.
    """
    teacher.eval()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            expected = outputs(teacher, batch)
        return divergence(outputs(model, batch), expected, temperature)

    return loss


def divergence(found: Tensor, expected: Tensor, temperature: float | None = 1.0) -> Tensor:
    """How far outputs [..., V] are from those expected, on average.

    Of logits it is T² KL(softmax(expected / T) ‖ softmax(found / T)), T being the temperature (Hinton, Vinyals and Dean
    2015, arXiv 1503.02531); where that is None, the squared difference of outputs of any kind.

    Raises:
        SlimLSTMError: the shapes differ, or the temperature is not above zero.
    """
    if found.shape != expected.shape:
        raise SlimLSTMError(f"outputs of {list(found.shape)} cannot be compared with {list(expected.shape)}")
    if temperature is None:
        return mse_loss(found.float(), expected.float())
    if not temperature > 0.0:
        raise SlimLSTMError(f"a temperature is above zero, or None for the squared difference, not {temperature}")
    ours, theirs = ((logits.float() / temperature).log_softmax(-1) for logits in (found, expected))
    return temperature**2 * kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()


@dataclass
class _Place:
    """How far a run is: ``position`` steps into the epoch, past ``mark`` of the points where it validates."""

    epoch: int = 0
    position: int = 0
    mark: int = -1
    best_step: int = 0
    best_value: float = math.inf
    seconds: float = 0.0
    seconds_to_validate: float = 0.0
    stopped: str = ""
    losses: list[float] = field(default_factory=list[float])
    validations: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])

    @property
    def step(self) -> int:
        return len(self.losses)


@dataclass(frozen=True)
class _Processes:
    """Those that train together, of which this one is ``rank``."""

    device: torch.device
    rank: int = 0
    count: int = 1

    def of_first(self, number: float) -> float:
        """The number that process 0 has."""
        if self.count == 1:
            return number
        box = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return float(box)

    def average(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> float:
        """The mean loss; the parameters' gradients become their means."""
        if self.count == 1:
            return float(loss.detach())
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.detach().reshape(1)])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, part in zip(gradients, flat[:-1].split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return float(flat[-1])

    def gathered(self, thing: Any) -> list[Any]:
        """What every process has."""
        things = [thing] * self.count
        if self.count > 1:
            dist.all_gather_object(things, thing)
        return things

    def from_first(self, thing: Any) -> Any:
        """What process 0 has."""
        things = [thing]
        if self.count > 1:
            dist.broadcast_object_list(things, 0, device=self.device)
        return things[0]


@runtime_checkable
class _Carrying(Protocol):
    """A loss that carries something from batch to batch."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class _Run:
    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss,
        trained: Mapping[str, nn.Parameter],
        settings: Mapping[str, Any],
        dtype: torch.dtype | None,
        processes: _Processes,
        validate: Callable[[nn.Module], float] | None,
        checkpoint: str | os.PathLike[str] | None,
        progress: Callable[[str, float], None] | None,
    ) -> None:
        self.model, self.batches, self.loss, self.trained = model, batches, loss, trained
        self.settings = {**settings, "validate": validate is not None, "processes": processes.count}
        self.autocast = nullcontext() if dtype is None else torch.autocast(processes.device.type, dtype)
        self.processes, self.validate, self.progress = processes, validate, progress
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.optimizer = torch.optim.AdamW(trained.values(), lr=settings["lr"], weight_decay=0.0)
        self.place = _Place()
        self.norms = {name: float(tensor.detach().double().norm()) for name, tensor in self._tensors().items()}
        if any(norms != self.norms for norms in processes.gathered(self.norms)):
            raise SlimLSTMError("the processes have different models; give each the same one, seeds included")
        self.best = _copies(self._tensors())
        self.written = -math.inf

    def go(self) -> None:
        place = self.place = self._resumed() or self.place
        began, source = time.monotonic() - place.seconds, self._dealt()
        while not place.stopped:
            place.seconds = self.processes.of_first(time.monotonic() - began)
            validated = self._validate_where_due()
            place.seconds = self.processes.of_first(time.monotonic() - began)
            place.stopped = self._reason_to_stop()
            if validated or place.stopped or place.seconds - self.written >= _SECONDS_BETWEEN_WRITES:
                self._write()
            if not place.stopped and self._fraction() < 1.0:
                self._step(next(source))
        if self.validate is not None:
            self.restore()

    def restore(self) -> None:
        """Gives the model the best weights."""
        _fill(self._tensors(), self.best)

    def history(self) -> History:
        place = self.place
        best = place.best_step if self.validate is not None else place.step
        return History(place.losses, place.validations, best, place.seconds, place.stopped)

    def _tensors(self) -> dict[str, Tensor]:
        """All that training changes."""
        kept = self.model.state_dict().keys()
        return {**self.trained, **{name: buffer for name, buffer in self.model.named_buffers() if name in kept}}

    def _fraction(self) -> float:
        """How much of the budget is used; the last validation is part of it."""
        if self.settings["minutes"] is None:
            return self.place.step / self.settings["steps"]
        seconds = 60.0 * self.settings["minutes"] - self.place.seconds_to_validate
        return min(1.0, self.place.seconds / seconds) if seconds > 0.0 else 1.0

    def _reason_to_stop(self) -> str:
        place, patience = self.place, self.settings["patience"]
        if self._fraction() >= 1.0 and (self.validate is None or place.validations[-1][0] == place.step):
            return "steps" if self.settings["minutes"] is None else "minutes"
        if patience is not None:
            since_best = sum(step > place.best_step for step, _ in place.validations)
            return "patience" if since_best >= patience else ""
        return ""

    def _validate_where_due(self) -> bool:
        place, mark = self.place, int(self._fraction() * self.settings["validations"])
        if self.validate is None or mark <= place.mark:
            return False
        began, value = time.monotonic(), math.nan
        if self.processes.rank == 0:
            self.model.eval()
            with torch.no_grad():
                value = float(self.validate(self.model))
            self.model.train()
        value = self.processes.of_first(value)
        if place.mark < 0:
            if not math.isfinite(value):
                raise SlimLSTMError(f"validate gives {value} before the first step; nothing could be found to be better")
            place.seconds_to_validate = self.processes.of_first(time.monotonic() - began)
        if value < place.best_value:
            place.best_step, place.best_value, self.best = place.step, value, _copies(self._tensors())
        place.mark = mark
        place.validations.append((place.step, value))
        return True

    def _dealt(self) -> Iterator[Any]:
        """This process' batch of every step from here on. Random numbers depend on the epoch and the place in it alone."""
        place, processes = self.place, self.processes
        while True:
            _seed(self.settings["seed"], "epoch", place.epoch)
            source, position = iter(self.batches(place.epoch) if callable(self.batches) else self.batches), 0
            while True:
                _seed(self.settings["seed"], "batch", place.epoch, position)
                dealt = list(islice(source, processes.count))
                if len(dealt) < processes.count:
                    break
                position += 1
                if position > place.position:
                    place.position = position
                    yield dealt[processes.rank]
            if position < max(place.position, 1):
                raise SlimLSTMError(
                    f"epoch {place.epoch} has {position * processes.count + len(dealt)} batches, but "
                    f"{max(place.position, 1) * processes.count} are needed; each epoch gives every process at least one, "
                    "and a resumed run the same ones as before"
                )
            place.epoch, place.position = place.epoch + 1, 0

    def _step(self, batch: Any) -> None:
        place, fraction = self.place, self._fraction()
        _seed(self.settings["seed"], "step", place.step, self.processes.rank)
        self.optimizer.zero_grad()
        with self.autocast:
            losses = self.loss(self.model, batch)
        _check_losses(losses)
        value = losses.mean()
        value.backward()
        mean = self.processes.average(self.trained.values(), value)
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), _LARGEST_NORM))
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise SlimLSTMError(
                f"at step {place.step} the loss is {mean} and the norm of its gradient {norm}; try a lower lr than "
                f"{self.settings['lr']}. The model has the best weights that it had before"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * _schedule(fraction)
        self.optimizer.step()
        place.losses.append(mean)
        if self.progress is not None and self.processes.rank == 0:
            best = "" if self.validate is None else f", best {place.best_value:.4f}"
            self.progress(f"step {place.step}: loss {mean:.4f}{best}", self._fraction())

    def _write(self) -> None:
        if self.checkpoint is None:
            return
        self.written = self.place.seconds
        carried = self.processes.gathered(self.loss.state_dict() if isinstance(self.loss, _Carrying) else None)
        if self.processes.rank:
            return
        content = {
            "format": _FORMAT,
            "settings": self.settings,
            "norms": self.norms,
            "place": asdict(self.place),
            "tensors": {name: tensor.detach() for name, tensor in self._tensors().items()},
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "carried": carried,
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_name(self.checkpoint.name + ".part")
        with part.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(self.checkpoint)

    def _resumed(self) -> _Place | None:
        """Where the checkpoint's run is, with the model and the optimizer brought there; None where there is none."""
        if self.checkpoint is None:
            return None
        content = self.processes.from_first(_read(self.checkpoint) if self.processes.rank == 0 else None)
        if content is None:
            return None
        self._check_is_ours(content)
        _fill(self._tensors(), content["tensors"])
        _fill(self.best, content["best"])
        self.optimizer.load_state_dict(content["optimizer"])
        if isinstance(self.loss, _Carrying):
            self.loss.load_state_dict(content["carried"][self.processes.rank])
        place = _Place(**content["place"])
        self.written = place.seconds
        return place

    def _check_is_ours(self, content: Mapping[str, Any]) -> None:
        for name, ours in self.settings.items():
            theirs = content["settings"][name]
            if theirs != ours:
                raise SlimLSTMError(
                    f"{self.checkpoint} is of a run with {name}={theirs}, not {ours}; go on with that, or name another file"
                )
        tensors = self._tensors()
        same = content["tensors"].keys() == tensors.keys() and all(
            content["tensors"][name].shape == tensor.shape
            # Factors that are computed again may differ in their last digits.
            and math.isclose(content["norms"][name], self.norms[name], rel_tol=1e-3, abs_tol=1e-9)
            for name, tensor in tensors.items()
        )
        if not same:
            raise SlimLSTMError(
                f"{self.checkpoint} is of a run that began with another model: names, shapes or weights differ; "
                "give the model as it was before that run, or name another file"
            )
        if (content["carried"][0] is not None) != isinstance(self.loss, _Carrying):
            raise SlimLSTMError(f"{self.checkpoint} is of a run with another loss: only one of the two has a state_dict")


def _check(
    batches: Batches, steps: int | None, minutes: float | None, lr: float, validations: int, patience: int | None
) -> None:
    if (steps is None) == (minutes is None):
        raise SlimLSTMError("a run has a budget: give either steps or minutes")
    for name, value in (("steps", steps), ("minutes", minutes), ("lr", lr)):
        if value is not None and not 0 < value < math.inf:
            raise SlimLSTMError(f"{name} has to be above zero, not {value}")
    for name, value in (("validations", validations), ("patience", patience)):
        if value is not None and value < 1:
            raise SlimLSTMError(f"{name} has to be at least 1, not {value}")
    if isinstance(batches, Iterator):
        raise SlimLSTMError(
            f"batches is a {type(batches).__name__}, which can be read only once; give something that can be iterated "
            "again for every epoch, or a function from the number of the epoch to its batches"
        )


def _trained(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> dict[str, nn.Parameter]:
    if parameters is None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    else:
        wanted = {id(parameter) for parameter in parameters}
        trained = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}
        if len(trained) < len(wanted):
            raise SlimLSTMError(
                f"{len(wanted) - len(trained)} of the {len(wanted)} parameters are not the model's; compress_ makes new "
                "ones, so ask for them after it"
            )
    if not trained:
        raise SlimLSTMError("the model has no parameter to train; name them in parameters, or let some require gradients")
    return trained


def _check_losses(losses: Any) -> None:
    if not isinstance(losses, Tensor):
        raise SlimLSTMError(f"loss has to return a tensor, losses or their mean, not {type(losses).__name__}")
    if not losses.requires_grad:
        raise SlimLSTMError("the loss does not depend on any parameter that is trained, or was computed without gradients")


def _schedule(fraction: float) -> float:
    """What part of the learning rate is used after this fraction of the budget."""
    return min(1.0, 0.1 + 0.9 * fraction / _WARM_UP) * (1.0 + math.cos(math.pi * fraction)) / 2.0


def _seed(*what: Any) -> None:
    torch.manual_seed(zlib.crc32(repr(what).encode()))


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file makes the unpickler stumble in many ways.
        raise SlimLSTMError(f"the checkpoint {path} cannot be read ({error}); delete it or name another file") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise SlimLSTMError(f"{path} is no checkpoint of finetune; name another file")
    return content


def _processes(device: torch.device) -> _Processes:
    """The process group that there is, or the one that ``torchrun`` means."""
    if not dist.is_available():
        return _Processes(device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        # It stays for later runs: a second one could not be started reliably.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return _Processes(device, dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else _Processes(device)


@contextmanager
def _prepared(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Generator[None, None, None]:
    """Training mode, and gradients for what is trained only."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.train()
        model.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        for parameter in trained.values():
            parameter.grad = None


@contextmanager
def _own_random_numbers(device: torch.device) -> Generator[None, None, None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
