"""Training of AWD-LSTM language models (Merity, Keskar and Socher 2018, arXiv 1708.02182), which can be interrupted.

Dimensions: T time steps, B streams.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from paper.checkpoints import (
    moments_of,
    read_tensors,
    restore_moments,
    with_prefix,
    without_prefix,
    write_tensors,
)
from paper.optimization import one_cycle, take_gradients
from paper.processes import Processes
from paper.runs import Pace, check_settings, seed, write_log
from paper.texts import EVALUATION_STREAMS, side_by_side
from slimlstm.demo.awd_lstm import AWDLSTM, LSTMStates
from slimlstm.evaluate import perplexity
from slimlstm.tuning.grid import Grid

OPTIMIZERS = {"ntasgd": 30.0, "asgd": 30.0, "adamw": 3e-3}
"""Learning rate by optimizer: SGD that turns into averaged SGD, averaged SGD, AdamW with one cycle and averages."""
CLIP, ALPHA, BETA, WEIGHT_DECAY, PATIENCE = 0.25, 2.0, 1.0, 1.2e-6, 5
WARM_UP = 0.1
AVERAGED_STEPS = 300
"""Time constant in steps of AdamW's exponential average of the weights, which is good before the cycle has ended."""


@dataclass(frozen=True)
class TrainingOptions:
    """Choices that a training's result depends on.

    Attributes:
        optimizer: a name in :data:`OPTIMIZERS`.
        lr: its peak learning rate.
        epochs: at most; the whole cycle of AdamW.
        bptt: mean length in tokens of the pieces that gradients flow through.
        seed: of all random numbers.
        bfloat16: compute in bfloat16 under autocast.
        first_epoch: epochs of the cycle that an earlier training did; the rate goes on from there.
        warm_up: the fraction of the cycle during which the rate rises, at first or again after ``first_epoch``.
    """

    optimizer: str
    lr: float
    epochs: int
    bptt: int = 70
    seed: int = 1
    bfloat16: bool = False
    first_epoch: int = 0
    warm_up: float = WARM_UP


@dataclass
class Place:
    """Position of a training in its run, as checkpoints store it.

    Attributes:
        epoch, piece, position: the next piece of text; ``position`` is its first token in every stream.
        total: sum over the epoch's tokens so far of the mean loss at each, over the streams.
        seconds: of training so far.
        averaged: steps whose weights the averages hold.
        best: the lowest validation loss.
        averaging: whether weights are averaged.
        log: an entry for every epoch.
    """

    epoch: int = 0
    piece: int = 0
    position: int = 0
    total: float = 0.0
    seconds: float = 0.0
    averaged: int = 0
    best: float = math.inf
    averaging: bool = False
    log: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


class Objective(nn.Module):
    """Cross-entropy with the penalties on activations (AR) and on their changes over time (TAR).

    ``forward(inputs, targets, state)`` takes token ids [T, B] twice and returns the objective, the cross-entropy in it
    without gradients, and the next state.
    """

    def __init__(self, model: AWDLSTM) -> None:
        super().__init__()
        self.model = model
        self._outputs: Tensor | None = None
        model.lstms[-1].register_forward_hook(self._remember)

    def _remember(self, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        self._outputs = outputs[0]

    def forward(self, inputs: Tensor, targets: Tensor, state: LSTMStates | None) -> tuple[Tensor, Tensor, LSTMStates]:
        hidden, state = self.model.features(inputs, state)
        loss = cross_entropy(self.model.decoder(hidden).flatten(0, 1).float(), targets.flatten())
        activation = ALPHA * hidden.float().pow(2).mean()
        outputs = cast(Tensor, self._outputs)
        # A piece of one token has no changes over time.
        slowness = BETA * outputs.float().diff(dim=0).pow(2).mean() if len(outputs) > 1 else 0.0
        return loss + activation + slowness, loss.detach(), state


class Training:
    """Training of one model, whose random numbers depend on the place in the run alone.

    Args:
        model: trained in place, on the device of the tokens.
        tokens: ids [N] of the splits ``train``, ``valid`` and ``test``.
        streams: pieces of the training text that are read side by side.
        options: see :class:`TrainingOptions`.
        processes: those that share the streams.
    """

    def __init__(
        self, model: AWDLSTM, tokens: Mapping[str, Tensor], streams: int, options: TrainingOptions, processes: Processes
    ) -> None:
        self.model, self.tokens, self.options, self.processes = model, tokens, options, processes
        self.device = tokens["train"].device
        text = side_by_side(tokens["train"], streams)
        self.length = len(text)
        self.text = text.chunk(processes.count, 1)[processes.rank]
        objective = Objective(model)
        is_alone = processes.count == 1
        self.objective: nn.Module = objective if is_alone else DistributedDataParallel(objective, broadcast_buffers=False)
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.grid = Grid(model, self.parameters)
        self.optimizer = self._new_optimizer()
        self.place = Place(epoch=options.first_epoch, averaging=options.optimizer != "ntasgd")
        self.averages: dict[str, Tensor] = {}
        self.state: LSTMStates | None = None

    def _new_optimizer(self) -> torch.optim.Optimizer:
        lr, parameters = self.options.lr, self.parameters.values()
        if self.options.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.02)
        return torch.optim.SGD(parameters, lr=lr, weight_decay=WEIGHT_DECAY)

    # ---- one step ----

    def step(self, pace: Pace) -> float:
        """Learn from the next piece of the text; return the mean over the processes of their seconds so far."""
        options, place = self.options, self.place
        start, taken = place.position, self._next_length()
        seed(options.seed, "dropout", place.epoch, place.piece, self.processes.rank)
        inputs, targets = self.text[start : start + taken], self.text[start + 1 : start + 1 + taken]
        # Masked matrices and tensor trains are computed once a step.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bfloat16), parametrize.cached():
            loss, entropy, state = self.objective(inputs, targets, self.state)
        self._update(loss, taken)
        self.state = [(h.detach(), c.detach()) for h, c in state]
        shared = torch.stack([entropy.double(), entropy.new_tensor(pace.seconds(), dtype=torch.float64)])
        mean_entropy, seconds = self.processes.mean(shared).tolist()
        place.total += mean_entropy * taken
        place.position, place.piece = start + taken, place.piece + 1
        return seconds

    def _next_length(self) -> int:
        """Draw how many tokens the next piece has."""
        options, place = self.options, self.place
        seed(options.seed, "length", place.epoch, place.piece)
        mean = options.bptt if torch.rand(()) < 0.95 else options.bptt / 2
        return min(max(5, int(torch.normal(mean, 5.0, ()))), self.length - 1 - place.position)

    def _update(self, loss: Tensor, taken: int) -> None:
        parameters, lr = self.parameters.values(), self.options.lr
        take_gradients(loss, self.optimizer, parameters, clip=CLIP, lr=lr, epoch=self.place.epoch)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(taken)
        self.grid.leave()
        self.optimizer.step()
        if self.place.averaging:
            self._average()
        self.grid.enter()

    def _average(self) -> None:
        self.place.averaged += 1
        share = 1.0 / self.place.averaged
        if self.options.optimizer == "adamw":
            share = max(share, 1.0 / AVERAGED_STEPS)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.averages.setdefault(name, parameter.detach().clone()).lerp_(parameter, share)

    def learning_rate(self, taken: int) -> float:
        """Return the rate for a piece of ``taken`` tokens; shorter pieces count less."""
        options, place = self.options, self.place
        lr = options.lr * taken / options.bptt
        if options.optimizer != "adamw":
            return lr
        done = (place.epoch + place.position / self.length) / options.epochs
        if not options.first_epoch:
            return lr * one_cycle(done, options.warm_up, 0.1 + 0.9 / options.warm_up * done)
        again = min(1.0, 0.1 + 0.9 / options.warm_up * (done - options.first_epoch / options.epochs))
        return lr * again * one_cycle(done, WARM_UP, 0.1 + 0.9 / WARM_UP * done)

    # ---- epochs ----

    def run(self, save: Callable[[], None], write: Callable[[], None], pace: Pace, console: Console) -> None:
        """Train to the end, or until ``pace`` ends the process.

        Args:
            save: writes a checkpoint; called after each epoch, and when ``pace`` says so.
            write: writes the model's weights; called whenever the validation loss has improved.
            pace: see :class:`paper.runs.Pace`.
            console: shows progress.
        """
        before = self.place.seconds
        while self.place.epoch < self.options.epochs:
            for seconds in self._pieces(pace, console):
                self.place.seconds = before + seconds
                pace.after_step(save, seconds)
            self.state = None
            self.end_epoch(write, console)
            save()

    def _pieces(self, pace: Pace, console: Console) -> Iterator[float]:
        """Take the steps left in the epoch, and yield the seconds after each."""
        self.model.train()
        place = self.place
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(f"epoch {place.epoch}", total=self.length - 1, completed=place.position)
            while place.position < self.length - 1:
                yield self.step(pace)
                bar.update(task, completed=place.position)

    def end_epoch(self, write: Callable[[], None], console: Console) -> None:
        """Validate, write the weights if they are the best, and move the place to the next epoch, or behind all."""
        place, optimizer = self.place, self.options.optimizer
        self._swap_averages()
        loss, previous = self.loss("valid"), [entry["valid_loss"] for entry in place.log]
        if loss < place.best:
            place.best = loss
            write()
        self._swap_averages()
        has_stalled = len(previous) > PATIENCE and loss > min(previous[:-PATIENCE])
        entry = {
            "epoch": place.epoch,
            "train_loss": place.total / place.position,
            "valid_loss": loss,
            "valid_perplexity": math.exp(loss),
            "averaged": place.averaging,
            "seconds": round(place.seconds, 1),
        }
        place.log.append(entry)
        console.print(entry)
        is_over = has_stalled and optimizer == "asgd"
        place.averaging = place.averaging or (has_stalled and optimizer == "ntasgd")
        place.epoch = sys.maxsize if is_over else place.epoch + 1
        place.piece, place.position, place.total = 0, 0, 0.0

    def _swap_averages(self) -> None:
        """Exchange the weights for their averages; a second call undoes it."""
        self.grid.leave()
        with torch.no_grad():
            for name, average in self.averages.items():
                weights = self.parameters[name].clone()
                self.parameters[name].copy_(average)
                average.copy_(weights)
        self.grid.enter()

    def loss(self, split: str) -> float:
        """Return the mean loss on a split, as the first process finds it."""
        found = perplexity(self.model, self.tokens[split], streams=EVALUATION_STREAMS).loss
        return self.processes.first(found, self.device)

    def close(self) -> None:
        """Leave the process group, after the threads of the distributed objective, which would end with an error."""
        self.objective = self.model
        self.processes.leave()

    # ---- checkpoints ----

    def write_checkpoint(self, folder: Path, settings: Mapping[str, str]) -> None:
        """Write ``checkpoint.safetensors`` and ``log.jsonl``, from the first process."""
        states = self.processes.gather(self.state and [tuple(part.cpu() for part in pair) for pair in self.state])
        if not self.processes.is_first:
            return
        weights = self.parameters | self.grid.exact
        tensors = with_prefix("model", weights) | with_prefix("average", self.averages) | moments_of(self.optimizer)
        for layer in range(len(self.model.lstms) if self.state else 0):
            for index, name in enumerate("hc"):
                tensors[f"state.{layer}.{name}"] = torch.cat([state[layer][index] for state in states], 1)
        metadata = {"place": asdict(self.place), "settings": dict(settings)}
        write_tensors(folder / "checkpoint.safetensors", tensors, metadata)
        write_log(folder / "log.jsonl", self.place.log)

    def read_checkpoint(self, folder: Path, settings: Mapping[str, str]) -> None:
        """Continue from ``checkpoint.safetensors``.

        Raises:
            SlimLSTMError: it is of a run with other settings.
        """
        path = folder / "checkpoint.safetensors"
        tensors, metadata = read_tensors(path, self.device)
        check_settings(path, metadata["settings"], settings)
        self.place = Place(**metadata["place"])
        with torch.no_grad():
            for name, tensor in without_prefix("model", tensors).items():
                self.parameters[name].copy_(tensor)
        self.grid.enter()
        self.averages = without_prefix("average", tensors)
        restore_moments(self.optimizer, tensors)
        self.state = self._state_of(without_prefix("state", tensors))

    def _state_of(self, tensors: Mapping[str, Tensor]) -> LSTMStates | None:
        """Return this process's streams of a stored state, None at the start of an epoch."""
        if not tensors:
            return None
        processes = self.processes
        mine = {name: part.chunk(processes.count, 1)[processes.rank].contiguous() for name, part in tensors.items()}
        return [(mine[f"{layer}.h"], mine[f"{layer}.c"]) for layer in range(len(self.model.lstms))]
