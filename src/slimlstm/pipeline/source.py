"""The pipeline's interface to an owner of matrices: a live module, a weight file, an ONNX graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import NamedTuple, Protocol

from slimlstm.methods import Replacement
from slimlstm.modules.sites import Site
from slimlstm.ops.weights import Matrix
from slimlstm.pipeline.site_plan import SitePlan


class Size(NamedTuple):
    """A number of parameters and their bytes."""

    parameters: int
    bytes: int


class Sizes(NamedTuple):
    """The size of the recurrent layers with their biases, and of everything; shared parameters count once."""

    lstm: Size
    model: Size


class Source(Protocol):
    """Something that holds sites. The three implementations are :class:`slimlstm.module_source.ModuleSource`,
    :class:`slimlstm.weight_files.source.FileSource` and :class:`slimlstm.onnx.source.GraphSource`."""

    mask_itemsize: int
    """The bytes that a mask takes in the saved file for each weight."""

    def sites(self) -> list[Site]:
        """Return the site of every recurrent matrix, in the order of the source; shared modules count once."""
        ...

    def weight(self, site: Site) -> Matrix:
        """Return the matrix [m, n], or its factors, as used in inference: with masks and without weight drop."""
        ...

    def identity(self, site: Site) -> Hashable:
        """Return a value that is equal for sites that share one parameter."""
        ...

    def itemsize(self, site: Site) -> int:
        """Return the bytes of one number of the site as it is."""
        ...

    def check(self, site: Site, plan: SitePlan) -> None:
        """Raise :class:`slimlstm.SlimLSTMError` if this source cannot hold what the plan makes."""
        ...

    def put(self, replacements: Mapping[str, Replacement]) -> list[str]:
        """Replace matrices, by key, and return notes for the report; sites that share a parameter share a replacement."""
        ...

    def size(self) -> Sizes:
        """Return the size as it is now."""
        ...


def replaced_site(site: Site, found: Replacement) -> Site:
    """Return the site as it is after its matrix was replaced."""
    is_factored = found.factors is not None
    nonzeros = int(found.mask.sum()) if found.mask is not None else None if is_factored else site.nonzeros
    storage = found.storage or (None if is_factored else site.storage)
    kept = None if storage == "float32" else storage
    return dataclasses.replace(site, rank=found.rank, nonzeros=nonzeros, storage=kept, stored_itemsize=None)
