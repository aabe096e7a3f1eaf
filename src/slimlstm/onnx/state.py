"""Watch and restore the state that a model keeps in attributes and buffers, because an ONNX file keeps no state."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]  # the public name is of newer versions

from slimlstm.errors import SlimLSTMError
from slimlstm.modules.modes import surely

_MISSING = object()


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
        own = [pair for pair in model.named_modules() if not type(pair[1]).__module__.startswith("slimlstm.")]
        self._attributes = [(path, module, dict(_attributes(module))) for path, module in own]
        self._containers = [
            (value, copy.copy(value))
            for _, _, before in self._attributes
            for value in before.values()
            if type(value) in (list, dict)
        ]
        self._buffers = [
            (f"{path}.{name}".lstrip("."), module, name, buffer, buffer.clone(), buffer._version)
            for path, module in own
            for name, buffer in module.named_buffers(recurse=False)
            if not buffer.is_inference()  # such buffers cannot be changed in place outside inference mode
        ]

    def changed(self) -> str:
        """Return the path of a buffer, or of an attribute with tensors, that has changed since; "" where none has."""
        return next(self._changes(), "")

    def restore(self) -> None:
        """Give every attribute and buffer its value back."""
        for _, module, before in self._attributes:
            for name in set(dict(_attributes(module))) - set(before):
                delattr(module, name)
            module.__dict__.update(before)
        for value, contents in self._containers:
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
        for index, (path, module, name, buffer, values, version) in enumerate(self._buffers):
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(values)
                self._buffers[index] = path, module, name, buffer, values, buffer._version
            setattr(module, name, buffer)

    def _changes(self) -> Iterator[str]:
        for path, module, before in self._attributes:
            now = dict(_attributes(module))
            for name in {**before, **now}:
                old, new = before.get(name, _MISSING), now.get(name, _MISSING)
                if old is not new and (_has_tensors(old) or _has_tensors(new)):
                    yield f"{path}.{name}".lstrip(".")
        for path, module, name, buffer, _, version in self._buffers:
            if getattr(module, name, None) is not buffer or buffer._version != version:
                yield path


@contextmanager
def kept_state(model: nn.Module) -> Generator[KeptState]:
    """Restore a model's attributes and buffers after the block.

    Raises:
        SlimLSTMError: the block raised one; the message then names a tensor of the model that had changed meanwhile.
    """
    state = KeptState(model)
    try:
        yield state
    except SlimLSTMError as error:
        name = state.changed()
        if not name:
            raise
        raise SlimLSTMError(
            f"the model keeps {name} from call to call, and an ONNX file keeps nothing; take it as an argument and return "
            f"its new value, so that it becomes an input and an output. The export ended with: {error}"
        ) from error
    finally:
        surely(state.restore)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's own attributes, except PyTorch's and private ones, which begin with an underscore."""
    return ((name, value) for name, value in module.__dict__.items() if not name.startswith("_") and name != "training")


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
