"""Watch and restore the state that a model keeps in attributes and buffers from call to call."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimlstm.modules.modes import restoring
from slimlstm.modules.walk import PLAIN, is_proxy

_MISSING = object()
_OF_PYTORCH = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weights_names", "_flat_weight_refs"}
"""Attributes in which PyTorch keeps parameters, buffers, submodules, hooks and modes."""


class KeptState:
    """A snapshot of the attributes and buffers of a model's modules, except slimlstm's own modules.

    It holds the numbers of buffers, and of tensors within attributes and within their lists, tuples and dictionaries, but
    none of tensors within objects of other classes.

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
        self._buffers = [
            (f"{path}.{name}".lstrip("."), module, name, buffer)
            for path, module in own
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self._containers: list[tuple[str, Any, Any]] = []
        held = {id(buffer): (path, buffer) for path, _, _, buffer in self._buffers}
        for path, _, before in self._attributes:
            for name, value in before.items():
                place = f"{path}.{name}".lstrip(".")
                for found in _within([value]):
                    if isinstance(found, Tensor):
                        held.setdefault(id(found), (place, found))
                    else:
                        self._containers.append((place, found, _items(found)))
        self._numbers = [
            (path, tensor, tensor.detach().clone(), tensor._version)
            for path, tensor in held.values()
            if not tensor.is_inference()  # such tensors cannot be changed in place outside inference mode
        ]

    def changed(self) -> str:
        """Return the path of a buffer, or of an attribute with tensors, that has changed since; "" where none has."""
        return next((path for path, *values in self._changes() if any(map(_has_tensors, values))), "")

    def now(self) -> KeptState:
        """Return a snapshot of the present state: this one, if nothing has changed since.

        Examples:
            >>> kept = KeptState(nn.Linear(2, 1))
            >>> kept.now() is kept
            True
        """
        return self if next(self._changes(), None) is None else KeptState(self._model)

    def restore(self) -> None:
        """Give every attribute and buffer its value back."""
        for _, module, before in self._attributes:
            for name in set(dict(_attributes(module))) - set(before):
                delattr(module, name)
            module.__dict__.update(before)
        for _, value, contents in self._containers:
            if not _is_same(value, contents):
                value.clear()
                value.extend(contents) if isinstance(value, list | deque) else value.update(contents)
        for _, module, name, buffer in self._buffers:
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)
        for index, (path, tensor, values, version) in enumerate(self._numbers):
            if tensor._version != version:
                with torch.no_grad():
                    tensor.detach().copy_(values)
                self._numbers[index] = path, tensor, values, tensor._version

    def _changes(self) -> Iterator[tuple[Any, ...]]:
        """Yield the path of everything that has changed, with its values before and now."""
        for path, module, before in self._attributes:
            now = dict(_attributes(module))
            for name in {**before, **now}:
                old, new = before.get(name, _MISSING), now.get(name, _MISSING)
                if old is not new:
                    yield f"{path}.{name}".lstrip("."), old, new
        for path, value, contents in self._containers:
            if not _is_same(value, contents):
                yield path, contents, value
        for path, module, name, buffer in self._buffers:
            if getattr(module, name, None) is not buffer:
                yield path, buffer
        yield from ((path, tensor) for path, tensor, _, version in self._numbers if tensor._version != version)


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
    with restoring(state.restore):
        yield state


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's own attributes, except PyTorch's."""
    return ((name, value) for name, value in module.__dict__.items() if name not in _OF_PYTORCH)


def _within(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the tensors, lists, dictionaries, sets and deques among the values and within them, each once."""
    pending, seen = deque(values), set[int]()
    while pending:
        value = pending.popleft()
        if is_proxy(value) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                yield value
        elif isinstance(value, list | tuple | dict | set | deque):
            found = cast(Any, value)
            if not isinstance(value, tuple):
                yield found
            items: Iterable[Any] = found.values() if isinstance(value, dict) else found
            pending.extend(item for item in items if type(item) not in PLAIN)


def _items(container: Any) -> Any:
    """Return a plain copy of a container, whose class may not let itself be copied."""
    kind = next((kind for kind in (dict, set) if isinstance(container, kind)), list)
    return kind(container)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(found, Tensor) for found in _within([value]))


def _is_same(value: Any, contents: Any) -> bool:
    """Return whether a container holds the objects that its copy holds, in their order."""
    if len(value) != len(contents):
        return False
    if isinstance(value, dict):
        found, before = cast(dict[Any, Any], value), cast(dict[Any, Any], contents)
        return all(map(is_, found, before)) and all(map(is_, found.values(), before.values()))
    return value == contents if isinstance(value, set) else all(map(is_, value, contents))
