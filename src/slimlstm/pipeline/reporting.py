"""Measure a compression for its report: one site, and what earlier compressions saved."""

from __future__ import annotations

from slimlstm.methods import DENSE, Replacement, break_even_rank, matrix_bytes, shares_left_out
from slimlstm.modules.sites import Site
from slimlstm.pipeline.report import SiteReport
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.source import Size, Source, replaced_site


def site_report(
    site: Site,
    plan: SitePlan,
    replacement: Replacement | None,
    itemsize: int,
    predicted: float | None = None,
    mask_itemsize: int = 0,
) -> SiteReport:
    """Return the report of one site whose numbers take ``itemsize`` bytes each, and its mask ``mask_itemsize``."""
    m, n = site.shape
    nonzeros = site.nonzeros, site.nonzeros if replacement is None else replaced_site(site, replacement).nonzeros
    masks = [0 if count is None else mask_itemsize * m * n for count in nonzeros]
    found = replacement or Replacement(None, DENSE, "")
    rank = site.rank if found.rank is None else found.rank
    after = site.parameters if rank is None else rank * (m + n)
    if found.mask is not None:
        after = int(found.mask.sum())
    storage, stored = plan.storage_of(site), site.stored_itemsize or itemsize
    return SiteReport(
        key=site.key,
        shape=site.shape,
        method=(site.method or DENSE) if plan.method == DENSE else plan.method,
        rank=rank,
        break_even_rank=break_even_rank(site.shape),
        parameters_before=site.parameters,
        parameters_after=after,
        bytes_before=matrix_bytes(site.shape, site.rank, site.storage, stored) + masks[0],
        bytes_after=matrix_bytes(site.shape, rank, storage, stored if replacement is None else itemsize) + masks[1],
        relative_error=found.relative_error,
        iterations=found.iterations,
        converged=found.converged,
        note=plan.note,
        storage=storage,
        predicted_rise=predicted,
        source_sha256=found.source_sha256,
        spectrum=() if found.losses is None else shares_left_out(found.losses, found.rank),
    )


def savings_so_far(source: Source) -> Size:
    """Return the numbers of parameters and bytes that earlier compressions saved; shared matrices count once."""
    parameters = bytes_ = 0
    unique = {source.identity(site): site for site in source.sites() if site.problem is None}
    for site in unique.values():
        m, n = site.shape
        itemsize = 4 if site.storage else source.itemsize(site)
        parameters += m * n - site.parameters
        bytes_ += matrix_bytes(site.shape, None, None, itemsize)
        mask = 0 if site.nonzeros is None else source.mask_itemsize * m * n
        bytes_ -= matrix_bytes(site.shape, site.rank, site.storage, itemsize) + mask
        if site.storage and site.target == "hh" and 4 * n < m:
            # The projection [P, H] has the storage of hh.
            bytes_ += matrix_bytes((n, m // 4), None, None, 4) - matrix_bytes((n, m // 4), None, site.storage, 4)
    return Size(parameters, bytes_)
