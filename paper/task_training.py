"""Training of one task model for one seed, which can be interrupted: epochs, early stopping, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from paper.checkpoints import moments_of, read_tensors, restore_moments, with_prefix, without_prefix, write_tensors
from paper.elmo import BiLM
from paper.optimization import take_gradients
from paper.runs import Pace, check_settings, seed, write_log
from paper.tasks import Batch, Remembering, losses, predictions, scores

CLIP, PATIENCE = 5.0, 4
LANGUAGE_MODEL = "embedder.elmo.bilm."
"""Prefix of the names of a language model's parameters inside a task model."""


def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the task model without those of the language model in it."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(LANGUAGE_MODEL)}


def predictions_of(models: Sequence[Any], batches: Sequence[Batch], bilm: BiLM | None = None) -> list[list[Any]]:
    """Return every model's predictions, in the order of the batches.

    With ``bilm``, that language model replaces those of all models, and reads every text once for all of them.
    """
    found: list[list[Any]] = [[] for _ in models]
    for model in models:
        model.eval()
    # No weight changes meanwhile, so masks are applied only once.
    with parametrize.cached():
        for batch in batches:
            memory = Remembering(bilm) if bilm else None
            for model, predicted in zip(models, found, strict=True):
                if memory:
                    model.embedder.elmo.bilm = memory
                predicted.extend(predictions(model, batch))
    return found


class Training:
    """Training of one model with Adam, which halves its rate, and in the end stops, where validation does not improve.

    Random numbers depend on the place in the run alone.

    Args:
        number: the seed.
        model: trained in place.
        folder: for the checkpoint, the best weights and the log.
        metric: a key of the scores that :func:`paper.tasks.scores` returns.
        lr: the first learning rate.
        settings: in which a checkpoint has to agree.
        device: of the model.
    """

    def __init__(
        self,
        number: int,
        model: nn.Module,
        folder: Path,
        *,
        metric: str,
        lr: float,
        settings: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self.number, self.model, self.folder = number, model, folder
        self.metric, self.settings, self.device = metric, settings, device
        self.parameters = own({name: value for name, value in model.named_parameters() if value.requires_grad})
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=lr)
        self.place: dict[str, Any] = {"epoch": 0, "position": 0, "total": 0.0, "seconds": 0.0}
        self.place |= {"lr": lr, "best": -1.0, "stalled": 0}
        self.log: list[dict[str, Any]] = []
        self.checkpoint = folder / "checkpoint.safetensors"

    def run(self, batches: Sequence[Batch], validation: Sequence[Batch], epochs: int, pace: Pace, console: Console) -> None:
        """Train for at most ``epochs``, from the checkpoint if one exists, or until ``pace`` ends the process."""
        if self.checkpoint.exists():
            self.read_checkpoint()
            console.print(f"seed {self.number}: continuing in epoch {self.place['epoch']}")
        while self.place["epoch"] < epochs and self.place["stalled"] < PATIENCE:
            self._epoch(batches, validation, pace, console)
            if pace.is_over():
                pace.stop()

    def _epoch(self, batches: Sequence[Batch], validation: Sequence[Batch], pace: Pace, console: Console) -> None:
        place = self.place
        seed(self.number, "order", place["epoch"])
        order = torch.randperm(len(batches)).tolist()
        self.model.train()
        before, started = place["seconds"], pace.seconds()
        left = order[place["position"] :]
        for index in track(left, f"epoch {place['epoch']}", console=console, transient=True):
            self.step(batches[index])
            place["seconds"] = before + pace.seconds() - started
            pace.after_step(self.write_checkpoint)
        found = scores(predictions_of([self.model], validation)[0], validation)
        place["seconds"] = before + pace.seconds() - started
        self._end_epoch(len(batches), found, console)

    def step(self, batch: Batch) -> None:
        """Learn from one batch."""
        place = self.place
        seed(self.number, "dropout", place["epoch"], place["position"])
        loss = losses(self.model, batch).mean()
        parameters = self.parameters.values()
        take_gradients(loss, self.optimizer, parameters, clip=CLIP, lr=place["lr"], epoch=place["epoch"])
        self.optimizer.param_groups[0]["lr"] = place["lr"]
        self.optimizer.step()
        place["total"] += loss.item()
        place["position"] += 1

    def _end_epoch(self, steps: int, found: Mapping[str, float], console: Console) -> None:
        place = self.place
        entry = {"epoch": place["epoch"], "train_loss": place["total"] / steps, "lr": place["lr"], **found}
        self.log.append(entry | {"seconds": round(place["seconds"], 1)})
        console.print(f"seed {self.number} {json.dumps(self.log[-1])}", soft_wrap=True)
        if found[self.metric] > place["best"]:
            place.update(best=found[self.metric], stalled=0)
            write_tensors(self.folder / "model.safetensors", own(self.model.state_dict()))
        else:
            place.update(stalled=place["stalled"] + 1, lr=place["lr"] / 2)
        place.update(epoch=place["epoch"] + 1, position=0, total=0.0)
        self.write_checkpoint()

    def best_entry(self) -> dict[str, Any]:
        """Return the log's entry with the best validation score, without its seconds."""
        best = max(self.log, key=lambda entry: entry[self.metric])
        return {name: value for name, value in best.items() if name != "seconds"}

    def write_checkpoint(self) -> None:
        """Write ``checkpoint.safetensors`` and ``log.jsonl``."""
        tensors = with_prefix("model", own(self.model.state_dict())) | moments_of(self.optimizer)
        metadata = {"place": self.place, "log": self.log, "settings": dict(self.settings)}
        write_tensors(self.checkpoint, tensors, metadata)
        write_log(self.folder / "log.jsonl", self.log)

    def read_checkpoint(self) -> None:
        """Continue from ``checkpoint.safetensors``.

        Raises:
            SlimLSTMError: it is of a run with other settings.
        """
        tensors, metadata = read_tensors(self.checkpoint, self.device)
        check_settings(self.checkpoint, metadata["settings"], self.settings)
        self.place.update(metadata["place"])
        self.log = metadata["log"]
        self.model.load_state_dict(without_prefix("model", tensors), strict=False)
        restore_moments(self.optimizer, tensors)


def with_best_weights(model: nn.Module, folder: Path, device: torch.device) -> nn.Module:
    """Bring a new model to the weights that a training in ``folder`` wrote, in evaluation mode."""
    model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)), strict=False)
    return model.eval()
