"""Walk through the plain Python objects that a model's modules hold beside their parameters, buffers and submodules."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast
from weakref import ProxyTypes

from torch import Tensor, nn

_LEAVES = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, nn.Parameter)
PLAIN = frozenset({str, bytes, int, bool, type(None)})
"""Types of objects that hold nothing, and of which models may hold very many, as in vocabularies."""
REGISTRIES = ("_parameters", "_buffers", "_modules")
"""The attributes of a module that hold its parameters, buffers and submodules."""


def held_objects(model: nn.Module) -> Iterator[Any]:
    """Yield every object that a module of ``model`` holds as an attribute or within one, each once, but :data:`PLAIN` ones.

    The walk enters lists, tuples, sets, mappings, partial functions, closures and the attributes of plain objects, but not
    tensors. It leaves weak proxies out: a module does not own their object, and a proxy raises once its object is gone.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> model.cache = {"answers": [41, 42.5]}
        >>> [found for found in held_objects(model) if isinstance(found, float)]
        [42.5]
    """
    return (found for found in _walk(model) if not is_proxy(found))


def held_proxies(model: nn.Module) -> Iterator[Any]:
    """Yield every ``weakref.proxy`` that :func:`held_objects` leaves out."""
    return (found for found in _walk(model) if is_proxy(found))


def is_proxy(found: Any) -> bool:
    """Return whether an object is a ``weakref.proxy``; ``isinstance`` would ask the object behind the proxy."""
    return type(found) in ProxyTypes


def _walk(model: nn.Module) -> Iterator[Any]:
    """Yield what the modules hold, proxies included."""
    seen = {id(module) for module in model.modules()}
    pending: deque[Any] = deque()
    for module in model.modules():
        pending.extend(value for name, value in vars(module).items() if name not in REGISTRIES and type(value) not in PLAIN)
    while pending:
        found = pending.popleft()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        if not is_proxy(found) and not isinstance(found, (*_LEAVES, Tensor)):
            pending.extend(held for held in _within(found) if type(held) not in PLAIN)


def _within(found: Any) -> Iterable[Any]:
    """Return the objects that another object holds."""
    if isinstance(found, Mapping):
        return cast(Mapping[Any, Any], found).values()
    if isinstance(found, list | tuple | set | frozenset | deque):
        return cast(Iterable[Any], found)
    if isinstance(found, partial):
        return [found.func, *found.args, *found.keywords.values()]
    if isinstance(found, MethodType):
        return [found.__self__]
    if isinstance(found, FunctionType):
        return _closure(found)
    content = getattr(found, "__dict__", None)
    return content.values() if isinstance(content, dict) and not isinstance(found, nn.Module) else ()


def _closure(function: FunctionType) -> list[Any]:
    values: list[Any] = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # a variable without a value
            continue
    return values
