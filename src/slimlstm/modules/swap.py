"""Put compressed matrices in the place of a model's own.

The new module is built beside the old one. Then the old object takes over its class and its content in one step, which
can be undone. Because the object stays the same, all references to it see the compressed module, such as those in plain
lists, closures and compiled code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimlstm.methods import DENSE, Replacement, rounded
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.factored import FactoredModule, Provenance, as_parameter, provenance_of
from slimlstm.modules.host import Host, parameter_names
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.masks import apply_mask, mask_of
from slimlstm.modules.modes import plain_defaults, plain_mode
from slimlstm.modules.problems import carried_attributes, own_members
from slimlstm.modules.shapes import clips, lstm_arguments

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
"""The dictionaries of hooks. A successor takes over the same objects, so that the hooks' handles can still remove them."""

_COPIED = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_flat_weights", "_flat_weight_refs")
"""Containers of which a copy of a module gets its own, because it may change them."""


class Swap:
    """Replacements for several hosts, built without changing them; carried out together, and undone together.

    A module keeps its identity, its hooks, its training mode, the parameters and masks that are not replaced, and the
    attributes, buffers and submodules that its class does not need. With masks alone, an LSTM that computes with its own
    parameters keeps its class. Factors and dense weights make it a :class:`slimlstm.modules.FactoredModule`. Weights that
    are parameters already are registered as they are, so that tied matrices can share them.

    Args:
        changes: every host with its replacements by parameter name.
    """

    @plain_mode()
    @plain_defaults()
    def __init__(self, changes: Iterable[tuple[Host, Mapping[str, Replacement]]]) -> None:
        projections: dict[int, nn.Parameter] = {}
        successors = [(host.module, _successor(host, found, projections)) for host, found in changes]
        self._after = [(module, type(successor), vars(successor)) for module, successor in successors]
        self._before = [(module, type(module), vars(module)) for module, _ in successors]

    def commit(self) -> None:
        """Put all successors in place, or none of them if an exception is raised meanwhile."""
        try:
            for module, kind, content in self._after:
                _become(module, kind, content)
        except BaseException:
            try:
                self.undo()
            finally:  # Again, because Ctrl-C may have stopped it.
                self.undo()
            raise

    def undo(self) -> None:
        """Restore every module, with its old class and content."""
        for module, kind, content in self._before:
            _become(module, kind, content)


def _become(module: nn.Module, kind: type[nn.Module], content: dict[str, Any]) -> None:
    # Not through nn.Module.__setattr__, which subclasses override.
    object.__setattr__(module, "__class__", kind)
    object.__setattr__(module, "__dict__", content)


def set_provenance(module: nn.Module, name: str, provenance: Provenance) -> None:
    """Record the origin of the factors or the mask of a matrix."""
    mask = mask_of(module, name)
    if mask is not None:
        mask.provenance = provenance
    elif isinstance(module, FactoredModule):
        module.provenance[name] = provenance


def _successor(host: Host, replacements: Mapping[str, Replacement], projections: dict[int, nn.Parameter]) -> nn.Module:
    """Build the module that takes the host's place. The host does not change.

    ``projections`` holds the projections that were rounded for other hosts, by the ``id`` of the original.
    """
    old = host.lstm
    origins = {name: _origin(old, name, replacement) for name, replacement in replacements.items()}
    factors = {name: found.factors for name, found in replacements.items() if found.factors is not None}
    weights = {name: as_parameter(found.dense) for name, found in replacements.items() if found.dense is not None}
    if isinstance(old, FactoredModule):
        module = _copy(old)
        for name, (u, v) in factors.items():
            module.set_factors(name, u, v)
        for name, weight in weights.items():
            _set_original(module, name, weight)
    elif factors or weights or any(host.is_computed(name) for name in parameter_names(old)):
        module = _rebuilt(host, factors, weights)
    else:
        module = _copy(old)
    for name, replacement in replacements.items():
        if replacement.mask is not None:
            apply_mask(module, name, replacement.mask)
        set_provenance(module, name, origins[name])
        if replacement.storage is not None and isinstance(module, FactoredModule):
            _store(module, name, replacement.storage, projections)
    return module


def _store(module: FactoredModule, name: str, storage: str, projections: dict[int, nn.Parameter]) -> None:
    """Mark a rounded matrix as stored, and round the projection that shares its storage; tied projections stay tied."""
    module.storages[name] = storage
    projection = name.replace("weight_hh", "weight_hr")
    own = module._parameters.get(projection)  # pyright: ignore[reportPrivateUsage] (no getattr, which computes products)
    if projection == name or own is None:
        return
    if id(own) not in projections:
        # While a folder is loaded, the module has its own dtype, and its numbers come later.
        after = rounded(own.detach(), storage) if own.dtype == torch.float32 else own
        projections[id(own)] = own if torch.equal(after, own) else nn.Parameter(after.clone(), own.requires_grad)
    module.register_parameter(projection, projections[id(own)])


def _origin(module: nn.Module, name: str, replacement: Replacement) -> Provenance:
    """Return the origin of a replaced matrix; a matrix that is only rounded keeps its earlier origin."""
    earlier = provenance_of(module, name)
    if replacement.method == DENSE and earlier:
        return earlier
    found = {"method": replacement.method, "source_sha256": replacement.source_sha256}
    return {key: value for key, value in found.items() if value}


def _rebuilt(host: Host, factors: Mapping[str, tuple[Tensor, Tensor]], weights: Mapping[str, nn.Parameter]) -> nn.Module:
    """Build a module with the host's parameters and masks, except where ``factors`` or ``weights`` name a matrix."""
    old = host.lstm
    plain = _plain(old)
    for name, parameter in {**host.dense_parameters(), **weights}.items():
        plain.register_parameter(name, parameter)
    plain.train(old.training)
    is_clipping = any(bound is not None for bound in clips(old).values())
    module: nn.Module = plain
    if factors or weights or is_clipping:
        module = (
            LowRankLSTM.from_dense(plain, factors)
            if isinstance(plain, nn.LSTM)
            else LowRankLSTMCell.from_dense(plain, factors)
        )
    for name in parameter_names(old):
        mask = host.mask(name)
        if mask is not None and name not in factors:
            apply_mask(module, name, mask.mask)
            set_provenance(module, name, mask.provenance)
    vars(module).update({hooks: vars(host.module)[hooks] for hooks in _HOOKS if hooks in vars(host.module)})
    if host.module is old:
        _carry_over(old, module)
    return module


def _plain(old: nn.Module) -> nn.LSTM | nn.LSTMCell:
    """Build an ``nn.LSTM`` or ``nn.LSTMCell`` with the arguments of ``old``, without numbers."""
    if isinstance(old, nn.LSTM):
        lstm = nn.LSTM(**lstm_arguments(old), device="meta")
        for name, bound in clips(old).items():
            setattr(lstm, name, bound)
        return lstm
    cell = cast(nn.LSTMCell, old)
    return nn.LSTMCell(cell.input_size, cell.hidden_size, cell.bias, device="meta")


def _carry_over(old: nn.Module, module: nn.Module) -> None:
    """Give ``module`` everything that ``old`` carries beside its LSTM: attributes, parameters, buffers, submodules."""
    known = set(parameter_names(old))
    for name, parameter in old._parameters.items():  # pyright: ignore[reportPrivateUsage] (None entries included)
        if name not in known:
            module.register_parameter(name, parameter)
    persistent = set(old.state_dict(keep_vars=True))
    for name, buffer in old.named_buffers(recurse=False):
        module.register_buffer(name, buffer, persistent=name in persistent)
    for name, child in old.named_children():
        if name != "parametrizations":
            module.register_module(name, child)
    data = {name: value for name, value in own_members(old).items() if not hasattr(value, "__get__")}
    for name, value in {**data, **carried_attributes(old)}.items():
        if not hasattr(module, name):
            # Not by setattr, which would register a module that old holds unregistered, and fails for dead weak proxies.
            vars(module)[name] = value
    if "_compiled_call_impl" in vars(old):
        vars(module)["_compiled_call_impl"] = vars(old)["_compiled_call_impl"]


def _copy(module: Any) -> Any:
    """Return a copy that shares all tensors and hooks with ``module``, but has its own registrations."""
    kind: Any = type(module)
    content = FactoredModule.__getstate__(module) if isinstance(module, FactoredModule) else dict(vars(module))
    if parametrize.is_parametrized(module):
        # The class was made for this module alone, and has a property for every parametrized tensor.
        members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        kind = type(kind.__name__, kind.__bases__, members)
    for name in (*_COPIED, "storages", "provenance"):
        if name in content:
            content[name] = content[name].copy()
    content["_modules"] = dict(content["_modules"])
    stacks = content["_modules"].get("parametrizations")
    if stacks is not None:
        content["_modules"]["parametrizations"] = _copy_tree(stacks)
    copy = kind.__new__(kind)
    object.__setattr__(copy, "__dict__", content)
    return copy


def _copy_tree(module: nn.Module) -> nn.Module:
    """Return a copy of a module and all within that shares its tensors."""
    content = dict(vars(module))
    for name in ("_parameters", "_buffers"):
        content[name] = dict(content[name])
    content["_modules"] = {
        name: None if child is None else _copy_tree(child) for name, child in content["_modules"].items()
    }
    copy = type(module).__new__(type(module))
    object.__setattr__(copy, "__dict__", content)
    return copy


def _set_original(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Register a dense parameter as a weight, or as the weight below its mask."""
    if parametrize.is_parametrized(module, name):
        module.get_submodule(f"parametrizations.{name}").original = weight
    else:
        setattr(module, name, weight)
