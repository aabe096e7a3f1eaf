"""Watch and restore the state that a model keeps in attributes and buffers from call to call."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]  # the public name is of newer versions

from slimlstm.modules.modes import surely

_MISSING = object()
_OF_PYTORCH = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weights_names", "_flat_weight_refs"}
"""Attributes in which PyTorch keeps parameters, buffers, submodules, hooks and modes."""


class KeptState:
    """A snapshot of the attributes and buffers of a model's modules, except slimlstm's own modules.

    Examples:
        >>> model = nn.Module()
        >>> model.register_buffer("seen", Tensor([0.0]))
        >>> kept = KeptState(model)
        >>> _ = model.seen.add_(1)
        >>> kept.changed()
        'seen'
        >>> kept.restore()
        >>> model.seen.item(), kept.changed()
        (0.0, '')
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        own = [pair for pair in model.named_modules() if not type(pair[1]).__module__.startswith("slimlstm.")]
        self._attributes = [(path, module, dict(_attributes(module))) for path, module in own]
        self._containers = [
            (value, copy.copy(value))
            for _, _, before in self._attributes
            for value in before.values()
            if type(value) in (list, dict)
        ]
        self._buffers = [
            (f"{path}.{name}".lstrip("."), module, name, buffer)
            for path, module in own
            for name, buffer in module.named_buffers(recurse=False)
        ]
        held = {id(buffer): (path, buffer) for path, _, _, buffer in self._buffers}
        for path, _, before in self._attributes:
            for name, value in before.items():
                for leaf in pytree.tree_leaves(value):
                    if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
                        held.setdefault(id(leaf), (f"{path}.{name}".lstrip("."), leaf))
        self._numbers = [
            (path, tensor, tensor.detach().clone(), tensor._version)
            for path, tensor in held.values()
            if not tensor.is_inference()  # such tensors cannot be changed in place outside inference mode
        ]

    def changed(self) -> str:
        """Return the path of a buffer, or of an attribute with tensors, that has changed since; "" where none has."""
        return next(self._changes(), "")

    def now(self) -> KeptState:
        """Return a snapshot of the present state: this one, if nothing has changed since.

        Examples:
            >>> kept = KeptState(nn.Linear(2, 1))
            >>> kept.now() is kept
            True
        """
        return KeptState(self._model) if self.changed() else self

    def restore(self) -> None:
        """Give every attribute and buffer its value back."""
        for _, module, before in self._attributes:
            for name in set(dict(_attributes(module))) - set(before):
                delattr(module, name)
            module.__dict__.update(before)
        for value, contents in self._containers:
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
        for _, module, name, buffer in self._buffers:
            setattr(module, name, buffer)
        for index, (path, tensor, values, version) in enumerate(self._numbers):
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(values)
                self._numbers[index] = path, tensor, values, tensor._version

    def _changes(self) -> Iterator[str]:
        for path, module, before in self._attributes:
            now = dict(_attributes(module))
            for name in {**before, **now}:
                old, new = before.get(name, _MISSING), now.get(name, _MISSING)
                if old is not new and (_has_tensors(old) or _has_tensors(new)):
                    yield f"{path}.{name}".lstrip(".")
        for path, module, name, buffer in self._buffers:
            if getattr(module, name, None) is not buffer:
                yield path
        yield from (path for path, tensor, _, version in self._numbers if tensor._version != version)


@contextmanager
def kept_state(model: nn.Module) -> Generator[KeptState]:
    """Restore a model's attributes and buffers after the block.

    Examples:
        >>> model = nn.Module()
        >>> with kept_state(model):
        ...     model.hidden = torch.zeros(1)
        >>> hasattr(model, "hidden")
        False
    """
    state = KeptState(model)
    try:
        yield state
    finally:
        surely(state.restore)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's own attributes, except PyTorch's."""
    return ((name, value) for name, value in module.__dict__.items() if name not in _OF_PYTORCH)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
