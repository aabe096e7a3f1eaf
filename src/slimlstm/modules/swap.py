"""Put factors, masks and weights in the place of a model's recurrent matrices."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.factored import FactoredModule, Provenance
from slimlstm.modules.hosts import Host, matrix_shapes, parameter_names
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.masks import apply_mask, mask_of
from slimlstm.modules.shapes import clips, lstm_arguments

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def replace(
    model: nn.Module,
    host: Host,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    masks: Mapping[str, Tensor],
    weights: Mapping[str, nn.Parameter],
    provenance: Mapping[str, Provenance],
) -> nn.Module:
    """Puts factors, masks and dense weights, by parameter name, into the host's place in ``model``; the rest stays.

    The new module, which is returned, takes over the parameters that stay, existing masks, hooks, and training mode.
    Where only masks are asked for, an LSTM that computes with its own parameters stays the same object; factors and
    weights make it a module of :mod:`slimlstm.modules.lstm`.
    """
    module = host.lstm
    if isinstance(module, FactoredModule):
        for name, (u, v) in factors.items():
            module.set_factors(name, u, v)
        for name, weight in weights.items():
            _set_original(module, name, weight)
    elif factors or weights or any(host.is_computed(name) for name in parameter_names(module)):
        module = _successor(host, factors, weights)
        for path in host.paths:
            model.set_submodule(path, module)
    for name, mask in masks.items():
        apply_mask(module, name, mask)
    for name, origin in provenance.items():
        set_provenance(module, name, origin)
    return module


def provenance_of(module: nn.Module, name: str) -> Provenance:
    """Where the factors or the mask of a matrix come from; empty where it has neither."""
    mask = mask_of(module, name)
    if mask is not None:
        return mask.provenance
    return module.provenance.get(name, {}) if isinstance(module, FactoredModule) else {}


def set_provenance(module: nn.Module, name: str, provenance: Provenance) -> None:
    """Notes where the factors or the mask of a matrix come from."""
    mask = mask_of(module, name)
    if mask is not None:
        mask.provenance = provenance
    elif isinstance(module, FactoredModule):
        module.provenance[name] = provenance


def _successor(host: Host, factors: Mapping[str, tuple[Tensor, Tensor]], weights: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module with the host's parameters and masks, the matrices in ``factors`` and ``weights`` replaced."""
    old = host.lstm
    if isinstance(old, nn.LSTM):
        plain = nn.LSTM(**lstm_arguments(old), device="meta")
        for name, bound in clips(old).items():
            setattr(plain, name, bound)
        make = LowRankLSTM.from_dense
    else:
        assert isinstance(old, nn.LSTMCell)  # noqa: S101 (find_hosts knows no other kind)
        plain = nn.LSTMCell(old.input_size, old.hidden_size, old.bias, device="meta")
        make = LowRankLSTMCell.from_dense
    for name, parameter in {**host.dense_parameters(), **weights}.items():
        plain.register_parameter(name, parameter)
    plain.train(old.training)
    module = make(plain, factors) if factors or weights or _is_clipping(old) else plain  # pyright: ignore[reportArgumentType] (one kind each)
    for name in matrix_shapes(old):
        mask = host.mask(name)
        if mask is not None and name not in factors:
            apply_mask(module, name, mask.mask)
            set_provenance(module, name, mask.provenance)
    for hooks in _HOOKS:
        setattr(module, hooks, getattr(host.module, hooks))
    return module


def _set_original(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Puts a dense parameter in the place of the one that ``name`` is, or that a mask is laid on."""
    if parametrize.is_parametrized(module, name):
        module.get_submodule(f"parametrizations.{name}").original = weight
    else:
        setattr(module, name, weight)


def _is_clipping(lstm: nn.Module) -> bool:
    """Whether an LSTM clips its cells or projections to its ``cell_clip`` and ``proj_clip``, as ELMo's do."""
    return any(bound is not None for bound in clips(lstm).values())
