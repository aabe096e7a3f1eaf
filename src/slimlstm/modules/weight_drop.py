"""Recognise weight-drop wrappers (Merity, Keskar and Socher 2018, arXiv 1708.02182), which compression replaces."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm.modules.modes import evaluation_mode, restoring
from slimlstm.modules.state import kept_state

RAW = "_raw"
"""The ending of the parameters that weight drop computes weights from."""


def is_weight_drop(parent: nn.Module, module: nn.Module, matrices: Sequence[str]) -> bool:
    """Return whether ``parent`` computes weights of ``module`` from ``weight_..._raw`` parameters.

    Args:
        parent: the module around ``module``.
        module: the LSTM or cell.
        matrices: the names of its recurrent matrices.

    Examples:
        >>> is_weight_drop(nn.Sequential(nn.LSTM(3, 4)), nn.LSTM(3, 4), ["weight_ih_l0", "weight_hh_l0"])
        False
    """
    if not isinstance(module, nn.LSTM | nn.LSTMCell):
        return False
    own = [name for name, _ in parent.named_parameters(recurse=False)]
    inner = [name for name, _ in module.named_parameters(recurse=False)]
    raw = {name + RAW for name in matrices}
    return not raw.isdisjoint(own) or (not raw.isdisjoint(inner) and list(parent.children()) == [module])


def only_calls(wrapper: nn.Module, lstm: nn.Module) -> bool:
    """Return whether ``wrapper`` hands its arguments to ``lstm`` and returns the result, both unchanged.

    It is called in evaluation mode, with a recorder in place of the LSTM's forward pass; afterwards both modules are as
    they were.

    Examples:
        >>> only_calls(nn.Sequential(nn.LSTM(3, 4)), nn.LSTM(3, 4))
        False
    """
    like, batch = next(wrapper.parameters()), (1,) * (1 + isinstance(lstm, nn.LSTM))
    sizes = (int(getattr(lstm, name)) for name in ("input_size", "hidden_size", "hidden_size"))
    x, *state = (like.new_zeros(*batch, size) for size in sizes)
    return all(_passes(wrapper, lstm, arguments) for arguments in ((x,), (x, tuple(state))))


def _passes(wrapper: nn.Module, lstm: nn.Module, arguments: tuple[Any, ...]) -> bool:
    calls: list[tuple[Any, ...]] = []
    result = torch.zeros(()), (torch.zeros(()), torch.zeros(()))

    def record(input: Any, hx: Any = None) -> Any:
        calls.append((input,) if hx is None else (input, hx))
        return result

    with _unchanged(wrapper, lstm), torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(wrapper):
        vars(lstm)["forward"] = record
        try:
            returned = wrapper.forward(*arguments)
        except Exception:
            return False  # The wrapper takes other arguments than its LSTM.
    return len(calls) == 1 and _are_same(calls[0], arguments) and _are_same(returned, result)


def _are_same(one: Any, other: Any) -> bool:
    """Return whether two tuples hold the very same tensors."""
    if isinstance(other, Tensor):
        return one is other
    return isinstance(one, tuple | list) and len(one) == len(other) and all(map(_are_same, one, other))


@contextmanager
def _unchanged(wrapper: nn.Module, lstm: nn.Module) -> Generator[None]:
    """Restore the state, the parameters and PyTorch's list of the LSTM's weights after the block."""
    tables: list[dict[str, Any]] = [vars(module)["_parameters"] for module in (wrapper, lstm)]
    weights: list[Any] = vars(lstm).get("_flat_weights", [])
    before, weights_before = [dict(table) for table in tables], list(weights)

    def restore() -> None:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
        weights[:] = weights_before

    with kept_state(wrapper), restoring(restore):
        yield
