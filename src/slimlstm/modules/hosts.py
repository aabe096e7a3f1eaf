"""Find the hosts and sites of a model, with the reason where they cannot be compressed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from slimlstm.errors import SlimLSTMError
from slimlstm.modules.arguments import check_model
from slimlstm.modules.factored import FactoredModule
from slimlstm.modules.host import Host, matrix_shapes, parameter_names
from slimlstm.modules.problems import is_quantised, problem_of, stored_methods
from slimlstm.modules.sites import Site
from slimlstm.modules.weight_drop import is_weight_drop


def find_sites(model: nn.Module) -> list[Site]:
    """Return the site of every recurrent matrix in ``model``, in the order of its modules; shared modules count once.

    Sites that cannot be compressed are included; their :attr:`Site.problem` says why they cannot.

    Examples:
        >>> [site.key for site in find_sites(nn.Sequential(nn.LSTM(3, 4)))]
        ['0.weight_ih_l0', '0.weight_hh_l0']
    """
    return [site for host in find_hosts(model) for site in host.sites()]


def find_hosts(model: nn.Module) -> list[Host]:
    """Return the modules that hold the model's sites, each once.

    Examples:
        >>> lstm = nn.LSTM(3, 4)
        >>> [host.paths for host in find_hosts(nn.ModuleDict({"left": lstm, "right": lstm}))]
        [['left', 'right']]
    """
    check_model(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    hosts: dict[int, Host] = {}
    for path, module in modules.items():
        if not _holds_sites(module):
            continue
        parent_path = path.rpartition(".")[0]
        parent = modules[parent_path] if path else None
        is_dropped = parent is not None and is_weight_drop(parent, module, list(matrix_shapes(module)))
        outer_path = parent_path if is_dropped else path
        host = hosts.setdefault(id(module), Host([], modules[outer_path], module))
        if outer_path not in host.paths:
            host.paths.append(outer_path)
    found = list(hosts.values())
    methods = stored_methods(model, [host.module for host in found])
    for host in found:
        ancestors = [modules[path] for own in host.paths for path in _prefixes(own)]
        host.problem = problem_of(host, ancestors, methods.get(id(host.module), []))
        if host.problem is None:
            host.notes += _notes(host)
    _note_ties(model, found)
    return found


def _prefixes(path: str) -> list[str]:
    """Return the paths of all modules around the module at ``path``."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(len(names))] if path else []


def check_materialised(model: nn.Module) -> None:
    """Raise :class:`SlimLSTMError` if ``model`` is no module, or a lazy module in it has not run yet."""
    check_model(model)
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise SlimLSTMError(f"{', '.join(lazy)} of a lazy module has no numbers yet; run the model once on a batch first")


def _holds_sites(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return module.original_name in ("LSTM", "LSTMCell")
    return isinstance(module, nn.LSTM | nn.LSTMCell | FactoredModule) or is_quantised(module)


def _notes(host: Host) -> list[str]:
    if any(host.is_computed(name) for name in parameter_names(host.lstm)):
        return [f"{host.paths[0]}: weight drop or a parametrization of its weights ends here"]
    return []


def _note_ties(model: nn.Module, hosts: Iterable[Host]) -> None:
    """Note every matrix that is also a parameter of a module that is no host."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    hosts = list(hosts)
    inside = tuple(f"{path}." for host in hosts for path in host.paths if path)
    for host in hosts:
        for name in matrix_shapes(host.lstm) if host.problem is None else ():
            others = [other for other in names.get(host.identity(name), []) if not other.startswith(inside)]
            if others and host.paths != [""]:
                host.notes.append(
                    f"{host.paths[0]}.{name} was one parameter with {', '.join(others)}; compressed, it is no longer"
                )
