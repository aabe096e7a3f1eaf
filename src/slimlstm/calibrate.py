"""Second moments of what goes into every recurrent matrix, and of what the loss sends back to the gates.

For a matrix W [m, n] with inputs z and gradients δ at the gates' pre-activations, moments A = E[z zᵀ] and G = E[δ δᵀ], the
loss of W' in the place of W rises by about ½ tr((W - W')ᵀ G (W - W') A) a row: the Fisher information, or with observed
labels its empirical form, with inputs and gradients taken for independent of each other (Martens and Grosse 2015) and
time steps too (Martens, Ba and Johnson 2018).

The model need not know of it: while batches run, every LSTM computes by the reference recurrence, to whose gates something
is added that is zero and takes a gradient.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils.rnn import PackedSequence

from slimlstm.errors import SlimLSTMError
from slimlstm.nn import LowRankLSTM, LowRankLSTMCell, State, lstm_arguments
from slimlstm.ops.reference import product, recurrence, step
from slimlstm.ops.weights import Direction
from slimlstm.sites import Host, find_hosts, parameter_names

Loss = Callable[[nn.Module, Any], Tensor | Distribution]
"""Takes the model and a batch. Returns the losses of the single predictions, of any shape, with none for padding; or the
distribution that the model predicts, from which labels are drawn; or one mean loss, which leaves the scale unknown."""

_NO_BATCH = "there is no batch to calibrate on; an iterator may have been used up before"
_NO_GRADIENT = "the loss does not depend on the model's LSTMs in a way that gradients can follow"


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
        loss: takes the model and a batch; see :data:`Loss`. Labels drawn from a distribution make the true Fisher
            information, labels observed the empirical one. Without a loss the model is called on each batch (a tuple or
            list as its arguments, a mapping as named ones), and only inputs are seen, which is what ``"activation"`` needs.
        seed: of the labels that are drawn.
        progress: called with the number of batches done.

    Raises:
        SlimLSTMError: no LSTM that can be seen, no batch, a loss that is none, is not finite or does not hang on the
            LSTMs, or an LSTM whose inputs are not finite.
    """
    hosts = [host for host in find_hosts(model) if host.problem is None]
    if not hosts:
        raise SlimLSTMError(
            "the model holds no LSTM that can be calibrated; find_sites(model) says which there are and why"
        )
    recorder = _Recorder(loss is not None)
    total, predictions, is_scaled, done = 0.0, 0, True, 0
    with _observing(model, hosts, recorder), torch.random.fork_rng():
        torch.manual_seed(seed)
        for done, batch in enumerate(batches, 1):
            if loss is None:
                with torch.no_grad():
                    _call(model, batch)
                recorder.count(None)
            else:
                with torch.enable_grad():
                    losses, scaled = _losses(loss(model, batch))
                    recorder.count(losses.sum())
                total, predictions = total + float(losses.detach().double().sum()), predictions + losses.numel()
                is_scaled = is_scaled and scaled
            if progress is not None:
                progress(done)
    if not done:
        raise SlimLSTMError(_NO_BATCH)
    mean = total / predictions if predictions else None
    return Calibration(recorder.result(), mean, predictions, is_scaled)


def mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss) -> float | None:
    """The mean of what ``loss`` gives, in evaluation mode, which is restored.

    None for distributions: every model's labels are its own, so that their losses tell nothing of one model beside another.

    Raises:
        SlimLSTMError: no batch, or a loss that is none or is not finite.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for batch in batches:
                result = loss(model, batch)
                if isinstance(result, Distribution):
                    return None
                losses, _ = _losses(result)
                total, count = total + float(losses.double().sum()), count + losses.numel()
    finally:
        for module in training:
            module.training = True
    if not count:
        raise SlimLSTMError(_NO_BATCH)
    return total / count


class _Observation:
    """What one call of one direction saw: z of ih and of hh, row by row, and what takes the gradient at the gates."""

    def __init__(self, keys: tuple[str, str], inputs: tuple[Tensor, Tensor], probe: Tensor) -> None:
        self.keys, self.inputs, self.probe = keys, inputs, probe


class _Sums:
    """Sums of z zᵀ for ih and hh, and of δ δᵀ, over the rows of one direction."""

    def __init__(self) -> None:
        self.rows = 0
        self.inputs: list[Tensor] = []
        self.gradients: Tensor | None = None

    def add(self, inputs: Sequence[Tensor], gradients: Tensor | None) -> None:
        self.rows += len(inputs[0])
        sums = [_square(values) for values in inputs]
        self.inputs = sums if not self.inputs else [old.add_(new) for old, new in zip(self.inputs, sums, strict=True)]
        if gradients is not None:
            square = _square(gradients)
            self.gradients = square if self.gradients is None else self.gradients.add_(square)


class _Recorder:
    def __init__(self, with_gradients: bool) -> None:
        self.with_gradients = with_gradients
        self.seen: list[_Observation] = []
        self.sums: dict[tuple[str, str], _Sums] = {}

    def probe(self, rows: Tensor, width: int) -> Tensor:
        return rows.new_zeros(len(rows), width, requires_grad=self.with_gradients)

    def count(self, total: Tensor | None) -> None:
        """Adds what was seen since the last time, with the gradients of ``total``."""
        seen, self.seen = self.seen, []
        gradients: Sequence[Tensor | None] = [None] * len(seen)
        if total is not None:
            if not seen:
                raise SlimLSTMError("the loss ran none of the model's LSTMs; was another copy of the model called?")
            if not total.requires_grad:
                raise SlimLSTMError(_NO_GRADIENT)
            found = torch.autograd.grad(total, [one.probe for one in seen], allow_unused=True)
            gradients = cast(Sequence[Tensor | None], found)
            if all(gradient is None for gradient in gradients):
                raise SlimLSTMError(_NO_GRADIENT)
        # Cells are called step by step: one product for all their rows costs a fraction of one for each.
        grouped: dict[tuple[str, str], list[tuple[_Observation, Tensor | None]]] = {}
        for one, gradient in zip(seen, gradients, strict=True):
            grouped.setdefault(one.keys, []).append((one, gradient))
        for keys, group in grouped.items():
            inputs = [torch.cat([one.inputs[which] for one, _ in group]) for which in (0, 1)]
            if total is None:
                self.sums.setdefault(keys, _Sums()).add(inputs, None)
                continue
            at_gates = torch.cat([torch.zeros_like(one.probe) if g is None else g for one, g in group])
            reached = at_gates.any(dim=1)
            self.sums.setdefault(keys, _Sums()).add([values[reached] for values in inputs], at_gates[reached])

    def result(self) -> dict[str, Moments]:
        found: dict[str, Moments] = {}
        for keys, sums in self.sums.items():
            if sums.rows == 0:
                continue
            gradients = None if sums.gradients is None else sums.gradients / sums.rows
            for key, inputs in zip(keys, sums.inputs, strict=True):
                if not all(bool(torch.isfinite(tensor).all()) for tensor in (inputs, gradients) if tensor is not None):
                    raise SlimLSTMError(f"what goes into {key}, or its gradient, is not finite; check the batches")
                found[key] = Moments(inputs / sums.rows, gradients, sums.rows)
        return found


class _ObservedLSTM(LowRankLSTM):
    recorder: _Recorder
    path: str

    def _run(self, x: Tensor, batch_sizes: Tensor | None, hx: State | None) -> tuple[Tensor, State]:
        sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else [int(size) for size in batch_sizes]
        if hx is None:
            shape = self.num_layers * self._directions, sizes[0] if sizes else 0
            hx = x.new_zeros(*shape, self.proj_size or self.hidden_size), x.new_zeros(*shape, self.hidden_size)
        h0, c0 = hx
        rows = x if batch_sizes is not None else x.flatten(0, 1)
        last: list[State] = []
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for suffix in self._suffixes(layer):
                weights, index, reverse = self.direction(suffix), len(last), suffix.endswith("_reverse")
                probe = self.recorder.probe(rows, 4 * self.hidden_size)
                gates = product(rows, weights.ih, weights.bias_ih) + probe
                output, h, c = recurrence(gates, sizes, h0[index], c0[index], weights, reverse)
                keys = _key(self.path, f"weight_ih{suffix}"), _key(self.path, f"weight_hh{suffix}")
                # A copy, as what comes from outside may be overwritten before it is counted.
                inputs = rows.detach().clone(), _states_before(output.detach(), sizes, h0[index].detach(), reverse)
                self.recorder.seen.append(_Observation(keys, inputs, probe))
                outputs.append(output)
                last.append((h, c))
            rows = torch.cat(outputs, dim=-1)
        output = rows if batch_sizes is not None else rows.unflatten(0, x.shape[:2])
        return output, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))


class _ObservedCell(LowRankLSTMCell):
    recorder: _Recorder
    path: str

    def _step(self, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Direction]) -> State:
        (own,) = weights
        probe = self.recorder.probe(x, 4 * self.hidden_size)
        keys = _key(self.path, "weight_ih"), _key(self.path, "weight_hh")
        # Copies, as a loop may overwrite what it stepped from.
        self.recorder.seen.append(_Observation(keys, (x.detach().clone(), h.detach().clone()), probe))
        gates = product(x, own.ih, own.bias_ih) + product(h, own.hh, own.bias_hh) + probe
        return step(gates, c, None)


@contextmanager
def _observing(model: nn.Module, hosts: list[Host], recorder: _Recorder) -> Generator[None]:
    """The model in evaluation mode, its LSTMs computing through observers."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        model.eval()
        stack.callback(lambda: [setattr(module, "training", True) for module in training])
        for host in hosts:
            # Not in the place of the module: others may refer to it too.
            stack.callback(_set_forward, host.lstm, vars(host.lstm).get("forward"))
            _set_forward(host.lstm, _observer(host, recorder).forward)
        yield


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Gives a module a forward pass of its own; None gives it back that of its class."""
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward


def _observer(host: Host, recorder: _Recorder) -> _ObservedLSTM | _ObservedCell:
    old = cast(Any, host.lstm)
    if hasattr(old, "num_layers"):
        observer = _ObservedLSTM(**lstm_arguments(old), device="meta")
    else:
        observer = _ObservedCell(old.input_size, old.hidden_size, old.bias, device="meta")
    for name in parameter_names(old):
        observer.register_parameter(name, nn.Parameter(host.matrix(name), requires_grad=False))
    observer.recorder, observer.path = recorder, host.paths[0]
    return observer.eval()


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _states_before(outputs: Tensor, sizes: list[int], h0: Tensor, reverse: bool) -> Tensor:
    """h_{t-1} of every row [N, P], in the order of the rows; backward, of the step that is computed before."""
    steps = list(outputs.split(sizes))
    if reverse:
        later = [*steps[1:], outputs[:0]]
        before = [
            torch.cat([after, h0[len(after) : size].to(after.dtype)]) for after, size in zip(later, sizes, strict=True)
        ]
    else:
        before = [h0[: sizes[0]].to(outputs.dtype), *(step[:size] for step, size in zip(steps, sizes[1:], strict=False))]
    return torch.cat(before)


def _losses(result: object) -> tuple[Tensor, bool]:
    """The losses of single predictions, and whether they are that rather than a mean."""
    is_drawn = isinstance(result, Distribution)
    if isinstance(result, Distribution):
        result = -result.log_prob(result.sample())
    if not isinstance(result, Tensor):
        raise SlimLSTMError(f"the loss returned {type(result).__name__}; it has to return a tensor or a distribution")
    if not result.numel() or not bool(torch.isfinite(result).all()):
        raise SlimLSTMError(f"the loss returned {result.numel()} numbers, which have to be finite and at least one")
    return result, is_drawn or result.ndim > 0


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**cast(Mapping[str, Any], batch))
    elif isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        model(*cast(Sequence[Any], batch))
    else:
        model(batch)


def _square(rows: Tensor) -> Tensor:
    """Σ v vᵀ over the rows v of a matrix, in float64; products of one batch in float32 where the rows are no finer."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return (rows.T @ rows).double()
