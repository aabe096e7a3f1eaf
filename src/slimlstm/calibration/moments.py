"""Second moments of what goes into every recurrent matrix, and of what the loss sends back to the gates.

For a matrix W [m, n] with inputs z and gradients δ at the gates' pre-activations, moments A = E[z zᵀ] and G = E[δ δᵀ], the
loss of W' in the place of W rises by about ½ tr((W - W')ᵀ G (W - W') A) a row: the Fisher information, or with observed
labels its empirical form, with inputs and gradients taken for independent of each other (Martens and Grosse 2015) and
time steps too (Martens, Ba and Johnson 2018).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import Distribution

from slimlstm.calibration.observe import (
    Keys,
    Loss,
    Recorder,
    Rows,
    call,
    checked_losses,
    evaluating,
    observable_hosts,
    observed_losses,
    observing,
)
from slimlstm.errors import SlimLSTMError

_NO_BATCH = "there is no batch to calibrate on; an iterator may have been used up before"


@dataclass(frozen=True)
class Moments:
    """What calibration saw at one matrix [m, n], in float64.

    Attributes:
        inputs: E[z zᵀ] [n, n] over ``rows`` pairs of time step and sequence; those to which no loss sends a gradient, as to
            padding, are left out.
        gradients: E[δ δᵀ] [m, m], δ being the gradient of the sum of losses; None without a loss.
        rows: how many rows were counted.
    """

    inputs: Tensor
    gradients: Tensor | None
    rows: int

    def loss_of(self, difference: Tensor) -> float:
        """½ tr(Δᵀ G Δ A) for Δ [m, n]: what the sum of losses rises by, for a row; without a loss G = I."""
        inputs = difference @ self.inputs.to(difference)
        gradients = difference if self.gradients is None else self.gradients.to(difference) @ difference
        return 0.5 * float((gradients * inputs).sum())

    def fit(self, shape: tuple[int, int]) -> bool:
        """Whether they can be those of a matrix of this shape."""
        m, n = shape
        return len(self.inputs) == n and (self.gradients is None or len(self.gradients) == m)

    @classmethod
    def together(cls, several: Sequence[Moments]) -> Moments:
        """Those of a parameter that several matrices share."""
        if len(several) == 1:
            return several[0]
        rows = sum(one.rows for one in several)
        inputs = sum((one.inputs * (one.rows / rows) for one in several[1:]), several[0].inputs * (several[0].rows / rows))
        weighted = [one.gradients * (one.rows / rows) for one in several if one.gradients is not None]
        return cls(inputs, torch.stack(weighted).sum(0) if len(weighted) == len(several) else None, rows)


@dataclass(frozen=True)
class Calibration:
    """The moments of every site that was reached, by key, and the mean ``loss`` over ``predictions``.

    ``predictions`` is 0 without a loss. Where the loss gave a single mean for every batch, ``is_scaled`` is False, and the
    losses predicted from the moments are right up to a common factor only.
    """

    sites: dict[str, Moments]
    loss: float | None
    predictions: int
    is_scaled: bool

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to one safetensors file, whose folder is made where it is missing."""
        tensors: dict[str, Tensor] = {}
        entries: dict[str, dict[str, Any]] = {}
        kept: dict[int, str] = {}
        for key, moments in self.sites.items():
            tensors[f"{key}:inputs"] = moments.inputs.cpu().contiguous()
            entries[key] = {"rows": moments.rows}
            if moments.gradients is not None:
                # Those of ih and hh are the same.
                name = kept.setdefault(id(moments.gradients), f"{key}:gradients")
                tensors[name] = moments.gradients.cpu().contiguous()
                entries[key]["gradients"] = name
        header = {"loss": self.loss, "predictions": self.predictions, "is_scaled": self.is_scaled, "sites": entries}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        draft = Path(path).with_name(Path(path).name + ".part")
        save_file(tensors, draft, metadata={"slimlstm": "calibration 1", "header": json.dumps(header)})
        draft.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """What :meth:`save` wrote.

        Raises:
            SlimLSTMError: the file is missing, damaged or of something else.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        except (SafetensorError, OSError) as error:
            raise SlimLSTMError(f"{path} is no intact calibration file: {error}") from error
        if metadata.get("slimlstm") != "calibration 1":
            raise SlimLSTMError(f"{path} holds no calibration that this slimlstm can read; calibrate again")
        try:
            header = json.loads(metadata["header"])
            sites = {
                key: Moments(
                    tensors[f"{key}:inputs"],
                    tensors[entry["gradients"]] if "gradients" in entry else None,
                    entry["rows"],
                )
                for key, entry in header["sites"].items()
            }
            return cls(sites, header["loss"], header["predictions"], header["is_scaled"])
        except (KeyError, ValueError) as error:
            raise SlimLSTMError(f"{path} is no intact calibration file: its header cannot be read ({error})") from error


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Runs ``batches`` through the model in evaluation mode and collects the moments of all its sites.

    Neither parameters nor their ``.grad`` change, and the memory that is needed does not depend on the number of batches.
    Gradients reach as far back in time as a batch does.

    Args:
        model: any module with LSTMs, dense or compressed.
        batches: anything to iterate over; what is in it goes to ``loss``.
        loss: takes the model and a batch; see :data:`slimlstm.calibration.observe.Loss`. Labels drawn from a distribution
            make the true Fisher information, labels observed the empirical one. Without a loss the model is called
            on each batch (a tuple or list as its arguments, a mapping as named ones), and only
            inputs are seen, which is what ``"activation"`` needs.
        seed: of the labels that are drawn.
        progress: called with the number of batches done.

    Raises:
        SlimLSTMError: no LSTM that can be seen, no batch, a loss that is none, is not finite or does not hang on the
            LSTMs, or an LSTM whose inputs are not finite.
    """
    recorder, sums = Recorder(loss is not None), dict[Keys, _Sums]()
    total, predictions, is_scaled, done = 0.0, 0, True, 0
    with observing(model, observable_hosts(model), recorder), torch.random.fork_rng():
        torch.manual_seed(seed)
        for done, batch in enumerate(batches, 1):
            if loss is None:
                with torch.no_grad():
                    call(model, batch)
                seen = recorder.take(None)
            else:
                with torch.enable_grad():
                    losses, scaled = observed_losses(loss(model, batch))
                    seen = recorder.take(losses.sum())
                total, predictions = total + float(losses.detach().double().sum()), predictions + losses.numel()
                is_scaled = is_scaled and scaled
            for keys, rows in seen.items():
                sums.setdefault(keys, _Sums()).add(rows)
            if progress is not None:
                progress(done)
    if not done:
        raise SlimLSTMError(_NO_BATCH)
    mean = total / predictions if predictions else None
    return Calibration(_moments(sums), mean, predictions, is_scaled)


def mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss) -> float | None:
    """The mean of what ``loss`` gives, in evaluation mode, which is restored.

    None for distributions: every model's labels are its own, so that their losses tell nothing of one model beside another.

    Raises:
        SlimLSTMError: no batch, or a loss that is none or is not finite.
    """
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            result = loss(model, batch)
            if isinstance(result, Distribution):
                return None
            losses = checked_losses(result)
            total, count = total + float(losses.double().sum()), count + losses.numel()
    if not count:
        raise SlimLSTMError(_NO_BATCH)
    return total / count


class _Sums:
    """Sums of z zᵀ for ih and hh, and of δ δᵀ, over the rows of one direction."""

    def __init__(self) -> None:
        self.rows = 0
        self.inputs: list[Tensor] = []
        self.gradients: Tensor | None = None

    def add(self, rows: Rows) -> None:
        inputs, gradients, reached = list(rows.inputs), rows.gradients, rows.reached
        if gradients is not None and reached is not None:
            inputs, gradients = [values[reached] for values in inputs], gradients[reached]
        self.rows += len(inputs[0])
        sums = [_square(values) for values in inputs]
        self.inputs = sums if not self.inputs else [old.add_(new) for old, new in zip(self.inputs, sums, strict=True)]
        if gradients is not None:
            square = _square(gradients)
            self.gradients = square if self.gradients is None else self.gradients.add_(square)


def _moments(sums: Mapping[Keys, _Sums]) -> dict[str, Moments]:
    found: dict[str, Moments] = {}
    for keys, entry in sums.items():
        if entry.rows == 0:
            continue
        gradients = None if entry.gradients is None else entry.gradients / entry.rows
        for key, inputs in zip(keys, entry.inputs, strict=True):
            if not all(bool(torch.isfinite(tensor).all()) for tensor in (inputs, gradients) if tensor is not None):
                raise SlimLSTMError(f"what goes into {key}, or its gradient, is not finite; check the batches")
            found[key] = Moments(inputs / entry.rows, gradients, entry.rows)
    return found


def _square(rows: Tensor) -> Tensor:
    """Σ v vᵀ over the rows v of a matrix, in float64; products of one batch in float32 where the rows are no finer."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return (rows.T @ rows).double()
