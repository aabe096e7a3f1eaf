"""``finetune``, the function that trains a compressed model."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from slimlstm.errors import SlimLSTMError
from slimlstm.files import path_of
from slimlstm.modules.arguments import check_function, check_loss, check_model
from slimlstm.modules.modes import plain_mode, restoring
from slimlstm.progress import Progress, shown
from slimlstm.tuning.history import History
from slimlstm.tuning.losses import Loss
from slimlstm.tuning.processes import current_processes
from slimlstm.tuning.run import Run, Settings
from slimlstm.tuning.sampling import Batches, check_batches_of_epochs, check_not_of_inference


@plain_mode()
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
    progress: Progress | None = None,
) -> History:
    """Train a compressed ``model`` in place for a number of steps or minutes; factors stay factors, masks stay masks.

    The optimizer is AdamW without weight decay. The learning rate rises over the first twentieth of the budget and then
    falls to zero as a cosine. Gradients are clipped to a norm of 1. The model trains in training mode, so its own dropout
    is active.

    With ``validate`` the model ends with the best weights found, so it never ends worse than it began. Without it, the
    model ends with the last weights. After an error or an interrupt the model has the best weights found, or, without
    ``validate``, the weights from before the run. Training modes, ``requires_grad`` and PyTorch's random numbers are
    restored.

    Weights with a storage such as int8 keep it: the model computes with rounded weights at every step and ends with them,
    while the optimizer changes exact copies (:mod:`slimlstm.tuning.grid`). So :func:`slimlstm.save` works afterwards.

    Processes that ``torchrun`` launched, or that are in a process group of yours, train together. Every process passes the
    same model, on a device of its own, and the same ``batches``. Process k of n takes the batches k, k + n, k + 2n and so
    on, and gradients are averaged, so one step equals a step on a batch n times as large. Process 0 validates, reports and
    writes.

    Args:
        model: any module, dense or compressed.
        batches: the batches that ``loss`` takes: an iterable that is read once per epoch, or a function from the number of
            the epoch to such an iterable. Endless iterables are allowed.
        loss: takes (model, batch); returns the losses of single predictions, of any shape, or their mean.
            :func:`distillation` makes a loss from the dense model. A loss with a state, for instance the hidden state of a
            language model, has to have ``state_dict`` and ``load_state_dict``, so that a resumed run continues from it.
        steps: the budget in steps. Give this or ``minutes``.
        minutes: the budget in minutes of wall-clock time, validations included.
        lr: the highest learning rate. Distillation has less noisy gradients than labels and allows 1e-3.
        parameters: the parameters to train; by default all that require gradients.
        validate: takes the model in evaluation mode and returns a number, lower being better.
        validations: how many times ``validate`` is called after the first step, evenly spread over the budget. It is also
            called once before the first step.
        patience: stop after this many validations in a row without a new best value.
        dtype: ``torch.bfloat16`` computes under autocast; parameters and optimizer keep their dtype.
        seed: the seed of PyTorch's random numbers, for dropout, for drawing ``batches`` and for everything else.
        checkpoint: a file to write at every validation and every minute. If the file exists, the same call with the same
            model continues from it, and after the same number of steps has the same weights.
        progress: called after every step with a line of text and the fraction of the budget used; None draws a bar on a
            terminal.

    Returns:
        Losses, validations, and the reason why the run ended.

    Raises:
        SlimLSTMError: an argument out of range; a loss that is not finite or not a tensor; batches that are empty or can be
            read only once; a checkpoint of another model or of other settings.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.LSTM(4, 8)
        >>> batches = [torch.randn(5, 2, 4) for _ in range(3)]
        >>> history = finetune(model, batches, lambda model, x: model(x)[0].square(), steps=20, lr=0.01)
        >>> history.steps, history.losses[-1] < history.losses[0]
        (20, True)
    """
    settings = Settings(steps, minutes, lr, validations, patience, dtype, seed)
    check_model(model)
    check_batches_of_epochs(batches)
    check_loss(loss)
    if validate is not None:
        check_function(validate, "validate", "model")
    trained = _parameters_to_train(model, parameters)
    device = next(iter(trained.values())).device
    processes = current_processes(device)
    path = None if checkpoint is None else path_of(checkpoint, "checkpoint", "name a file")
    with prepared(model, trained), _random_numbers_restored(device), shown("fine-tuning", progress) as report_progress:
        run = Run(model, batches, loss, trained, settings, processes, validate, path, report_progress)
        try:
            return run.go()
        except BaseException:
            run.restore()
            raise


def _parameters_to_train(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> dict[str, nn.Parameter]:
    """Return the parameters to train, by name."""
    if parameters is None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    else:
        wanted = {id(parameter) for parameter in parameters}
        trained = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}
        if len(trained) < len(wanted):
            raise SlimLSTMError(
                f"{len(wanted) - len(trained)} of the {len(wanted)} parameters do not belong to the model; compress_ makes "
                "new parameters, so collect them after it"
            )
    if not trained:
        raise SlimLSTMError("the model has no parameter to train; pass some in parameters, or let some require gradients")
    check_not_of_inference(list(trained.values()), "the model has parameters")
    return trained


@contextmanager
def prepared(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Generator[None]:
    """Set training mode, and gradients for the trained parameters only; restore both at the end."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def restore() -> None:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        for parameter in trained.values():
            parameter.grad = None

    with restoring(restore):
        model.train()
        model.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        yield


@contextmanager
def _random_numbers_restored(device: torch.device) -> Generator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
