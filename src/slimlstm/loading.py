"""``load``: turn a fresh dense model into the compressed model in a folder."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError, reason_of, refusing
from slimlstm.files import path_of
from slimlstm.folders import CONFIG, read_folder
from slimlstm.methods import Replacement
from slimlstm.modules.graphs import copy_model
from slimlstm.modules.hosts import Host, check_materialised, find_hosts
from slimlstm.modules.modes import plain_defaults, plain_mode
from slimlstm.modules.sites import Site
from slimlstm.modules.swap import Swap

_COMPILED = "_orig_mod"
"""The component that ``torch.compile`` adds to names."""


@plain_mode()
@plain_defaults()
def load(folder: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Turn a fresh dense ``model`` into the compressed model in ``folder``, bit for bit.

    ``model`` is changed in place and returned. Its LSTMs are replaced, and all parameters and persistent buffers get the
    saved numbers and dtypes, on their present devices. If all names on one side have a prefix that the names on the other
    side lack, such as ``module.`` of ``DistributedDataParallel``, the prefix is ignored. ``_orig_mod`` of ``torch.compile``
    is ignored too.

    Args:
        folder: a folder that :func:`slimlstm.save` or :func:`slimlstm.compress_file` wrote.
        model: a model of the class of the uncompressed model.

    Raises:
        SlimLSTMError: the folder is incomplete, damaged or altered, or belongs to a model with other names or shapes. The
            model has not changed then.
    """
    folder = path_of(folder, "folder", "call load(folder, model)")
    check_materialised(model)
    config, stored = read_folder(folder)
    sites, tensors = _with_names_of(model, config["sites"], stored)
    # Try on a copy first, so that an error leaves the model as it was.
    trial = copy_model(model)
    with refusing(f"{folder} does not fit the model"):
        _rebuild(trial, sites, tensors).commit()
        _complete(trial, tensors)
        _check_fit(trial, tensors)
        _fill(trial, tensors)
        _check_filled(trial, tensors)
    swap = _rebuild(model, sites, tensors)
    before: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        swap.commit()
        before += [(target, target.data, target.data.clone()) for target in _tensors(model).values()]
        _fill(model, tensors)
    except BaseException:
        for target, data, numbers in before:
            target.data = numbers if data.is_inference() or _overlaps(data) else data.copy_(numbers)
        swap.undo()
        raise
    return model


def _with_names_of(
    model: nn.Module, sites: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Tensor]]:
    """Return a folder's sites and tensors by the names that they have in ``model``."""
    paths = {_plain(path): path for path, _ in model.named_modules(remove_duplicate=False)}
    known = {_plain(site.key) for host in find_hosts(model) for site in host.sites()}
    shift = _shift({_plain(key) for key in sites}, known, [_plain(name) for name in tensors])

    def name_in_model(name: str) -> str:
        parts = shift(_plain(name)).split(".")
        depth = next(depth for depth in range(len(parts), -1, -1) if ".".join(parts[:depth]) in paths)
        return ".".join(part for part in (paths[".".join(parts[:depth])], *parts[depth:]) if part)

    renamed = {name_in_model(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise SlimLSTMError(f"the folder has names that differ only in {_COMPILED}; save a model without copies of itself")
    return {name_in_model(key): entry for key, entry in sites.items()}, renamed


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _shift(sites: set[str], known: set[str], names: Iterable[str]) -> Callable[[str], str]:
    """Return a function that removes or adds the prefix of a wrapper, so that ``sites`` are among ``known``."""
    first = min(sites, default="")
    for key in () if sites <= known else sorted(known):
        surplus, missing = first.removesuffix(f".{key}"), key.removesuffix(f".{first}")
        if surplus != first and all(name.startswith(f"{surplus}.") for name in names):
            start = f"{surplus}."
            if {site.removeprefix(start) for site in sites} <= known:
                return lambda name: name.removeprefix(start)
        if missing != key and {f"{missing}.{site}" for site in sites} <= known:
            return lambda name: f"{missing}.{name}"
    return lambda name: name


def _rebuild(model: nn.Module, sites: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> Swap:
    """Build factors, masks and weights of the right shapes for ``model``'s sites; their numbers are filled in later."""
    hosts = find_hosts(model)
    _check_sites({site.key: site for host in hosts for site in host.sites()}, sites, tensors)
    # Keep the present parameters alive, so that no new one gets the id of an old one.
    present = [host.parameter(site.name) for host in hosts for site in host.sites()]
    shared: dict[Hashable, Tensor | tuple[Tensor, Tensor]] = {}
    changes: list[tuple[Host, Mapping[str, Replacement]]] = []
    for host in hosts:
        found: dict[str, Replacement] = {}
        for site in host.sites():
            if site.key in sites:
                mask = tensors.get(f"{site.module}.parametrizations.{site.name}.0.mask".removeprefix("."))
                found[site.name] = _blank(host, site.name, sites[site.key], shared, mask)
        if found:
            changes.append((host, found))
    swap = Swap(changes)
    del present
    return swap


def _blank(
    host: Host,
    name: str,
    entry: Mapping[str, Any],
    shared: dict[Hashable, Tensor | tuple[Tensor, Tensor]],
    stored_mask: Tensor | None,
) -> Replacement:
    """Return a replacement with parameters of the right shapes; tied matrices share theirs and their mask by ``shared``."""
    (m, n), like, trained = entry["shape"], host.matrix(name), host.is_trained(name)
    place = host.identity(name), entry.get("rank"), entry.get("storage")
    weight: Tensor | tuple[Tensor, Tensor] | None = None
    if "rank" in entry:
        u, v = (nn.Parameter(like.new_zeros(size), trained) for size in ((m, entry["rank"]), (entry["rank"], n)))
        weight = shared.setdefault(place, (u, v))
    elif "storage" in entry:
        weight = shared.setdefault(place, nn.Parameter(like.clone(), trained))
    mask: Any = None
    if "kept" in entry:
        mask = shared.setdefault((*place, id(stored_mask)), like.new_ones(m, n, dtype=torch.bool))
    method, source = entry.get("method", ""), entry.get("source_sha256", "")
    return Replacement(weight, method, source, mask, entry.get("storage"))


def _check_sites(known: Mapping[str, Site], sites: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    for key, entry in sites.items():
        if key not in known:
            raise SlimLSTMError(
                f"the folder's {key} is not in the model, which has {', '.join(known) or 'no LSTM'}; load into a model of "
                "the class that was saved"
            )
        if list(known[key].shape) != entry["shape"]:
            raise SlimLSTMError(
                f"{key} is {entry['shape']} in the folder, {list(known[key].shape)} in the model; load into a model of the "
                "same sizes"
            )
        u = tensors.get(f"{key}_u")
        if "rank" in entry and (u is None or list(u.shape) != [entry["shape"][0], entry["rank"]] or not u.numel()):
            raise SlimLSTMError(
                f"{CONFIG} gives {key} rank {entry['rank']!r}, which its tensors do not have; save the model again"
            )
        if "rank" not in entry and known[key].rank is not None:
            what = "masked" if "kept" in entry else "dense"
            raise SlimLSTMError(f"{key} is {what} in the folder, but factored in the model; load into a fresh dense model")
        problem = known[key].problem
        if problem is not None:
            raise SlimLSTMError(problem)
    for key, site in known.items():
        if site.storage not in (None, sites.get(key, {}).get("storage")):
            raise SlimLSTMError(f"{key} is {site.storage} in the model, not in the folder; load into a fresh dense model")


def _complete(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Add entries for the other names that shared parameters have in ``model``."""
    expected = _tensors(model)
    stored = {id(target): name for name, target in expected.items() if name in tensors}
    for name, target in expected.items():
        if name not in tensors and id(target) in stored:
            tensors[name] = tensors[stored[id(target)]]


def _check_fit(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = _tensors(model)
    missing, surplus = [n for n in expected if n not in tensors], [n for n in tensors if n not in expected]
    if missing or surplus:
        raise SlimLSTMError(
            "the folder was saved from another model: "
            + "; ".join(
                f"{what} {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
                for what, names in (("it lacks", missing), ("the model lacks", surplus))
                if names
            )
        )
    for name, target in expected.items():
        if target.requires_grad and not (tensors[name].is_floating_point() or tensors[name].is_complex()):
            raise SlimLSTMError(
                f"{name} is {tensors[name].dtype} in the folder, a parameter with gradients in the model; load into a "
                "model of the class that was saved"
            )
    stored: dict[int, tuple[str, Tensor]] = {}
    for name, target in expected.items():
        other, tensor = stored.setdefault(id(target), (name, tensors[name]))
        if tensor is not tensors[name] and not torch.equal(tensor, tensors[name]):
            raise SlimLSTMError(
                f"{name} and {other} are one parameter in the model, but differ in the folder; load into a model that does "
                "not tie them"
            )


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model the stored dtypes and numbers by its own ``load_state_dict``, which may do more than copy numbers."""
    for name, target in _tensors(model).items():
        if target.dtype != tensors[name].dtype or _overlaps(target):
            target.data = target.to(tensors[name].dtype, copy=True, memory_format=torch.contiguous_format)
    state = OrderedDict(tensors)
    # Without the versions of the modules, PyTorch reads the tensors as its oldest modules wrote them.
    state._metadata = getattr(model.state_dict(), "_metadata", None)  # pyright: ignore[reportAttributeAccessIssue]
    # Only in inference mode, PyTorch writes into tensors that were made in it.
    made_for_inference = any(target.is_inference() for target in _tensors(model).values())
    try:
        with torch.inference_mode(made_for_inference):
            model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        for name, target in _tensors(model).items():
            if target.shape != tensors[name].shape:
                raise SlimLSTMError(
                    f"{name} is {list(tensors[name].shape)} in the folder, {list(target.shape)} in the model; load into a "
                    "model of the same sizes"
                ) from error
        raise SlimLSTMError(f"the model's load_state_dict refuses the tensors: {reason_of(error)}") from error


def _overlaps(target: Tensor) -> bool:
    """Return whether several elements share memory, into which PyTorch does not write."""
    return torch._debug_has_internal_overlap(target) == 1  # pyright: ignore


def _check_filled(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, found in model.state_dict().items():
        tensor = tensors[name]
        if (found.dtype, found.shape) != (tensor.dtype, tensor.shape) or not _is_same(found.cpu(), tensor.cpu()):
            raise SlimLSTMError(
                f"{name} has other numbers in the model after its load_state_dict than in the folder, which holds "
                f"{tensor.dtype} {list(tensor.shape)}; load into a model of that dtype whose tensors share no memory"
            )


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one dtype and shape have the same bits."""
    a, b = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(a, b)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return cast(dict[str, Tensor], model.state_dict(keep_vars=True))
