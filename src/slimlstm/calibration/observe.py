"""What goes into the recurrent matrices of any model while it runs, and what the loss sends back to the gates.

The model need not know of it: while it is observed, every LSTM computes by the reference recurrence, to whose gates
something is added that is zero and takes a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils.rnn import PackedSequence

from slimlstm.errors import SlimLSTMError
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.hosts import Host, find_hosts, parameter_names
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.shapes import LSTMState, clips, lstm_arguments
from slimlstm.ops.reference import product, recurrence, step
from slimlstm.ops.weights import Direction, Matrix

Loss = Callable[[nn.Module, Any], Tensor | Distribution]
"""Takes the model and a batch. Returns the losses of the single predictions, of any shape, with none for padding; or the
distribution that the model predicts, from which labels are drawn; or one mean loss, which leaves the scale unknown."""

AnyLSTM = TypeVar("AnyLSTM", bound=LowRankLSTM)
AnyCell = TypeVar("AnyCell", bound=LowRankLSTMCell)
Keys = tuple[str, str]
"""The keys of ih and hh of one direction."""

_NO_GRADIENT = "the loss does not depend on the model's LSTMs in a way that gradients can follow"


@dataclass(frozen=True)
class Rows:
    """What one direction saw: z of ih [N, I] and of hh [N, P], row by row, and the gradients at its gates [N, 4H]."""

    inputs: tuple[Tensor, Tensor]
    gradients: Tensor | None

    @property
    def reached(self) -> Tensor | None:
        """[N]: the rows that the loss sends a gradient to, as it does not to padding; None without gradients."""
        return None if self.gradients is None else self.gradients.any(dim=1)


class Recorder:
    """Collects what observed LSTMs see, until it is taken."""

    def __init__(self, with_gradients: bool) -> None:
        self._with_gradients = with_gradients
        self._seen: list[tuple[Keys, tuple[Tensor, Tensor], Tensor]] = []

    def add(self, keys: Keys, inputs: tuple[Tensor, Tensor], probe: Tensor) -> None:
        """One call of one direction, and what takes the gradient at its gates."""
        self._seen.append((keys, inputs, probe))

    def probe(self, rows: Tensor, width: int) -> Tensor:
        """Zeros [N, width] to be added to the gates of N rows."""
        return rows.new_zeros(len(rows), width, requires_grad=self._with_gradients)

    def take(self, total: Tensor | None) -> dict[Keys, Rows]:
        """What was seen since the last time, by direction, with the gradients of ``total`` where it is given.

        Raises:
            SlimLSTMError: ``total`` does not depend on what was seen.
        """
        seen, self._seen = self._seen, []
        gradients: Sequence[Tensor | None] = [None] * len(seen)
        if total is not None:
            if not seen:
                raise SlimLSTMError("the loss ran none of the model's LSTMs; was another copy of the model called?")
            if not total.requires_grad:
                raise SlimLSTMError(_NO_GRADIENT)
            found = torch.autograd.grad(total, [probe for _, _, probe in seen], allow_unused=True)
            gradients = cast(Sequence[Tensor | None], found)
            if all(gradient is None for gradient in gradients):
                raise SlimLSTMError(_NO_GRADIENT)
        # Cells are called step by step: one product for all their rows costs a fraction of one for each.
        grouped: dict[Keys, list[tuple[tuple[Tensor, Tensor], Tensor]]] = {}
        for (keys, inputs, probe), gradient in zip(seen, gradients, strict=True):
            grouped.setdefault(keys, []).append((inputs, torch.zeros_like(probe) if gradient is None else gradient))
        return {
            keys: Rows(
                (torch.cat([x for (x, _), _ in group]), torch.cat([h for (_, h), _ in group])),
                None if total is None else torch.cat([gradient for _, gradient in group]),
            )
            for keys, group in grouped.items()
        }


def observable_hosts(model: nn.Module) -> list[Host]:
    """The hosts of the sites that can be observed.

    Raises:
        SlimLSTMError: there is none.
    """
    hosts = [host for host in find_hosts(model) if host.problem is None]
    if not hosts:
        raise SlimLSTMError(
            "the model holds no LSTM that can be calibrated; find_sites(model) says which there are and why"
        )
    return hosts


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """The model in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def observing(
    model: nn.Module, hosts: Iterable[Host], recorder: Recorder, weights: Mapping[str, Matrix] | None = None
) -> Generator[None]:
    """The model in evaluation mode, its LSTMs computing through observers; ``weights`` go before its own, by key."""
    with evaluating(model), forwards_replaced((host.lstm, _observer(host, recorder, weights or {})) for host in hosts):
        yield


@contextmanager
def forwards_replaced(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> Generator[None]:
    """The first module of every pair has the forward pass of the second."""
    with ExitStack() as stack:
        for module, other in pairs:
            # Not in the place of the module: others may refer to it too.
            stack.callback(_set_forward, module, vars(module).get("forward"))
            _set_forward(module, other.forward)
        yield


def observed_losses(result: object) -> tuple[Tensor, bool]:
    """What a loss gave, labels drawn from a distribution, and whether it is of single predictions rather than a mean.

    Raises:
        SlimLSTMError: a loss that is none, or is not finite.
    """
    is_drawn = isinstance(result, Distribution)
    if isinstance(result, Distribution):
        result = -result.log_prob(result.sample())
    losses = checked_losses(result)
    return losses, is_drawn or losses.ndim > 0


def checked_losses(result: object) -> Tensor:
    """``result``, which is a tensor of at least one finite loss.

    Raises:
        SlimLSTMError: it is not.
    """
    if not isinstance(result, Tensor):
        raise SlimLSTMError(f"the loss returned {type(result).__name__}; it has to return a tensor or a distribution")
    if not result.numel() or not bool(torch.isfinite(result).all()):
        raise SlimLSTMError(f"the loss returned {result.numel()} numbers, which have to be finite and at least one")
    return result


def call(model: nn.Module, batch: Any) -> None:
    """Runs the model on a batch: a tuple or list as its arguments, a mapping as named ones."""
    if isinstance(batch, Mapping):
        model(**cast(Mapping[str, Any], batch))
    elif isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        model(*cast(Sequence[Any], batch))
    else:
        model(batch)


class _ObservedLSTM(LowRankLSTM):
    recorder: Recorder
    path: str

    def _run(self, x: Tensor, batch_sizes: Tensor | None, hx: LSTMState | None) -> tuple[Tensor, LSTMState]:
        sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else [int(size) for size in batch_sizes]
        if hx is None:
            shape = self.num_layers * self._directions, sizes[0] if sizes else 0
            hx = x.new_zeros(*shape, self.proj_size or self.hidden_size), x.new_zeros(*shape, self.hidden_size)
        h0, c0 = hx
        rows = x if batch_sizes is not None else x.flatten(0, 1)
        last: list[LSTMState] = []
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for suffix in self._suffixes(layer):
                weights, index, reverse = self.direction(suffix), len(last), suffix.endswith("_reverse")
                probe = self.recorder.probe(rows, 4 * self.hidden_size)
                gates = product(rows, weights.ih, weights.bias_ih) + probe
                output, h, c = recurrence(gates, sizes, h0[index], c0[index], weights, reverse)
                # A copy, as what comes from outside may be overwritten before it is counted.
                inputs = rows.detach().clone(), _states_before(output.detach(), sizes, h0[index].detach(), reverse)
                self.recorder.add(_keys(self.path, suffix), inputs, probe)
                outputs.append(output)
                last.append((h, c))
            rows = torch.cat(outputs, dim=-1)
        output = rows if batch_sizes is not None else rows.unflatten(0, x.shape[:2])
        return output, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))


class _ObservedCell(LowRankLSTMCell):
    recorder: Recorder
    path: str

    def _step(self, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Direction]) -> LSTMState:
        (own,) = weights
        probe = self.recorder.probe(x, 4 * self.hidden_size)
        # Copies, as a loop may overwrite what it stepped from.
        self.recorder.add(_keys(self.path, ""), (x.detach().clone(), h.detach().clone()), probe)
        gates = product(x, own.ih, own.bias_ih) + product(h, own.hh, own.bias_hh) + probe
        return step(gates, c, own)


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Gives a module a forward pass of its own; None gives it back that of its class."""
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward


def _observer(host: Host, recorder: Recorder, weights: Mapping[str, Matrix]) -> _ObservedLSTM | _ObservedCell:
    path = host.paths[0]

    def matrix(name: str) -> Matrix:
        return weights.get(_key(path, name), host.matrix(name))

    observer = stand_in(host, _ObservedLSTM, _ObservedCell, matrix)
    observer.recorder, observer.path = recorder, path
    return observer


def stand_in(host: Host, lstm: type[AnyLSTM], cell: type[AnyCell], matrix: Callable[[str], Matrix]) -> AnyLSTM | AnyCell:
    """A module of one of the classes, whichever is like the host's, whose weights are what ``matrix`` gives by name."""
    old = cast(Any, host.lstm)
    if hasattr(old, "num_layers"):
        made = lstm(**lstm_arguments(old), **clips(old), device="meta")
    else:
        made = cell(old.input_size, old.hidden_size, old.bias, device="meta")
    for name in parameter_names(old):
        kept_as = matrix(name)
        if isinstance(kept_as, tuple):
            made.set_factors(name, *(nn.Parameter(factor.detach(), requires_grad=False) for factor in kept_as))
        else:
            made.register_parameter(name, nn.Parameter(kept_as.detach(), requires_grad=False))
    made.eval()
    return made


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _keys(path: str, suffix: str) -> Keys:
    return _key(path, f"weight_ih{suffix}"), _key(path, f"weight_hh{suffix}")


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
