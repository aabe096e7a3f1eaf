"""Put factors, masks and weights in the place of a model's recurrent matrices."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimlstm.methods import DENSE, Replacement
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.factored import FactoredModule, Provenance, as_parameter
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


def replace(model: nn.Module, host: Host, replacements: Mapping[str, Replacement]) -> nn.Module:
    """Put replacements, by parameter name, into the host's place in ``model``; everything else stays.

    The new module takes over the parameters that stay, existing masks, hooks, and the training mode. Where the replacements
    are masks alone, an LSTM that computes with its own parameters stays the same object. Factors and dense weights make it
    a :class:`slimlstm.modules.FactoredModule`. Weights that are parameters are taken as they are, so that tied matrices can
    share them.

    Returns:
        The module that now computes.
    """
    module = host.lstm
    origins = {name: _origin(host.lstm, name, replacement) for name, replacement in replacements.items()}
    factors = {name: found.factors for name, found in replacements.items() if found.factors is not None}
    weights = {name: as_parameter(found.dense) for name, found in replacements.items() if found.dense is not None}
    if isinstance(module, FactoredModule):
        for name, (u, v) in factors.items():
            module.set_factors(name, u, v)
        for name, weight in weights.items():
            _set_original(module, name, weight)
    elif factors or weights or any(host.is_computed(name) for name in parameter_names(module)):
        module = _successor(host, factors, weights)
        for path in host.paths:
            model.set_submodule(path, module)
    for name, replacement in replacements.items():
        if replacement.mask is not None:
            apply_mask(module, name, replacement.mask)
        set_provenance(module, name, origins[name])
        if replacement.storage is not None and isinstance(module, FactoredModule):
            module.storages[name] = replacement.storage
    return module


def _origin(module: nn.Module, name: str, replacement: Replacement) -> Provenance:
    """Return where a replacement comes from; a matrix that is only rounded keeps its earlier origin."""
    earlier = provenance_of(module, name)
    if replacement.method == DENSE and earlier:
        return earlier
    found = {"method": replacement.method, "source_sha256": replacement.source_sha256}
    return {key: value for key, value in found.items() if value}


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
