"""Tensors with a gradient history that a model's modules hold, such as the hidden state of the last call.

``deepcopy`` refuses such tensors, and they keep the whole graph of a call alive.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.modules.walk import PLAIN, REGISTRIES, held_objects, held_proxies, is_proxy


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, with the values of tensors that have a gradient history instead of these tensors.

    Weak proxies in the copy refer to the same objects.

    Raises:
        SlimLSTMError: the model holds something that cannot be copied.

    Examples:
        >>> import torch
        >>> model = nn.LSTM(3, 4)
        >>> model.last = model(torch.randn(5, 2, 3))
        >>> copy_model(model).last[0].requires_grad
        False
    """
    memo: dict[int, Any] = {id(held): held.detach().clone() for held in held_objects(model) if _has_history(held)}
    memo.update({id(proxy): proxy for proxy in held_proxies(model)})
    try:
        return copy.deepcopy(model, memo)
    except TypeError as error:
        raise SlimLSTMError(
            f"the model cannot be copied ({error}); take what cannot be copied out of it, such as a lock or an open file, "
            "or give its class a __deepcopy__"
        ) from error


@contextmanager
def detaching(model: nn.Module) -> Generator[None]:
    """Detach, at the end of the block, the tensors with a gradient history that modules began to hold within it."""
    before = {id(held): held for held in held_objects(model) if _has_history(held)}
    try:
        yield
    finally:
        seen = set[int]()
        for module in model.modules():
            content = vars(module)
            for name, value in list(content.items()):
                if name not in REGISTRIES and (new := _detached(value, before, seen)) is not value:
                    content[name] = new


def _has_history(held: Any) -> bool:
    return isinstance(held, Tensor) and not held.is_leaf


def _detached(value: Any, before: dict[int, Any], seen: set[int]) -> Any:
    """Return ``value`` without new gradient histories; lists and dictionaries are changed in place, where they hold any.

    Args:
        value: a tensor, a list, dictionary or tuple with tensors, or anything else.
        before: the tensors to leave as they are, by id.
        seen: ids of the lists and dictionaries that were entered before, each of which may hold itself.
    """
    if type(value) in PLAIN or is_proxy(value):
        return value
    if isinstance(value, Tensor):
        return value.detach() if _has_history(value) and id(value) not in before else value
    if isinstance(value, list | dict):
        if id(cast(object, value)) in seen:
            return cast(Any, value)
        seen.add(id(cast(object, value)))
    if isinstance(value, list):
        items = cast(list[Any], value)
        for index, item in enumerate(items):
            if (new := _detached(item, before, seen)) is not item:
                items[index] = new
    elif isinstance(value, dict):
        entries = cast(dict[Any, Any], value)
        for key, item in entries.items():
            if (new := _detached(item, before, seen)) is not item:
                entries[key] = new
    elif isinstance(value, tuple):
        old = cast(tuple[Any, ...], value)
        new = [_detached(item, before, seen) for item in old]
        if any(one is not other for one, other in zip(old, new, strict=True)):
            return type(value)(*new) if hasattr(value, "_fields") else tuple(new)
    return cast(Any, value)
