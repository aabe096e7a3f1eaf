"""Tensors with a gradient history that a model's modules hold, such as the hidden state of the last call.

``deepcopy`` refuses such tensors, and they keep the whole graph of a call alive.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.modules.walk import held_objects, held_proxies


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


def _has_history(held: Any) -> bool:
    return isinstance(held, Tensor) and not held.is_leaf
