"""Run code in a known mode of modules and of PyTorch, and then restore the surrounding mode."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import nn

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")

_ambient: ContextVar[tuple[torch.dtype, torch.device] | None] = ContextVar("_ambient", default=None)
"""The default dtype and device around the outermost :func:`plain_defaults`."""
_wanted: ContextVar[torch.dtype] = ContextVar("_wanted", default=torch.float32)
"""The default dtype that the innermost block of this thread asks for."""


@contextmanager
def restoring(restore: Callable[[], None]) -> Generator[None]:
    """Call ``restore`` at the end of the block, and again, because Ctrl-C may stop it before its end.

    Args:
        restore: may be called twice, and before anything has changed.

    Examples:
        >>> values = [1]
        >>> with restoring(lambda: values.__setitem__(0, 1)):
        ...     values[0] = 2
        >>> values
        [1]
    """
    try:
        try:
            yield
        finally:
            restore()
    finally:
        restore()


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
    before = [(module, module.training) for module in model.modules()]

    def set_all(modes: Iterable[tuple[nn.Module, bool]]) -> None:
        for module, mode in modes:
            module.training = mode

    with restoring(lambda: set_all(before)):
        set_all((module, False) for module, _ in before)
        yield


@contextmanager
def uncompiled() -> Generator[None]:
    """Let models of ``torch.compile`` run as written within the block, because their LSTMs are replaced for a time.

    Examples:
        >>> with uncompiled():
        ...     nn.Linear(2, 1)(torch.ones(2)).shape
        torch.Size([1])
    """
    # Before PyTorch imports its compiler, nothing can be compiled. set_stance came with PyTorch 2.6.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    block = object()
    try:
        _stance.enter(block)
        yield
    finally:
        _stance.leave(block)


class _Shared:
    """Open blocks of all threads, which share one setting of PyTorch."""

    def __init__(self) -> None:
        self.lock, self.blocks = threading.Lock(), set[object]()

    def enter(self, block: object) -> None:
        """Begin a block; the first one changes the setting."""
        with self.lock:
            if not self.blocks:
                self.begin()
            self.blocks.add(block)

    def leave(self, block: object) -> None:
        """End a block, if it was begun; after the last one, the setting is what it was."""
        with self.lock:
            if block in self.blocks:
                self.blocks.discard(block)
                self.end()

    def begin(self) -> None:
        """Change the setting, or note what it is; called for the first block."""
        raise NotImplementedError

    def end(self) -> None:
        """Restore the setting if no block is left; called after each block."""
        raise NotImplementedError


class _Stance(_Shared):
    """The stance of PyTorch's compiler: eager while any block is open."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = ExitStack()

    def begin(self) -> None:
        self._changed.enter_context(torch.compiler.set_stance("force_eager"))

    def end(self) -> None:
        if not self.blocks:
            self._changed.close()


_stance = _Stance()


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

    User code within runs under :func:`ambient_defaults`. PyTorch has one default dtype for all threads: it is float32 until
    the last thread has left its block, and only then what it was.

    Examples:
        >>> with plain_defaults():
        ...     torch.zeros(1).dtype
        torch.float32
    """
    block, token = object(), None
    try:
        if _ambient.get() is None:
            _dtype.enter(block)
            token = _ambient.set((_dtype.outside, torch.get_default_device()))
        with _defaults(torch.float32, torch.device("cpu")):
            yield
    finally:
        if token is not None:
            _ambient.reset(token)
        _dtype.leave(block)


@contextmanager
def ambient_defaults() -> Generator[None]:
    """Restore, within the block, the defaults that surround the outermost :func:`plain_defaults`.

    While another thread is within :func:`plain_defaults`, the default dtype stays float32.
    """
    found = _ambient.get()
    if found is None:
        yield
        return
    with _defaults(*found):
        yield


@contextmanager
def _defaults(dtype: torch.dtype, device: torch.device) -> Generator[None]:
    token = _wanted.set(dtype)
    try:
        _dtype.set(dtype)
        with ExitStack() as stack:
            # The context manager slows every call down, so it is entered only where it changes something.
            if torch.get_default_device() != device:
                stack.enter_context(device)
            yield
    finally:
        _wanted.reset(token)
        _dtype.set(_wanted.get())


class _DefaultDtype(_Shared):
    """PyTorch's default dtype.

    Attributes:
        outside: the default before the first block.
    """

    outside = torch.float32

    def begin(self) -> None:
        self.outside = torch.get_default_dtype()

    def end(self) -> None:
        torch.set_default_dtype(torch.float32 if self.blocks else self.outside)

    def set(self, dtype: torch.dtype) -> None:
        """Set the default dtype; it is float32 as long as several threads are within."""
        with self.lock:
            torch.set_default_dtype(dtype if len(self.blocks) < 2 else torch.float32)


_dtype = _DefaultDtype()
