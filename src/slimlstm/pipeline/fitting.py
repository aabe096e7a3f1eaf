"""Fit the factors of calibrated methods again to the inputs that they see in the compressed source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from slimlstm.calibration.refit import FittingError, Observer, Solve, fit_to_new_inputs
from slimlstm.methods import METHODS, Factors, MatrixProblem, Replacement, relative_error
from slimlstm.modules.sites import Site
from slimlstm.ops.weights import Matrix, parts_of, rebuilt
from slimlstm.pipeline.plan import Plan
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.source import Source
from slimlstm.pipeline.statistics import SiteStatistics

PASSES = 2
"""Default number of passes that fit factors again; a third pass gains nothing more."""


def fit_again(
    source: Source,
    plan: Plan,
    statistics: SiteStatistics,
    replacements: Mapping[str, Replacement],
    observer: Observer,
    passes: int = PASSES,
) -> tuple[dict[str, Replacement], str]:
    """Return replacements whose factors were fitted again, and a note for the report.

    Args:
        source: holds the uncompressed matrices.
        plan: method, rank and storage of every selected site.
        statistics: the sites' moments.
        replacements: the replacements by site key; only factors of calibrated methods at sites of their own are fitted.
        observer: runs the uncompressed and the compressed source side by side.
        passes: how often to fit.

    Raises:
        FittingError: no replacement can be fitted, or see :func:`slimlstm.calibration.refit.fit_to_new_inputs`.
    """
    sites = {site.key: site for site in source.sites()}
    solvers = {
        key: _solver(source, sites[key], plan.sites[key], statistics)
        for key, found in replacements.items()
        if found.factors and plan.sites[key].is_calibrated and not statistics.is_shared(sites[key])
    }
    if not solvers:
        raise FittingError("no matrix of its own was factored by a calibrated method")
    exact = {key: rebuilt(source.weight(site)) for key, site in sites.items() if site.problem is None}
    weights = {key: found.effective(exact[key]) for key, found in replacements.items()}
    best, fitted = fit_to_new_inputs(observer, exact, weights, solvers, passes)
    if not best:
        return {}, "factors were fitted again to their new inputs, but the loss was higher, so they stay as they were"
    refitted = {key: _refitted(replacements[key], fitted[key], exact[key]) for key in solvers}
    return refitted, f"{len(solvers)} matrices were fitted {best} times again to their new inputs"


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
