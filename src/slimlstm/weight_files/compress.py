"""``compress_file``: compress the LSTMs in a weight file, without the code of their model."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from slimlstm.calibration.moments import Calibration
from slimlstm.errors import SlimLSTMError
from slimlstm.files import check_not_input
from slimlstm.folders import CONFIG, read_config, site_entry, stored_names, weights_files, write_folder
from slimlstm.methods import DENSE, Replacement, check_matrix, rounded, stored_bytes
from slimlstm.modules.modes import plain_defaults, plain_mode
from slimlstm.modules.sites import Site
from slimlstm.ops.weights import Matrix
from slimlstm.pipeline.plan import Config, with_storage
from slimlstm.pipeline.report import Report
from slimlstm.pipeline.run import apply, check_smaller, solve
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.source import Size, Sizes, replaced_site
from slimlstm.progress import Progress, shown
from slimlstm.weight_files.matrices import find_matrices, stored_matrix
from slimlstm.weight_files.read import Tensors, read_weights

_LSTM_PART = re.compile(r"(parametrizations\.)?(weight|bias)_(ih|hh|hr)[^.]*(\.original|\.0\.mask)?")


@plain_mode()
@plain_defaults()
def compress_file(
    path: str | os.PathLike[str],
    config: Config,
    folder: str | os.PathLike[str],
    progress: Progress | None = None,
    storage: str | None = None,
    *,
    part: str | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Compress the LSTMs in a weight file, and write a folder that :func:`slimlstm.load` reads.

    Args:
        path: a weight file or a folder; see :func:`slimlstm.weight_files.read_tensors`.
        config: see :func:`slimlstm.compress_`.
        folder: the folder to write. It must not be ``path``, nor a compressed folder that ``path`` belongs to.
        progress: called with a site's key and the fraction done; None draws a bar on a terminal.
        storage: a storage to which every selected site is rounded in addition.
        part: which state dict of a checkpoint with several; see :func:`slimlstm.weight_files.read_tensors`.
        calibration: moments from :func:`slimlstm.calibrate` on the model that these weights belong to, for calibrated
            methods. A weight file has no model to run batches through.

    Returns:
        A report of every site and of the whole file.

    Raises:
        SlimLSTMError: the file holds no LSTM, or nothing would get smaller; or see
            :func:`slimlstm.weight_files.read_tensors`, :func:`slimlstm.compress_` and :func:`slimlstm.save`. Nothing is
            written then.

    Examples:
        >>> import tempfile, torch, slimlstm
        >>> place = Path(tempfile.mkdtemp())
        >>> torch.save(torch.nn.LSTM(8, 16).state_dict(), place / "lstm.pt")
        >>> compress_file(place / "lstm.pt", slimlstm.Quantize("int8"), place / "small").lstm.parameters_after
        1664
    """
    path, folder = Path(path), Path(folder)
    check_folder(path, folder)
    tensors, notes = read_weights(path, part)
    source = FileSource(tensors, read_config(path)["sites"] if path.is_dir() else {})
    if not source.sites():
        raise SlimLSTMError(
            f"{path} holds no weights of an LSTM: no names such as weight_hh_l0 with shapes [4H, H]; give a file that does"
        )
    if storage is not None:
        config = with_storage(config, storage, source.sites())
    with shown("compressing", progress) as report_progress:
        solution = solve(
            source,
            config,
            calibration=calibration,
            refit_obstacle="a weight file has no model to run batches through",
            progress=report_progress,
        )
    check_smaller(solution)
    solution.notes += notes
    report = apply(source, solution)
    write_folder(folder, source.state, source.entries)
    return report


def check_folder(path: Path, folder: Path) -> None:
    """Refuse to write over the folder that is read, or over the folder of the file that is read.

    Raises:
        SlimLSTMError: ``folder`` is ``path``, or a compressed folder whose weights ``path`` holds.
    """
    if path.is_dir():
        check_not_input(path, folder)
    if _is_weights_file_of(path, folder):
        raise SlimLSTMError(f"{path} is a weight file of {folder}, which would be replaced; name another folder")


def _is_weights_file_of(path: Path, folder: Path) -> bool:
    """Return whether ``path`` holds the weights of a compressed folder."""
    if path.resolve().parent != folder.resolve() or not (folder / CONFIG).exists():
        return False
    try:
        return path.name in weights_files(read_config(folder))
    except SlimLSTMError:
        return False


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
