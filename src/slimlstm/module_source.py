"""The sites of a live module, as a source for the pipeline."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import Replacement, check_matrix, stored_bytes
from slimlstm.modules.factored import FactoredModule
from slimlstm.modules.hosts import Host, find_hosts
from slimlstm.modules.masks import Mask
from slimlstm.modules.sites import Site
from slimlstm.modules.swap import Swap
from slimlstm.ops.weights import Matrix, parts_of
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.source import Size, Sizes


class ModuleSource:
    """The sites of a live module; see :class:`slimlstm.pipeline.source.Source`."""

    mask_itemsize = 1

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.undo: Callable[[], None] = lambda: None
        """Restores the modules as they were before :meth:`put`."""
        self._find()

    def _find(self) -> None:
        self._hosts = find_hosts(self._model)
        self._by_key = {site.key: host for host in self._hosts for site in host.sites()}

    def compressible_hosts(self) -> list[Host]:
        """Return the hosts without a problem."""
        return [host for host in self._hosts if host.problem is None]

    def sites(self) -> list[Site]:
        """Return the site of every recurrent matrix, in the order of the modules."""
        return [site for host in self._hosts for site in host.sites()]

    def weight(self, site: Site) -> Matrix:
        """Return the matrix [m, n] or its factors."""
        return self._by_key[site.key].weight(site.name)

    def identity(self, site: Site) -> Hashable:
        """Return a value that is equal for sites that share one parameter."""
        return self._by_key[site.key].identity(site.name)

    def itemsize(self, site: Site) -> int:
        """Return the bytes of one number."""
        return self._by_key[site.key].parameter(site.name).element_size()

    def check(self, site: Site, plan: SitePlan) -> None:
        """Raise :class:`SlimLSTMError` if a projection is not finite, or a parametrization would change rounded weights."""
        if plan.storage is None:
            return
        host = self._by_key[site.key]
        projection = host.projection(site.name)
        if projection is not None:
            check_matrix(projection)
        if isinstance(host.lstm, FactoredModule):
            computed = [part for part in host.lstm.stored_parts(site.name) if host.is_computed(part)]
            if computed:
                raise SlimLSTMError(f"{', '.join(computed)} is parametrized; remove the parametrization first")

    def put(self, replacements: Mapping[str, Replacement]) -> list[str]:
        """Replace modules and weights, and return notes for the report; sites with one replacement share its parameters."""
        notes: list[str] = []
        parameters: dict[int, Matrix] = {}
        changes: list[tuple[Host, Mapping[str, Replacement]]] = []
        for host in self._hosts:
            own = {site.name: replacements[site.key] for site in host.sites() if site.key in replacements}
            if own:
                notes += host.notes
                trained = {n: _with_parameters(found, host.is_trained(n), parameters) for n, found in own.items()}
                changes.append((host, trained))
                notes += _notes_on_hooks(host, trained)
        replaced = [host.parameter(name) for host, own in changes for name in own]
        swap = Swap(changes)
        # Set before the swap, so that an interrupt at any point can be undone.
        self.undo = swap.undo
        swap.commit()
        self._find()
        kept = set(map(id, self._model.parameters()))
        return notes + _notes_on_optimizers({id(weight) for weight in replaced} - kept)

    def size(self) -> Sizes:
        """Return the sizes of the LSTMs with their biases and of the model; masked weights do not count as parameters."""
        return Sizes(
            module_size([host.module for host in self._hosts], self._hosts), module_size([self._model], self._hosts)
        )


def _notes_on_hooks(host: Host, replacements: Mapping[str, Replacement]) -> list[str]:
    """Give new parameters the attributes of the old ones; return a note for every old one with hooks on its gradient."""
    notes: list[str] = []
    for name, found in replacements.items():
        old = host.parameter(name)
        new = () if found.weight is None else parts_of(found.weight)
        for parameter in new:
            vars(parameter).update(vars(old))
        if new and (old._backward_hooks or getattr(old, "_post_accumulate_grad_hooks", None)):  # pyright: ignore
            notes.append(
                f"{host.paths[0]}.{name} had hooks on its gradient, which its new parameters lack; register them again"
            )
    return notes


def _notes_on_optimizers(replaced: set[int]) -> list[str]:
    """Return a note for every optimizer that holds parameters with these ids, because it would train unused weights."""
    # PyTorch marks a class of optimizers at its first instance. A search of all objects takes a tenth of a second.
    used = {found for found in _subclasses(torch.optim.Optimizer) if getattr(found.step, "hooked", False)}
    optimizers: list[Any] = [found for found in gc.get_objects() if type(found) in used] if used else []
    return [
        f"an optimizer ({type(optimizer).__name__}) holds weights that were replaced, and would not train the new "
        "ones; make it again from model.parameters()"
        for optimizer in optimizers
        if not replaced.isdisjoint(id(weight) for group in optimizer.param_groups for weight in group["params"])
    ]


def _subclasses(of: Any) -> Iterator[Any]:
    for found in of.__subclasses__():
        yield found
        yield from _subclasses(found)


def _with_parameters(found: Replacement, is_trained: bool, parameters: dict[int, Matrix]) -> Replacement:
    """Return a replacement whose weights are parameters; ``parameters`` holds the ones made before, by tensor."""
    if found.weight is None:
        return found
    key = id(found.weight)
    if key not in parameters:
        weight = found.weight
        if isinstance(weight, Tensor):
            parameters[key] = nn.Parameter(weight, is_trained)
        else:
            parameters[key] = nn.Parameter(weight[0], is_trained), nn.Parameter(weight[1], is_trained)
    return dataclasses.replace(found, weight=parameters[key])


def module_size(modules: Sequence[nn.Module], hosts: list[Host]) -> Size:
    """Return the number of parameters in ``modules`` and their bytes; shared ones count once.

    A masked weight is no parameter, but takes bytes, and its mask takes one more.

    Args:
        modules: modules of one model.
        hosts: the model's hosts, which say what is masked and stored.
    """
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    masked = {
        host.identity(site.name): site.shape[0] * site.shape[1] - site.nonzeros
        for host in hosts
        for site in host.sites()
        if site.nonzeros is not None
    }
    count = sum(parameter.numel() - masked.get(key, 0) for key, parameter in parameters.items())
    storages = {
        id(host.lstm.original(part)): storage
        for host in hosts
        if isinstance(host.lstm, FactoredModule)
        for name, storage in host.lstm.storages.items()
        for part in host.lstm.stored_parts(name)
    }
    stored = (stored_bytes(tuple(p.shape), storages.get(key), p.element_size()) for key, p in parameters.items())
    masks = {part.mask.data_ptr(): part.mask for module in modules for part in module.modules() if isinstance(part, Mask)}
    return Size(count, sum(stored) + sum(mask.nbytes for mask in masks.values()))
