"""Finds, reads and replaces the recurrent matrices of any model: ``nn.LSTM`` and ``nn.LSTMCell``, with or without weight
drop or other parametrizations, and the modules of :mod:`slimlstm.modules.lstm`. A subclass of ``nn.LSTM`` with attributes
``cell_clip`` or ``proj_clip`` is taken to clip its cells or projections to them, where they are not None, as ELMo's do.

A *site* is one recurrent matrix of one layer and direction; a *host* is the module that holds sites, once, however many
names the model has for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimlstm.modules.factored import FactoredModule
from slimlstm.modules.masks import Mask, mask_of
from slimlstm.modules.modes import evaluation_mode
from slimlstm.modules.shapes import cell_matrix_shapes, lstm_arguments, lstm_matrix_shapes
from slimlstm.modules.sites import SITE_NAME, Site
from slimlstm.ops.dense import rebuilt
from slimlstm.ops.weights import Matrix

_RAW = "_raw"


@dataclass
class Host:
    """A module that holds sites: ``module`` is what gets replaced at every one of ``paths``; ``lstm`` does the computing.

    The two differ where a weight-drop wrapper stands around an LSTM.
    """

    paths: list[str]
    module: nn.Module
    lstm: nn.Module
    problem: str | None = None
    notes: list[str] = field(default_factory=list[str])

    def sites(self) -> list[Site]:
        """The host's sites, in the order of its parameters."""
        ranks = self.lstm.ranks if isinstance(self.lstm, FactoredModule) else {}
        return [
            Site(self.paths[0], name, shape, ranks.get(name), self._kept(name), self.problem, self._storage(name))
            for name, shape in matrix_shapes(self.lstm).items()
        ]

    def matrix(self, name: str) -> Tensor:
        """The matrix [m, n] that inference sees: factors multiplied, masks applied, weight drop left out."""
        return rebuilt(self.weight(name))

    def weight(self, name: str) -> Matrix:
        """:meth:`matrix`, or the factors that it is kept as."""
        with torch.no_grad(), evaluation_mode(self.module):
            lstm = self.lstm
            matrix = lstm.matrix(name) if isinstance(lstm, FactoredModule) else self._weight(name)
        return matrix.detach() if isinstance(matrix, Tensor) else (matrix[0].detach(), matrix[1].detach())

    def projection(self, name: str) -> Tensor | None:
        """The projection weight_hr [P, H] that is kept as the matrix ``name`` is, None where there is none."""
        found = getattr(self.lstm, name.replace("weight_hh", "weight_hr"), None) if "weight_hh" in name else None
        return found.detach() if isinstance(found, Tensor) else None

    def identity(self, name: str) -> int:
        """Equal for two sites that share one parameter."""
        if self._parametrizations(name):
            originals = self.lstm.get_submodule(f"parametrizations.{name}")
            return id(getattr(originals, "original", originals))
        return id(self.parameter(name))

    def mask(self, name: str) -> Mask | None:
        """The magnitude mask on a matrix, or None."""
        return mask_of(self.lstm, name)

    def is_computed(self, name: str) -> bool:
        """Whether weight drop or a parametrization other than a mask stands between a parameter and its use."""
        if self._raw(name) is not None:
            return True
        return any(not isinstance(entry, Mask) for entry in self._parametrizations(name))

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """What an ``nn.LSTM`` with the same outputs would hold: the host's own parameters where they are used as they
        are (a mask aside), new ones with what inference sees elsewhere."""
        parameters: dict[str, nn.Parameter] = {}
        with torch.no_grad(), evaluation_mode(self.module):
            for name in parameter_names(self.lstm):
                stored = self.parameter(name)
                if self.is_computed(name) or not isinstance(stored, nn.Parameter):
                    stored = nn.Parameter(self._weight(name).detach().clone(), self.is_trained(name))
                parameters[name] = stored
        return parameters

    def is_trained(self, name: str) -> bool:
        """Whether any parameter that a weight is, or is computed from, takes gradients."""
        if self._parametrizations(name):
            originals = self.lstm.get_submodule(f"parametrizations.{name}").parameters(recurse=False)
            return any(parameter.requires_grad for parameter in originals)
        return self.parameter(name).requires_grad

    def _storage(self, name: str) -> str | None:
        storage = self.lstm.storages.get(name) if isinstance(self.lstm, FactoredModule) else None
        return None if storage == "float32" else storage

    def _kept(self, name: str) -> int | None:
        mask = self.mask(name)
        return None if mask is None else int(mask.mask.sum())

    def _raw(self, name: str) -> Tensor | None:
        candidates = (getattr(owner, name + _RAW, None) for owner in (self.module, self.lstm))
        return next((raw for raw in candidates if isinstance(raw, Tensor)), None)

    def _weight(self, name: str) -> Tensor:
        raw = self._raw(name)
        return getattr(self.lstm, name) if raw is None else raw

    def is_plain(self, name: str) -> bool:
        """Whether a weight is expected to be a parameter of that very name."""
        return self._raw(name) is None and not self._parametrizations(name)

    def parameter(self, name: str) -> Tensor:
        """The parameter that a weight is, or is computed from; of factors, U."""
        if isinstance(self.lstm, FactoredModule) and name in self.lstm.ranks:
            return getattr(self.lstm, f"{name}_u")
        if self._parametrizations(name):
            return getattr(self.lstm.get_submodule(f"parametrizations.{name}"), "original", self._weight(name))
        return self._weight(name)

    def _parametrizations(self, name: str) -> list[nn.Module]:
        if not parametrize.is_parametrized(self.lstm, name):
            return []
        return list(self.lstm.get_submodule(f"parametrizations.{name}").children())


def find_sites(model: nn.Module) -> list[Site]:
    """Every recurrent matrix in ``model``, in the order of its modules; of shared modules, once.

    Sites that cannot be compressed are listed too, with the reason in :attr:`Site.problem`.
    """
    return [site for host in find_hosts(model) for site in host.sites()]


def find_hosts(model: nn.Module) -> list[Host]:
    """The modules that hold the model's sites."""
    modules = dict(model.named_modules(remove_duplicate=False))
    hosts: dict[int, Host] = {}
    for path, module in modules.items():
        if not _holds_sites(module):
            continue
        parent_path = path.rpartition(".")[0]
        parent = modules[parent_path] if path else None
        wrapper = parent if parent is not None and _is_weight_drop(parent, module) else None
        place = parent_path if wrapper is not None else path
        host = hosts.setdefault(id(module), Host([], wrapper or module, module))
        if place not in host.paths:
            host.paths.append(place)
    for host in hosts.values():
        host.problem = _problem(host)
        if host.problem is None and any(host.is_computed(name) for name in matrix_shapes(host.lstm)):
            host.notes.append(f"{host.paths[0]}: weight drop or a parametrization of its weights ends here")
    return list(hosts.values())


def matrix_shapes(lstm: nn.Module) -> dict[str, tuple[int, int]]:
    """Names and shapes of the recurrent matrices of one module."""
    if isinstance(lstm, FactoredModule):
        return lstm.matrix_shapes
    if isinstance(lstm, torch.jit.ScriptModule):
        found = ((name, tuple(parameter.shape)) for name, parameter in lstm.named_parameters())
        return {name: (shape[0], shape[1]) for name, shape in found if SITE_NAME.fullmatch(name)}
    if hasattr(lstm, "num_layers"):
        return lstm_matrix_shapes(**lstm_arguments(cast(nn.LSTM, lstm)))
    return cell_matrix_shapes(int(getattr(lstm, "input_size")), int(getattr(lstm, "hidden_size")))


def parameter_names(lstm: nn.Module) -> list[str]:
    """Every parameter that an ``nn.LSTM`` or ``nn.LSTMCell`` like this one has."""
    suffixes = [name.removeprefix("weight_ih") for name in matrix_shapes(lstm) if name.startswith("weight_ih")]
    kinds = ["weight_ih", "weight_hh"]
    kinds += ["bias_ih", "bias_hh"] if getattr(lstm, "bias", True) else []
    kinds += ["weight_hr"] if getattr(lstm, "proj_size", 0) else []
    return [kind + suffix for suffix in suffixes for kind in kinds]


def _holds_sites(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return module.original_name in ("LSTM", "LSTMCell")
    return isinstance(module, nn.LSTM | nn.LSTMCell | FactoredModule) or _is_quantised(module)


def _is_quantised(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("torch.ao.nn.quant") and kind.__name__ in ("LSTM", "LSTMCell")


def _is_weight_drop(parent: nn.Module, module: nn.Module) -> bool:
    """Whether ``parent`` is a wrapper that computes weights of ``module`` from ``weight_..._raw`` parameters."""
    if not isinstance(module, nn.LSTM | nn.LSTMCell):
        return False
    own = [name for name, _ in parent.named_parameters(recurse=False)]
    inner = [name for name, _ in module.named_parameters(recurse=False)]
    raw = {name + _RAW for name in matrix_shapes(module)}
    return not raw.isdisjoint(own) or (not raw.isdisjoint(inner) and list(parent.children()) == [module])


def _can_clip(lstm: nn.Module) -> bool:
    """Whether an LSTM would clip, if its bounds were not None."""
    return hasattr(lstm, "cell_clip") or hasattr(lstm, "proj_clip")


def _problem(host: Host) -> str | None:
    """Why the host's matrices cannot be compressed, or None."""
    lstm, path = host.lstm, host.paths[0]
    where, kind = f"{path!r}" if path else "the model itself", type(lstm).__name__
    if isinstance(lstm, torch.jit.ScriptModule):
        return f"{where} is a torch.jit module, whose code cannot be changed; compress the model before scripting it"
    if _is_quantised(lstm):
        return f"{where} is a quantised {kind}, whose weights are packed; compress the float model and quantise after"
    if isinstance(lstm, FactoredModule):
        return None
    base = nn.LSTM if isinstance(lstm, nn.LSTM) else nn.LSTMCell
    if type(lstm).forward is not base.forward and not _can_clip(lstm):
        return f"{where} is a {kind} with a forward pass of its own, which a plain LSTM cannot stand in for"
    if not host.paths[0]:
        return (
            f"the model itself is a {base.__name__} and has no parent to be replaced in; "
            f"compress LowRank{base.__name__}.from_dense(model) instead"
        )
    known = dict(lstm.named_parameters(recurse=False))
    for name in parameter_names(lstm):
        if name not in known and host.is_plain(name):
            return (
                f"{name} of {where} is no parameter but computed by a hook (old weight_norm or prune?); remove the hook "
                "first, with remove_weight_norm or torch.nn.utils.prune.remove"
            )
        if host.parameter(name).is_meta:
            return f"{where} is on the meta device and holds no numbers; load the weights first"
    return None
