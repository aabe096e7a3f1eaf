"""Run a model in evaluation mode, and restore the mode of every module after."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Put ``model`` in evaluation mode within the block, and restore the mode of every one of its modules after it.

    The flags are set module by module: a model's own ``train`` or ``eval``, which may do more, is not called.

    Example:
        >>> model = nn.Sequential(nn.LSTM(3, 4), nn.Dropout(0.5).eval())
        >>> with evaluation_mode(model):
        ...     [module.training for module in model]
        [False, False]
        >>> [module.training for module in model]
        [True, False]
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
