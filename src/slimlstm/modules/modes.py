"""Run code in a known mode of modules and of PyTorch, and then restore the surrounding mode."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")

_ambient: ContextVar[tuple[torch.dtype, torch.device] | None] = ContextVar("_ambient", default=None)
"""The default dtype and device around the outermost :func:`plain_defaults`."""


def surely(restore: Callable[[], None]) -> None:
    """Call ``restore``, and once more if an exception such as Ctrl-C stops it half-way; then raise the exception.

    Examples:
        >>> calls = []
        >>> surely(lambda: calls.append(1))
        >>> calls
        [1]
    """
    try:
        restore()
    except BaseException:
        restore()
        raise


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Put ``model`` in evaluation mode within the block, and restore the mode of every one of its modules after it.

    The flags are set module by module: a model's own ``train`` or ``eval``, which may do more, is not called.

    Examples:
        >>> model = nn.Sequential(nn.LSTM(3, 4), nn.Dropout(0.5).eval())
        >>> with evaluation_mode(model):
        ...     [module.training for module in model]
        [False, False]
        >>> [module.training for module in model]
        [True, False]
    """
    training = [module for module in model.modules() if module.training]

    def set_all(mode: bool) -> None:
        for module in training:
            module.training = mode

    try:
        set_all(False)
        yield
    finally:
        surely(lambda: set_all(True))


def uncompiled() -> AbstractContextManager[Any]:
    """Return a context in which models of ``torch.compile`` run as written, because their LSTMs are replaced for a time.

    Examples:
        >>> with uncompiled():
        ...     nn.Linear(2, 1)(torch.ones(2)).shape
        torch.Size([1])
    """
    # Before PyTorch imports its compiler, nothing can be compiled. set_stance came with PyTorch 2.6.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def plain_mode() -> Generator[None]:
    """Turn autocast and inference mode off, and gradients on, within the block or the decorated function.

    Examples:
        >>> with torch.inference_mode(), plain_mode():
        ...     torch.ones(1, requires_grad=True).exp().requires_grad
        True
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def plain_defaults() -> Generator[None]:
    """Make float32 and the CPU the defaults for new tensors, within the block or the decorated function.

    User code within runs under :func:`ambient_defaults`.

    Examples:
        >>> with plain_defaults():
        ...     torch.zeros(1).dtype
        torch.float32
    """
    token = None
    if _ambient.get() is None:
        token = _ambient.set((torch.get_default_dtype(), torch.get_default_device()))
    try:
        with _defaults(torch.float32, torch.device("cpu")):
            yield
    finally:
        if token is not None:
            _ambient.reset(token)


@contextmanager
def ambient_defaults() -> Generator[None]:
    """Restore, within the block, the defaults that surround the outermost :func:`plain_defaults`."""
    found = _ambient.get()
    if found is None:
        yield
        return
    with _defaults(*found):
        yield


@contextmanager
def _defaults(dtype: torch.dtype, device: torch.device) -> Generator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with ExitStack() as stack:
            # The context manager slows every call down, so it is entered only where it changes something.
            if torch.get_default_device() != device:
                stack.enter_context(device)
            yield
    finally:
        torch.set_default_dtype(before)
