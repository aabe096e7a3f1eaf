"""Turn a configuration into a smaller source: make a plan, find the replacements, put them in place, and report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from slimlstm.calibration.moments import Calibration
from slimlstm.calibration.refit import CallMismatchError, Observer, Solve
from slimlstm.calibration.refit import fit_to_new_inputs as fit_again
from slimlstm.errors import SlimLSTMError
from slimlstm.methods import (
    DENSE,
    METHODS,
    Factors,
    MatrixProblem,
    Needs,
    Replacement,
    Rounder,
    break_even_rank,
    check_matrix,
    matrix_bytes,
    relative_error,
    sha256_of,
    shares_left_out,
)
from slimlstm.modules.sites import Site
from slimlstm.ops.weights import Matrix, parts_of, rebuilt
from slimlstm.pipeline.config import LowRank
from slimlstm.pipeline.plan import Config, Plan, make_plan, needs_of, selected_sites
from slimlstm.pipeline.probing import Judge
from slimlstm.pipeline.report import Report, SiteReport, Total
from slimlstm.pipeline.selection import chosen_plan
from slimlstm.pipeline.sensitivity import Sensitivity
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.source import Size, Source, replaced_site
from slimlstm.pipeline.statistics import SiteStatistics
from slimlstm.progress import Progress

PASSES = 2
"""Default number of passes that fit factors again; a third pass gains nothing more."""


@dataclass
class Solution:
    """Everything that a compression will change, before anything has changed.

    Attributes:
        plan: the decision for every selected site.
        replacements: the replacements by site key; sites that stay as they are have none.
        reports: one report for every selected site.
        notes: further remarks for the report.
    """

    plan: Plan
    replacements: dict[str, Replacement]
    reports: list[SiteReport]
    notes: list[str] = field(default_factory=list[str])


def solve(
    source: Source,
    config: Config,
    *,
    calibration: Calibration | None = None,
    observer: Observer | None = None,
    refit_obstacle: str = "",
    refit: int | None = None,
    progress: Progress | None = None,
    judge: Judge | None = None,
    sensitivity: Sensitivity | None = None,
) -> Solution:
    """Find replacements for all matrices that a configuration selects; the source does not change.

    Args:
        source: holds the matrices.
        config: says how to compress them; :func:`slimlstm.pipeline.plan.check_config` has accepted it.
        calibration: the moments that calibrated methods need.
        observer: runs the uncompressed and the compressed source side by side, to fit factors again to their new inputs.
        refit_obstacle: why ``observer`` is None, in words.
        refit: how often to fit again; None means :data:`PASSES` times where it is possible and a method is calibrated.
        progress: called with a site's key and the fraction done.
        judge: measures losses, for configurations that choose rank and storage together.
        sensitivity: an earlier measurement for such configurations.

    Raises:
        SlimLSTMError: see :func:`slimlstm.pipeline.plan.make_plan`; a matrix cannot be compressed, calibration is missing
            or does not reach a site, or ``refit`` was asked for and is impossible.
    """
    sites = {site.key: site for site in source.sites()}
    if refit is not None and (type(refit) is not int or refit < 0):
        raise SlimLSTMError(f"refit is a number of passes, at least 0, or None, not {refit!r}")
    statistics = SiteStatistics(source, calibration, config.method if isinstance(config, LowRank) else DENSE)
    notes: list[str] = []
    if isinstance(config, LowRank) and config.is_auto:
        selected = selected_sites(config, list(sites.values()))
        replace = partial(_replacements, source, sites=sites, statistics=statistics, progress=None)
        plan, note = chosen_plan(source, config, selected, statistics, replace, judge, sensitivity, progress)
        notes.append(note)
    else:
        plan = make_plan(config, list(sites.values()), statistics)
    replacements = _replacements(source, plan, sites, statistics, progress)
    calibrated = [sites[key] for key, action in plan.sites.items() if _is_calibrated(action)]
    notes += [note for note in [statistics.scarcity(calibrated)] if note is not None]
    predicted = {key: statistics.predicted_rise(sites[key], replacements.get(key)) for key in plan.sites}
    if refit or (refit is None and needs_of(plan) > Needs.NOTHING):
        fitted, note = _fit_again(
            source, plan, sites, statistics, replacements, observer, refit_obstacle, refit or PASSES, is_asked=bool(refit)
        )
        replacements |= fitted
        notes.append(note)
    reports = [
        site_report(
            sites[key],
            plan.sites[key],
            replacements.get(key),
            source.itemsize(sites[key]),
            predicted[key],
            source.mask_itemsize,
        )
        for key in plan.sites
    ]
    return Solution(plan, replacements, reports, notes)


def apply(source: Source, solution: Solution) -> Report:
    """Put a solution's replacements into the source, and report."""
    before, earlier = source.size(), _saved(source)
    notes = source.put(solution.replacements)
    after = source.size()
    lstm, model = Total.between(before.lstm, after.lstm), Total.between(before.model, after.model)
    report = Report(solution.reports, solution.plan, lstm, model, [*solution.notes, *notes])
    if not any(earlier):
        return report
    totals = [Total.between(_sum(size, earlier), now) for size, now in zip(before, after, strict=True)]
    return dataclasses.replace(report, lstm_since_dense=totals[0], model_since_dense=totals[1])


def _saved(source: Source) -> Size:
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


def _sum(size: Size, other: Size) -> tuple[int, int]:
    return size.parameters + other.parameters, size.bytes + other.bytes


def check_smaller(solution: Solution) -> None:
    """Raise :class:`SlimLSTMError` if a solution changes nothing."""
    if not solution.replacements:
        reasons = "; ".join(f"{report.key}: {report.note}" for report in solution.reports)
        raise SlimLSTMError(f"nothing would get smaller: {reasons}")


def compress_matrix(
    weight: Matrix,
    plan: SitePlan,
    problem: Callable[[], MatrixProblem] | None = None,
    on_fraction: Callable[[float], None] | None = None,
    rounder: Rounder | None = None,
) -> Replacement | None:
    """Carry out one site's plan.

    Args:
        weight: the matrix [m, n], or its factors; they do not change.
        plan: method, amount and storage.
        problem: the matrix with the moments that the method needs; None for methods that need nothing.
        on_fraction: called with the fraction done, where the solver is iterative.
        rounder: rounds in the metric of the matrix's moments; None rounds to nearest.

    Returns:
        The replacement, or None where the plan leaves the matrix as it is.

    Raises:
        SlimLSTMError: the matrix is empty or not finite, the rank does not fit, or a matrix to be rounded is not float32.

    Examples:
        >>> import torch
        >>> compress_matrix(torch.eye(4), SitePlan("svd", rank=2)).rank
        2
    """
    if plan.method == DENSE and plan.storage is None:
        return None
    matrix = rebuilt(weight)
    check_matrix(matrix)
    source = sha256_of(matrix)
    if plan.method == DENSE:
        exact = weight if isinstance(weight, Tensor) else weight[0].double() @ weight[1].double()
        return _stored(Replacement(weight, DENSE, source), exact, plan.storage, rounder)

    def on_iteration(done: int, most: int) -> None:
        if on_fraction is not None:
            on_fraction(done / most)

    method = METHODS[plan.method]
    amount = plan.nonzeros if method.makes_mask else plan.rank
    found = method.solve(MatrixProblem(matrix) if problem is None else problem(), amount or 0, on_iteration)
    if isinstance(found, Factors):
        result = Replacement(
            (found.u, found.v),
            plan.method,
            source,
            None,
            None,
            found.residual,
            found.iterations,
            found.converged,
            found.losses,
        )
        return _stored(result, matrix, plan.storage, rounder)
    masked = matrix * found
    result = Replacement(None, plan.method, source, found, None, relative_error(matrix, masked))
    return (
        result if plan.storage is None else _stored(dataclasses.replace(result, weight=masked), matrix, plan.storage, None)
    )


def _stored(result: Replacement, matrix: Tensor, storage: str | None, rounder: Rounder | None) -> Replacement:
    """Return the replacement rounded to a storage; its relative error then includes the rounding."""
    if storage is None or result.weight is None:
        return result
    rounder = rounder or Rounder()
    if isinstance(result.weight, Tensor):
        weight: Matrix = rounder.matrix(result.weight, storage).clone()
        after = weight
    else:
        u, v = rounder.factors(*result.weight, matrix, storage)
        weight, after = (u, v), u.double() @ v.double()
    return dataclasses.replace(result, weight=weight, storage=storage, relative_error=relative_error(matrix, after))


def _replacements(
    source: Source, plan: Plan, sites: Mapping[str, Site], statistics: SiteStatistics, progress: Progress | None
) -> dict[str, Replacement]:
    """Return the replacements of all sites that change; sites that share a parameter and a plan share a replacement."""
    found: dict[tuple[object, SitePlan], Replacement | None] = {}
    replacements: dict[str, Replacement] = {}
    for index, (key, action) in enumerate(plan.sites.items()):

        def on_fraction(fraction: float, index: int = index, key: str = key) -> None:
            if progress is not None:
                progress(key, (index + fraction) / len(plan.sites))

        on_fraction(0.0)
        site = sites[key]
        shared = source.identity(site), action
        if shared not in found:
            try:
                problem = partial(statistics.problem, site, action.method)
                weight, rounder = source.weight(site), statistics.rounder(site)
                found[shared] = compress_matrix(weight, action, problem, on_fraction, rounder)
                source.check(site, action)
            except SlimLSTMError as error:
                raise SlimLSTMError(f"{key}: {error}") from error
        replacement = found[shared]
        if replacement is not None:
            replacements[key] = replacement
        on_fraction(1.0)
    return replacements


def _fit_again(
    source: Source,
    plan: Plan,
    sites: Mapping[str, Site],
    statistics: SiteStatistics,
    replacements: Mapping[str, Replacement],
    observer: Observer | None,
    obstacle: str,
    passes: int,
    *,
    is_asked: bool,
) -> tuple[dict[str, Replacement], str]:
    """Return replacements whose factors were fitted again, and a note that says so or says why not."""
    solvers = {
        key: _solver(source, sites[key], plan.sites[key], statistics)
        for key, found in replacements.items()
        if found.factors and _is_calibrated(plan.sites[key]) and not statistics.is_shared(sites[key])
    }
    if observer is None or not solvers:
        obstacle = obstacle if observer is None else "no matrix of its own was factored by a calibrated method"
    else:
        exact = {key: rebuilt(source.weight(site)) for key, site in sites.items() if site.problem is None}
        weights = {key: found.effective(exact[key]) for key, found in replacements.items()}
        try:
            best, fitted = fit_again(observer, exact, weights, solvers, passes)
        except CallMismatchError as error:
            obstacle = str(error)
        else:
            if not best:
                return (
                    {},
                    "factors were fitted again to their new inputs, but the loss was higher, so they stay as they were",
                )
            refitted = {key: _refitted(replacements[key], fitted[key], exact[key]) for key in solvers}
            return refitted, f"{len(solvers)} matrices were fitted {best} times again to their new inputs"
    if is_asked:
        raise SlimLSTMError(f"factors cannot be fitted again: {obstacle}; leave refit out, or give refit=0")
    return {}, f"factors were not fitted again to their new inputs: {obstacle}"


def _is_calibrated(plan: SitePlan) -> bool:
    return plan.method != DENSE and METHODS[plan.method].needs > Needs.NOTHING


def _solver(source: Source, site: Site, plan: SitePlan, statistics: SiteStatistics) -> Solve:
    """Return a function that compresses another matrix at a site, given another moment of its inputs."""
    gradients = statistics.gradients(site, plan.method)
    weight, rounder = source.weight(site), statistics.rounder(site)
    dtype = parts_of(weight)[0].dtype

    def solver(target: Tensor, moment: Tensor) -> Matrix:
        found = METHODS[plan.method].solve(MatrixProblem(target, moment, gradients), plan.rank or 0, None)
        assert isinstance(found, Factors)  # noqa: S101 (only factors are fitted again)
        u, v = found.u.to(dtype), found.v.to(dtype)
        return (u, v) if plan.storage is None else rounder.at(moment).factors(u, v, target, plan.storage)

    return solver


def _refitted(replacement: Replacement, factors: Matrix, matrix: Tensor) -> Replacement:
    u, v = factors
    error = relative_error(matrix, u.double() @ v.double())
    return dataclasses.replace(replacement, weight=(u, v), relative_error=error)


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
        method=site.method or plan.method if plan.method == DENSE else plan.method,
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
