"""Read PyTorch's pickled checkpoints, without running any code in them, and find the state dicts inside.

``torch.load(weights_only=True)`` reads tensors and plain data. Checkpoints of Lightning and other trainers also name
classes and functions (settings, callbacks). Each such name is replaced by an inert :class:`_Unknown`, so that the rest can
be read.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError, reason_of, refusing
from slimlstm.files import check_memory, memory_limit
from slimlstm.weight_files.computed import part_of

_MOST_LISTED = 12

StateDicts = dict[str, dict[str, Tensor]]


class _Attributes(dict[str, Any]):
    """The attributes of an inert object, which take a state of any kind, such as the tuple of a ``functools.partial``."""

    def update(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a mapping, the mappings in a tuple, or any other state."""
        for part in cast(tuple[Any, ...], state) if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                super().update(cast(Mapping[str, Any], part))
            else:
                self.setdefault("state", []).append(part)


class _Unknown:
    """An inert object in the place of an object whose class or function is not loaded."""

    def __new__(cls, *arguments: Any) -> Any:
        """Return an ordered dictionary: PyTorch's unpickler fills it with items and attributes."""
        made = OrderedDict[str, Any]()
        made.__dict__ = _Attributes()
        made.arguments = arguments  # pyright: ignore[reportAttributeAccessIssue] (ordered dictionaries take attributes)
        return made


class _UnknownList:
    """Makes a list in the place of a deque."""

    def __new__(cls, *arguments: Any) -> Any:
        return list(*arguments[:1])


class _UnknownArray:
    """An inert object in the place of an object of NumPy, whose state is no dictionary."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_OF_NAME: dict[str, type] = {"collections.deque": _UnknownList}


def read_state_dicts(path: Path) -> StateDicts:
    """Return the dictionaries of tensors in a checkpoint, by the keys that lead to each, joined by dots; "" for the whole.

    Raises:
        SlimLSTMError: the file is damaged, of a kind that cannot be read without running code, or holds tensors that are no
            plain arrays of numbers.
    """
    with refusing(f"{path} is no intact PyTorch checkpoint"), warnings.catch_warnings():
        # PyTorch warns of old protocols and TorchScript archives, which then load, or fail with an error.
        warnings.simplefilter("ignore")
        _check_declared(path)
        content = _content(path)
        found = dict(_state_dicts(content, "", set()))
        _check_plain(found, path)
    return found


def _check_declared(path: Path) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _check_kind({Path(name).name for name in archive.namelist()}, path)
            check_memory(sum(entry.file_size for entry in archive.infolist()), memory_limit(path), f"the content of {path}")


def _check_kind(names: set[str], path: Path) -> None:
    """Refuse archives of other kinds than checkpoints."""
    if "constants.pkl" in names:
        raise SlimLSTMError(f"{path} is a TorchScript archive, whose code is not run here; save its state_dict() instead")
    if "archive_format" in names:
        raise SlimLSTMError(f"{path} is a program of torch.export; save its state_dict instead")
    if all(name.endswith(".npy") for name in names):
        raise SlimLSTMError(f"{path} holds NumPy arrays; save them as tensors by torch.save or safetensors instead")


def _content(path: Path) -> object:
    unknown = _unknown_names(path)
    kinds = {name: _UnknownArray if name.startswith("numpy.") else _OF_NAME.get(name, _Unknown) for name in unknown}
    stand_ins = [(type(kind.__name__, (kind,), {}), name) for name, kind in kinds.items()]
    try:
        with torch.serialization.safe_globals(cast(Any, stand_ins)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SlimLSTMError(
            f"{path} holds pickled code, which is not run here; load it where its code is and save "
            f"model.state_dict() instead ({_reason_of_unpickler(error)})"
        ) from error
    except KeyError as error:  # an opcode that no pickle has
        raise SlimLSTMError(f"{path} is no intact PyTorch checkpoint: its pickle is damaged or missing") from error


def _reason_of_unpickler(error: BaseException) -> str:
    """Return the reason in a message of PyTorch's unpickler, which begins with advice."""
    return reason_of(ValueError(str(error).rpartition("WeightsUnpickler error:")[2]))


def _unknown_names(path: Path) -> list[str]:
    """Return the names of classes and functions in a checkpoint, except PyTorch's own for tensors.

    Old formats and archives that cannot be searched give none.
    """
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []  # torch.load, which follows, says what is wrong


def _state_dicts(content: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the dictionaries of tensors in a checkpoint, each once, with the path that leads to it."""
    if isinstance(content, Tensor) or id(content) in seen:
        return
    seen.add(id(content))
    items = _items(content)
    tensors = {key: value for key, value in items.items() if isinstance(value, Tensor)}
    _check_named(items, prefix)
    if tensors:
        yield prefix, tensors
    for key, value in items.items():
        yield from _state_dicts(value, f"{prefix}.{key}" if prefix else key, seen)


def _items(content: object) -> dict[str, object]:
    """Return the content of a dictionary, a list, a pickled module or another pickled object, by name."""
    if isinstance(content, (list, tuple, set)):
        return {str(index): value for index, value in enumerate(cast(list[object], content))}
    if not isinstance(content, Mapping):
        return {}
    attributes = cast(dict[str, object], getattr(content, "__dict__", {}))
    if isinstance(attributes.get("_parameters"), Mapping):
        return _module_items(attributes)
    items = {str(key): value for key, value in cast(Mapping[object, object], content).items()}
    return {**{key: value for key, value in attributes.items() if key != "_metadata"}, **items}


def _module_items(attributes: Mapping[str, Any]) -> dict[str, object]:
    """Return the parameters and buffers of a module that was pickled whole, by the names of its ``state_dict``."""
    found: dict[str, object] = {}
    hidden = attributes.get("_non_persistent_buffers_set") or set()
    for group in ("_parameters", "_buffers"):
        own = attributes.get(group) or {}
        found.update({str(key): value for key, value in own.items() if value is not None and key not in hidden})
    for name, module in (attributes.get("_modules") or {}).items():
        inner = cast(dict[str, Any], getattr(module, "__dict__", {}))
        found.update({f"{name}.{key}": value for key, value in _module_items(inner).items()})
    return found


def _check_named(items: Mapping[str, object], prefix: str) -> None:
    """Refuse a recurrent weight that is no tensor, such as a NumPy array, because it would be overlooked."""
    for key, value in items.items():
        part = part_of(key)
        if part is not None and part.place.rpartition(".")[2].startswith("weight") and not isinstance(value, Tensor):
            name = f"{prefix}.{key}" if prefix else key
            raise SlimLSTMError(
                f"{name} is no tensor but {'an object of a class that is not loaded' if value else value!r}; save "
                "a state_dict of tensors instead"
            )


def _check_plain(found: StateDicts, path: Path) -> None:
    """Refuse tensors that are no plain arrays, and views that would take far more memory than the file."""
    tensors = {id(tensor): (f"{prefix}.{name}" if prefix else name, tensor) for prefix, state in found.items()
               for name, tensor in state.items()}  # fmt: skip
    for name, tensor in tensors.values():
        kind = type(tensor).__name__ if type(tensor) not in (Tensor, torch.nn.Parameter) else ""
        kind = kind or ("meta" if tensor.is_meta else "quantised" if tensor.is_quantized else "")
        kind = kind or ("" if tensor.layout == torch.strided and not tensor.is_nested else "sparse or nested")
        if kind:
            raise SlimLSTMError(f"{name} is a {kind} tensor, not a plain array of numbers; save a plain state_dict instead")
    needed = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors.values())
    check_memory(needed, memory_limit(path), f"the tensors of {path}")


def chosen(found: StateDicts, part: str | None, path: Path) -> dict[str, Tensor]:
    """Return the one dictionary of tensors with recurrent weights, or the tensors under ``part``, keys joined by dots.

    Raises:
        SlimLSTMError: several dictionaries have recurrent weights and ``part`` is None, ``part`` names no dictionary, or
            the checkpoint has none.
    """
    if part is not None:
        below = {prefix: state for prefix, state in found.items() if prefix == part or prefix.startswith(f"{part}.")}
        if not below:
            raise SlimLSTMError(f"{path} has no part {part!r}; it has {_listed(found)}")
        return {
            f"{prefix[len(part) + 1 :]}.{name}".removeprefix("."): tensor
            for prefix, state in below.items()
            for name, tensor in state.items()
        }
    recurrent = {prefix: state for prefix, state in found.items() if any(map(part_of, state))} or found
    if len(recurrent) > 1 and any(any(map(part_of, state)) for state in recurrent.values()):
        raise SlimLSTMError(
            f"{path} holds several sets of recurrent weights: {_listed(recurrent)}; say which one is meant, by --part "
            f"{next(iter(recurrent)) or repr('')} or part={next(iter(recurrent))!r}"
        )
    if not found:
        raise SlimLSTMError(f"{path} holds no dictionary of tensors; save model.state_dict() instead")
    return next(iter(recurrent.values()))


def _listed(found: StateDicts) -> str:
    names = [f"{prefix!r} ({len(state)} tensors)" for prefix, state in found.items()]
    return ", ".join(names[:_MOST_LISTED]) + (f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else "")
