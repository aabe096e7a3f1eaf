"""Find the reasons why a module's matrices cannot be compressed, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from slimlstm.modules.factored import FactoredModule
from slimlstm.modules.host import Host, parameter_names
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.walk import held_objects
from slimlstm.modules.weight_drop import RAW, only_calls

_DISTRIBUTED = {
    "DistributedDataParallel": "whose reducer would never see the new parameters",
    "FullyShardedDataParallel": "which has flattened and sharded its parameters",
    "FSDPModule": "which has sharded its parameters",
}
"""PyTorch's wrappers that hold on to the parameters of the model within, by class name, and what replacing these breaks."""

_HARMLESS = {
    *("__init__", "__repr__", "__str__", "extra_repr", "reset_parameters", "flatten_parameters"),
    *("__doc__", "__module__", "__qualname__", "__annotations__", "__annotate_func__", "__annotations_cache__"),
    *("__dict__", "__weakref__", "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__"),
    *("__abstractmethods__", "_abc_impl", "__constants__", "__jit_unused_properties__", "__classcell__"),
}
"""Members of a subclass that a replacement does not need."""

_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

_CALL_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def problem_of(host: Host, ancestors: Sequence[nn.Module], methods: Sequence[str]) -> str | None:
    """Return why a host's matrices cannot be compressed, or None.

    Args:
        host: the host.
        ancestors: all modules around it in the model.
        methods: the names of its bound methods that the model stores; see :func:`stored_methods`.
    """
    return next(_problems(host, ancestors, methods), None)


def _problems(host: Host, ancestors: Sequence[nn.Module], methods: Sequence[str]) -> Iterator[str]:
    """Yield every problem as a sentence; the first one is enough."""
    lstm = host.lstm
    where, kind = f"{host.paths[0]!r}" if host.paths[0] else "the model itself", type(lstm).__name__
    if isinstance(lstm, torch.jit.ScriptModule):
        yield f"{where} is a torch.jit module, whose code cannot be changed; compress the model before scripting it"
        return
    if is_quantised(lstm):
        yield f"{where} is a quantised {kind}, whose weights are packed; compress the float model and quantise after"
        return
    yield from _distributed(where, lstm, ancestors)
    if isinstance(lstm, FactoredModule):
        yield from _computed_factors(where, lstm)
        return
    if any(vars(module).get("_modules", {}).get("_orig_mod") is host.module for module in ancestors):
        yield f"{where} is wrapped by torch.compile, which holds the old code; compress the model first, then compile it"
    yield from _own_code(where, lstm)
    yield from _own_hooks(where, host)
    if host.module is not lstm and not only_calls(host.module, lstm):
        yield (
            f"{where} is a {type(host.module).__name__}, which computes weights of its LSTM and does more than call it "
            "with its own arguments: that would be lost; move that code into the module around it"
        )
        return
    if methods:
        yield (
            f"{', '.join(methods)} of {where} is stored as a bound method, which would go on computing with the old class; "
            "store the module itself instead"
        )
    known = dict(lstm.named_parameters(recurse=False))
    every = dict(lstm.named_parameters(recurse=False, remove_duplicate=False))
    for name in parameter_names(lstm):
        if name not in known and name in every and every[name] is not every.get(name + RAW):
            first = next(other for other, parameter in known.items() if parameter is every[name])
            yield f"{name} and {first} of {where} are one parameter; give the LSTM a clone of it first"
        elif name not in known and host.is_plain(name):
            yield (
                f"{name} of {where} is no parameter but computed by a hook (old weight_norm or prune?); remove the hook "
                "first, with remove_weight_norm or torch.nn.utils.prune.remove"
            )
            return
        if host.parameter(name).is_meta:
            yield (
                f"{where} is on the meta device and holds no numbers; load the weights first, or give it memory with "
                "model.to_empty(device='cpu')"
            )
            return


def _distributed(where: str, lstm: nn.Module, ancestors: Sequence[nn.Module]) -> Iterator[str]:
    for module in (*ancestors, lstm):
        names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
        for name, reason in _DISTRIBUTED.items():
            if name in names:
                yield f"{where} is inside {name}, {reason}; compress the model first, and wrap it after"
    for parameter in lstm.parameters():
        if type(parameter.data).__name__ == "DTensor":
            yield f"the parameters of {where} are distributed tensors; compress the model first, and distribute it after"


def _computed_factors(where: str, lstm: FactoredModule) -> Iterator[str]:
    for name in lstm.ranks:
        for part in (f"{name}_u", f"{name}_v"):
            if part in lstm._parameters:  # pyright: ignore[reportPrivateUsage] (faster and stricter than getattr)
                continue
            if parametrize.is_parametrized(lstm, part):
                yield (
                    f"{part} of {where} is parametrized; remove the parametrization first, with "
                    "torch.nn.utils.parametrize.remove_parametrizations"
                )
            else:
                yield (
                    f"{part} of {where} is no parameter but computed by a hook; remove the hook first, with "
                    "torch.nn.utils.prune.remove"
                )


def _own_code(where: str, lstm: nn.Module) -> Iterator[str]:
    """Yield the problems with members of a subclass, or of the instance, that a plain LSTM does not have."""
    base = nn.LSTM if isinstance(lstm, nn.LSTM) else nn.LSTMCell
    patched = [
        name
        for name, value in vars(lstm).items()
        if callable(getattr(base, name, None)) and not _is_own_method(lstm, name, value)
    ]
    if patched:
        yield f"{', '.join(patched)} of {where} was replaced on the instance, which would be lost; undo that first"
    own = own_members(lstm)
    can_clip = hasattr(lstm, "cell_clip") or hasattr(lstm, "proj_clip")
    lost = [name for name, value in own.items() if hasattr(value, "__get__")]
    if can_clip:
        # Code of the clipping forward pass, which LowRankLSTM has too.
        lost = [name for name in lost if name != "forward" and (not name.startswith("_") or hasattr(base, name))]
    if lost:
        kind = type(lstm).__name__
        yield (
            f"{where} is a {kind}, whose {', '.join(lost)} would be lost: a plain {base.__name__} computes in its place; "
            "move that code into the module around it"
        )
    data = [name for name in (*own, *carried_attributes(lstm)) if name not in lost and _is_taken(name)]
    if data and not can_clip:
        yield f"{where} has an attribute {data[0]} of its own, which its replacement uses otherwise; rename it"


def _is_own_method(module: nn.Module, name: str, value: Any) -> bool:
    """Return whether an attribute is the very method of that name that the module's class has."""
    return type(value) is MethodType and value.__self__ is module and value.__func__ is getattr(type(module), name, None)


def own_members(lstm: nn.Module) -> dict[str, Any]:
    """Return the members that a subclass of ``nn.LSTM`` or ``nn.LSTMCell`` adds or overrides, by name."""
    base = nn.LSTM if isinstance(lstm, nn.LSTM) else nn.LSTMCell
    classes = [cls for cls in type(lstm).__mro__ if cls not in base.__mro__]
    if parametrize.is_parametrized(lstm):
        classes = classes[1:]  # the class that parametrize made for this instance
    return {name: value for cls in reversed(classes) for name, value in vars(cls).items() if name not in _HARMLESS}


def carried_attributes(lstm: nn.Module) -> dict[str, Any]:
    """Return the instance attributes that a plain ``nn.LSTM`` or ``nn.LSTMCell`` does not have, by name."""
    plain = nn.LSTM(1, 1, device="meta") if isinstance(lstm, nn.LSTM) else nn.LSTMCell(1, 1, device="meta")
    known = {*vars(plain), *parameter_names(lstm), "cell_clip", "proj_clip", "_compiled_call_impl", "forward"}
    return {name: value for name, value in vars(lstm).items() if name not in known}


def _is_taken(name: str) -> bool:
    return hasattr(LowRankLSTM, name) or name in ("provenance", "storages", "matrix_shapes", "backend")


def _own_hooks(where: str, host: Host) -> Iterator[str]:
    for hooks in _STATE_DICT_HOOKS:
        foreign = [hook for hook in getattr(host.module, hooks, {}).values() if not _is_pytorchs(hook)]
        if foreign:
            yield f"{where} has hooks on its state_dict, which may need weights that compression removes; remove them first"
    if host.module is not host.lstm and any(getattr(host.lstm, hooks) for hooks in _CALL_HOOKS):
        yield f"the LSTM inside {where} has hooks, which would be lost with weight drop; register them on {where} instead"


def _is_pytorchs(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def stored_methods(model: nn.Module, modules: Iterable[nn.Module]) -> dict[int, list[str]]:
    """Return the names of methods that ``model`` stores, bound to one of ``modules``, by the ``id`` of that module.

    A module keeps its identity when it is compressed, so references to it stay valid. A bound method keeps the function of
    the old class, so it does not. Methods of ``nn.Module`` itself work with every class.
    """
    modules = list(modules)
    wanted = {id(module) for module in modules}
    own = {id(value) for module in modules for name, value in vars(module).items() if _is_own_method(module, name, value)}
    found: dict[int, list[str]] = {}
    for held in held_objects(model) if wanted else ():
        if isinstance(held, MethodType) and id(held.__self__) in wanted and id(held) not in own:
            name = held.__func__.__name__
            if getattr(nn.Module, name, None) is not held.__func__ and name not in found.get(id(held.__self__), []):
                found.setdefault(id(held.__self__), []).append(name)
    return found


def is_quantised(module: nn.Module) -> bool:
    """Return whether a module is one of PyTorch's quantised LSTMs."""
    kind = type(module)
    return kind.__module__.startswith("torch.ao.nn.quant") and kind.__name__ in ("LSTM", "LSTMCell")
