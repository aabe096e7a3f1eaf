"""The sites among named tensors, as a source for the pipeline."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from slimlstm.folders import site_entry, stored_names
from slimlstm.methods import DENSE, Replacement, check_matrix, rounded, stored_bytes
from slimlstm.modules.sites import Site
from slimlstm.ops.weights import Matrix
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.source import Size, Sizes, replaced_site
from slimlstm.weight_files.matrices import find_matrices, stored_matrix
from slimlstm.weight_files.read import Tensors

_LSTM_PART = re.compile(r"(parametrizations\.)?(weight|bias)_(ih|hh|hr)[^.]*(\.original|\.0\.mask)?")


class FileSource:
    """The sites among named tensors; see :class:`slimlstm.pipeline.source.Source`.

    Args:
        tensors: a state dict; it does not change.
        known: the site entries of the folder that the tensors are from, empty if they are from a file.

    Attributes:
        state: the tensors after :meth:`put`, by their names in the ``state_dict`` of the compressed model.
        entries: the entries of compressed sites for ``config.json``.
    """

    mask_itemsize = 1

    def __init__(self, tensors: Tensors, known: Mapping[str, Mapping[str, Any]]) -> None:
        self._known = known
        self.state, self._names = dict(tensors), dict[str, tuple[str, ...]]()
        self._sites: dict[str, Site] = {}
        for site, names in find_matrices(tensors).items():
            self._names[site.key] = names
            self._sites[site.key] = _with_origin(site, known.get(site.key, {}))
        self.entries: dict[str, Mapping[str, Any]] = {
            site.key: known.get(site.key) or site_entry(site, {}, self._first(site).dtype)
            for site in self._sites.values()
            if site.rank is not None or site.nonzeros is not None or site.storage is not None
        }

    def _first(self, site: Site) -> Tensor:
        return self.state[self._names[site.key][0]]

    def sites(self) -> list[Site]:
        """Return the site of every recurrent matrix, in the order of the file."""
        return list(self._sites.values())

    def weight(self, site: Site) -> Matrix:
        """Return the matrix [m, n], with its mask applied, or its factors."""
        return stored_matrix(self._names[site.key], self.state)

    def identity(self, site: Site) -> Hashable:
        """Return a value that is equal for sites whose tensors share memory."""
        parts = [self.state[name] for name in self._names[site.key]]
        return tuple((part.data_ptr(), part.shape, part.stride()) for part in parts)

    def itemsize(self, site: Site) -> int:
        """Return the bytes of one number."""
        return self._first(site).element_size()

    def check(self, site: Site, plan: SitePlan) -> None:
        """Raise :class:`SlimLSTMError` if the projection that is rounded together with an hh matrix is not finite."""
        projection = self._projection(site)
        if plan.storage is not None and projection is not None:
            check_matrix(self.state[projection])

    def put(self, replacements: Mapping[str, Replacement]) -> list[str]:
        """Rewrite the state and the entries."""
        for key, found in replacements.items():
            site = self._sites[key]
            first, projection = self._first(site), self._projection(site)
            mask = found.mask
            if mask is None and site.nonzeros is not None and found.factors is None:
                mask = self.state[self._names[key][1]]
            if found.storage is not None and projection is not None:
                self.state[projection] = rounded(self.state[projection], found.storage)
            for name in self._names[key]:
                self.state.pop(name)
            self.state.pop(key, None)
            self.entries[key] = self._entry(site, found, first)
            self.state.update(_stored_as(site, first if found.dense is None else found.dense, found.factors, mask))
        return []

    def _entry(self, site: Site, found: Replacement, first: Tensor) -> dict[str, Any]:
        origin = {"method": found.method, "source_sha256": found.source_sha256}
        known = self._known.get(site.key)
        if found.method == DENSE and known is not None:
            origin = {name: known[name] for name in origin if name in known} or origin
        return site_entry(replaced_site(site, found), origin, first.dtype)

    def _projection(self, site: Site) -> str | None:
        name = site.key.replace("weight_hh", "weight_hr")
        return name if name != site.key and name in self.state else None

    def size(self) -> Sizes:
        """Return the sizes of the LSTMs with their biases and of everything; masked weights do not count as parameters."""
        return _sizes(self.state, self.entries)


def _with_origin(site: Site, entry: Mapping[str, Any]) -> Site:
    """Return the site with its storage and its method, which only its folder's entry names."""
    is_changed = site.rank is not None or site.nonzeros is not None
    return replace(site, storage=entry.get("storage"), method=entry.get("method") if is_changed else None)


def _stored_as(site: Site, matrix: Tensor, factors: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensors:
    """Return the tensors of one matrix, by their names in the ``state_dict`` of the compressed model."""
    if factors is not None:
        return {f"{site.key}_u": factors[0], f"{site.key}_v": factors[1]}
    if mask is None:
        return {site.key: matrix}
    prefix = f"{site.module}." if site.module else ""
    place = f"{prefix}parametrizations.{site.name}"
    return {f"{place}.original": matrix, f"{place}.0.mask": mask}


def _sizes(tensors: Mapping[str, Tensor], entries: Mapping[str, Mapping[str, Any]]) -> Sizes:
    """Return the sizes of the LSTMs with their biases and of everything; masked weights do not count as parameters."""
    matrices = find_matrices(tensors)
    masked = {site: names for site, names in matrices.items() if site.nonzeros is not None}
    masks_of = {name for names in masked.values() for name in names[1:]}
    zeroed = {names[0]: tensors[names[0]].numel() - (site.nonzeros or 0) for site, names in masked.items()}
    modules = {f"{site.module}." if site.module else "" for site in matrices}
    parts = [name for name in tensors if any(_LSTM_PART.fullmatch(name[len(m) :]) for m in modules if name.startswith(m))]
    storages = dict(stored_names(tensors, entries))

    def size(names: Collection[str]) -> Size:
        unique = {tensors[name].data_ptr(): name for name in names if tensors[name].is_floating_point()}
        count = sum(tensors[name].numel() - zeroed.get(name, 0) for name in unique.values())
        stored = ((tensors[name], storages.get(name)) for name in unique.values())
        bytes_ = sum(stored_bytes(tuple(part.shape), storage, part.element_size()) for part, storage in stored)
        masks = {tensors[name].data_ptr(): tensors[name].nbytes for name in names if name in masks_of}
        return Size(count, bytes_ + sum(masks.values()))

    return Sizes(size(parts), size(tensors))
