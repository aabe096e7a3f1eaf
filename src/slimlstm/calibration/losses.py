"""Call a model on batches, and read the results that a loss may return."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, kl_divergence
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]  # the public name is of newer versions

from slimlstm.errors import SlimLSTMError

Loss = Callable[[nn.Module, Any], Tensor | Distribution]
"""Takes the model and a batch, and returns one of three results:

- the loss of every prediction, of any shape, without padding;
- the predicted distribution, from which labels are drawn;
- one mean loss, which leaves the scale of the predicted losses unknown.

A loss that carries a state from batch to batch has ``state_dict`` and ``load_state_dict``. Every pass over the batches then
starts from the state that the loss was given in, and the loss has that state again afterwards.
"""


class LossState:
    """The state that a loss may carry from batch to batch, in its ``state_dict`` and ``load_state_dict``.

    Attributes:
        exists: whether the loss has both methods.
    """

    def __init__(self, loss: object) -> None:
        self._loss: Any = loss
        self.exists = hasattr(loss, "state_dict") and hasattr(loss, "load_state_dict")

    def read(self) -> Any:
        """Return a copy of the state, because the next batch may change the state itself; None without one."""
        return copy.deepcopy(self._loss.state_dict()) if self.exists else None

    def restore(self, state: Any) -> None:
        """Return the loss to a state from :meth:`read`; None changes nothing."""
        if state is not None:
            self._loss.load_state_dict(copy.deepcopy(state))

    @contextmanager
    def kept(self) -> Generator[None]:
        """Return the loss, at the end of the block, to its state at the beginning: every pass starts alike."""
        first = self.read()
        try:
            yield
        finally:
            self.restore(first)


def observed_losses(result: object) -> tuple[Tensor, bool]:
    """Return the losses in the result of a :data:`Loss`, and whether they are losses of predictions rather than one mean.

    If the result is a distribution, labels are drawn from it, and the losses are their negative log-probabilities. For
    classes, and for yes or no, the losses are the entropies, with gradients from :func:`_classes` and :func:`_yes_or_no`.

    Raises:
        SlimLSTMError: the result is neither a tensor nor a distribution, or a loss is not finite.

    Examples:
        >>> observed_losses(torch.tensor([0.5, 0.25]))
        (tensor([0.5000, 0.2500]), True)
    """
    is_drawn = isinstance(result, Distribution)
    if isinstance(result, Distribution):
        result = _losses_of(result)
    losses = checked_losses(result)
    return losses, is_drawn or losses.ndim > 0


def _losses_of(predicted: Distribution) -> Tensor:
    if isinstance(predicted, Independent):
        losses, count = _losses_of(predicted.base_dist), predicted.reinterpreted_batch_ndims
        return losses.flatten(-count).sum(-1) if count else losses
    if isinstance(predicted, Categorical):
        return _classes(predicted)
    if isinstance(predicted, Bernoulli):
        return _yes_or_no(predicted)
    return -predicted.log_prob(predicted.sample())


def _classes(predicted: Categorical) -> Tensor:
    """Return the entropies of predicted classes, with random gradients whose second moment is the Fisher information.

    The gradient of a drawn label's loss has the covariance S Sᵀ = diag(p) - p pᵀ at the logits, where
    S = diag(√p) - p √pᵀ. So has S v for a standard normal v. The gradient of a drawn label of a confident prediction is
    large once in thousands of draws and almost zero otherwise; S v has about the same size at every draw.
    """
    log_p, p = predicted.logits, predicted.probs.detach()
    # A probability of zero has no share, and its logarithm may be infinite.
    drawn = torch.where(p > 0, p.sqrt() * torch.randn_like(p) * log_p.clamp_min(torch.finfo(p.dtype).min), 0.0).sum(-1)
    return predicted.entropy().detach() + drawn - drawn.detach()


def _yes_or_no(predicted: Bernoulli) -> Tensor:
    """Return the entropies, with gradients √(p (1 - p)) v at the logits, as :func:`_classes` does for two classes."""
    logits, p = predicted.logits, predicted.probs.detach()
    spread = (p * (1 - p)).sqrt()
    drawn = torch.where(spread > 0, spread * torch.randn_like(p) * logits, 0.0)
    return torch.where(spread > 0, predicted.entropy().detach(), 0.0) + drawn - drawn.detach()


def checked_losses(result: object) -> Tensor:
    """Return ``result`` if it is a tensor of at least one number, all finite.

    Raises:
        SlimLSTMError: it is no such tensor.
    """
    if not isinstance(result, Tensor):
        raise SlimLSTMError(f"the loss returned {type(result).__name__}; it has to return a tensor or a distribution")
    if not result.numel():
        raise SlimLSTMError("the loss returned a tensor of 0 numbers; it has to return at least one")
    if not bool(torch.isfinite(result).all()):
        raise SlimLSTMError("the loss returned NaN or infinite numbers; check the batches and the model's outputs")
    return result


def copied(batch: Any) -> Any:
    """Return a batch with copies of its tensors, because a model may change its inputs in place.

    Objects that hold tensors are copied too, unless Python cannot copy them.

    Examples:
        >>> batch = {"x": torch.ones(2), "name": "a"}
        >>> _ = copied(batch)["x"].zero_()
        >>> batch["x"].tolist()
        [1.0, 1.0]
    """
    return pytree.tree_map(_copy, batch)


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, PackedSequence):
        return leaf._replace(data=_copy(leaf.data))
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        return leaf if isinstance(leaf, nn.Module) else copy.deepcopy(leaf)
    except Exception:
        return leaf  # such as an open file, or a result that has a gradient history


def costs_of(dense: object, compressed: object) -> Tensor:
    """Return the compressed model's losses, or the divergence of its distribution from the uncompressed model's.

    Args:
        dense, compressed: the results of a :data:`Loss` for the two models.

    Raises:
        SlimLSTMError: the compressed model's result is neither a tensor nor a distribution, or a loss is not finite.
    """
    if not isinstance(dense, Distribution) or not isinstance(compressed, Distribution):
        return checked_losses(compressed)
    try:
        return kl_divergence(dense, compressed)
    except NotImplementedError:
        return -compressed.log_prob(dense.sample())


def call(model: nn.Module, batch: Any) -> None:
    """Call the model on a batch: a tuple or list gives its arguments, a mapping its named arguments.

    Raises:
        SlimLSTMError: the model does not take such arguments.
    """
    positional: Sequence[Any] = ()
    named: Mapping[str, Any] = {}
    if isinstance(batch, Mapping):
        named = cast(Mapping[str, Any], batch)
    elif isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        positional = cast(Sequence[Any], batch)
    else:
        positional = (batch,)
    try:
        inspect.signature(model.forward).bind(*positional, **named)
    except TypeError as error:
        given = f"the arguments {', '.join(map(str, named))}" if named else f"{len(positional)} arguments"
        raise SlimLSTMError(
            f"a batch gives {given}, which the model does not take ({error}). Without a loss, batches hold the model's "
            "inputs alone: leave labels out, or give a loss"
        ) from error
    except ValueError:  # no signature, as in compiled code
        pass
    model(*positional, **named)
