"""Check the models, batches and functions that a caller gives, before anything else happens."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from slimlstm.errors import SlimLSTMError, described

_OF_PYTORCH = ("torch.nn.functional", "torch.nn.modules.loss", "torch._C._nn")
"""Homes of losses that compare outputs with targets."""


def check_model(model: object) -> None:
    """Raise :class:`SlimLSTMError` unless ``model`` is a module.

    Examples:
        >>> check_model(nn.LSTM(3, 4))
        >>> check_model("model.pt")
        Traceback (most recent call last):
        slimlstm.errors.SlimLSTMError: the model is the text 'model.pt', not an nn.Module; build the model, load its weights
    """
    if isinstance(model, nn.Module):
        return
    remedy = "give the model itself"
    if isinstance(model, str | os.PathLike):
        remedy = "build the model, load its weights into it, and give that; compress_file takes the path of a weight file"
    elif isinstance(model, Mapping):
        remedy = "if it is a state dict, build the model, call its load_state_dict, and give the model"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        remedy = f"make an instance, such as {model.__name__}(...)"
    raise SlimLSTMError(f"the model is {described(model)}, not an nn.Module; {remedy}")


def check_batches(batches: object, name: str = "batches") -> None:
    """Raise :class:`SlimLSTMError` unless ``batches`` is an iterable whose items can be batches.

    A tensor, a mapping or a path can be iterated too, but over rows, keys or letters.

    Examples:
        >>> import torch
        >>> check_batches([torch.ones(5, 2, 3)])
        >>> check_batches(torch.ones(5, 2, 3))
        Traceback (most recent call last):
        slimlstm.errors.SlimLSTMError: batches is a Tensor of shape [5, 2, 3], which would be read row by row; if it is one
    """
    kind = cast(Any, type(batches))
    one = "if it is one batch, give [batch]"
    problem = ""
    if batches is None:
        problem = "and nothing can be run; give a list of batches, or a DataLoader"
    elif isinstance(batches, str | bytes | os.PathLike):
        problem = "not batches; read the file, and give a list of batches or a DataLoader"
    elif isinstance(batches, Mapping):
        problem = f"which would be read key by key; {one}"
    elif isinstance(batches, PackedSequence):
        problem = f"which would be read field by field; {one}"
    elif isinstance(batches, Tensor) or hasattr(kind, "__array__"):
        problem = f"which would be read row by row; {one}"
    elif isinstance(batches, nn.Module):
        problem = "a model and no batches; check the order of the arguments"
    elif not hasattr(kind, "__iter__") and not hasattr(kind, "__getitem__"):
        problem = "which cannot be iterated over; give a list of batches, or a DataLoader"
        if callable(batches):
            problem = "which is not called here; call it, and give the list of batches that it returns"
    if problem:
        raise SlimLSTMError(f"{name} is {described(batches)}, {problem}")


def check_function(function: object, name: str, *arguments: str) -> None:
    """Raise :class:`SlimLSTMError` unless ``function`` can be called with so many arguments.

    Args:
        function: the function that a caller gave.
        name: the name of the caller's argument.
        arguments: the names of the arguments that it is called with, in order.

    Examples:
        >>> check_function(lambda model, batch: model(batch), "loss", "model", "batch")
        >>> check_function(0.5, "loss", "model", "batch")
        Traceback (most recent call last):
        slimlstm.errors.SlimLSTMError: loss is 0.5, not a function; give a function of (model, batch)
    """
    wanted = f"give a function of ({', '.join(arguments)})"
    if not callable(function):
        raise SlimLSTMError(f"{name} is {described(function)}, not a function; {wanted}")
    if isinstance(function, type) and issubclass(function, nn.Module):
        raise SlimLSTMError(f"{name} is {described(function)}, whose instances compute nothing from it; {wanted}")
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # no signature, as in compiled code
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        raise SlimLSTMError(f"{name} is called with ({given}), which it does not take ({error}); {wanted}") from error


def check_loss(loss: object) -> None:
    """Raise :class:`SlimLSTMError` unless ``loss`` can be called with a model and a batch.

    PyTorch's own losses take two arguments as well, outputs and targets, and are refused by their home.

    Examples:
        >>> check_loss(nn.MSELoss())
        Traceback (most recent call last):
        slimlstm.errors.SlimLSTMError: loss is an object of the class MSELoss, which compares outputs with targets; give a
    """
    owner: Any = loss
    while isinstance(owner, partial):
        owner = cast("partial[Any]", owner).func
    owner = type(owner).forward if isinstance(owner, nn.Module) else owner
    if not isinstance(loss, type) and getattr(owner, "__module__", None) in _OF_PYTORCH:
        raise SlimLSTMError(
            f"loss is {described(loss)}, which compares outputs with targets; give a function of (model, batch), such as "
            "lambda model, batch: criterion(model(batch[0]), batch[1])"
        )
    check_function(loss, "loss", "model", "batch")


def check_data(batches: object, loss: object) -> None:
    """Raise :class:`SlimLSTMError` if batches or a loss cannot be used, where they are given, or a loss is given alone.

    Examples:
        >>> check_data(None, None)
        >>> check_data(None, lambda model, batch: model(batch))
        Traceback (most recent call last):
        slimlstm.errors.SlimLSTMError: a loss takes batches to be computed on; give batches= too
    """
    if batches is not None:
        check_batches(batches)
    if loss is not None:
        check_loss(loss)
    if loss is not None and batches is None:
        raise SlimLSTMError("a loss takes batches to be computed on; give batches= too")


def check_repeatable(batches: object) -> None:
    """Raise :class:`SlimLSTMError` if batches can be iterated only once.

    Examples:
        >>> check_repeatable(iter([1, 2]))
        Traceback (most recent call last):
        slimlstm.errors.SlimLSTMError: the batches are an iterator, but are needed more than once; give a list
    """
    if isinstance(batches, Iterator):
        raise SlimLSTMError("the batches are an iterator, but are needed more than once; give a list")
