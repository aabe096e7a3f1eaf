"""Turn a configuration into a smaller source: make a plan, find the replacements, put them in place, and report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from slimlstm.calibration.moments import Calibration
from slimlstm.calibration.refit import FittingError, Observer
from slimlstm.errors import SlimLSTMError
from slimlstm.methods import DENSE, Needs, Replacement
from slimlstm.pipeline.config import LowRank
from slimlstm.pipeline.fitting import PASSES, fit_again
from slimlstm.pipeline.matrix import compress_matrix
from slimlstm.pipeline.plan import Config, Plan, make_plan, needs_of, selected_sites
from slimlstm.pipeline.probing import Judge
from slimlstm.pipeline.report import Report, SiteReport, Total
from slimlstm.pipeline.reporting import savings_so_far, site_report
from slimlstm.pipeline.selection import chosen_plan
from slimlstm.pipeline.sensitivity import Sensitivity
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.source import Size, Source
from slimlstm.pipeline.statistics import SiteStatistics
from slimlstm.progress import Progress


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
        refit: how often to fit again; None means ``PASSES`` times where it is possible and a method is calibrated.
        progress: called with a site's key and the fraction done.
        judge: measures losses, for configurations that choose rank and storage together.
        sensitivity: an earlier measurement for such configurations.

    Raises:
        SlimLSTMError: see :func:`slimlstm.pipeline.plan.make_plan`; a matrix cannot be compressed, calibration is missing
            or does not reach a site, or ``refit`` was asked for and is impossible.
    """
    if refit is not None and (type(refit) is not int or refit < 0):
        raise SlimLSTMError(f"refit is a number of passes, at least 0, or None, not {refit!r}")
    sites = {site.key: site for site in source.sites()}
    statistics = SiteStatistics(source, calibration, config.method if isinstance(config, LowRank) else DENSE)
    plan, notes = _plan(source, config, statistics, judge, sensitivity, progress)
    replacements = _replacements(source, plan, statistics, progress)
    scarcity = statistics.scarcity(sites[key] for key, action in plan.sites.items() if action.is_calibrated)
    if scarcity is not None:
        notes.append(scarcity)
    predicted = {key: statistics.predicted_rise(sites[key], replacements.get(key)) for key in plan.sites}
    if refit or (refit is None and needs_of(plan) > Needs.NOTHING):
        fitted, note = _refitted(source, plan, statistics, replacements, observer, refit_obstacle, refit)
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
    before, earlier = source.size(), savings_so_far(source)
    notes = source.put(solution.replacements)
    after = source.size()
    lstm, model = Total.between(before.lstm, after.lstm), Total.between(before.model, after.model)
    report = Report(solution.reports, solution.plan, lstm, model, [*solution.notes, *notes])
    if not any(earlier):
        return report
    totals = [Total.between(_sum(size, earlier), now) for size, now in zip(before, after, strict=True)]
    return dataclasses.replace(report, lstm_since_dense=totals[0], model_since_dense=totals[1])


def _sum(size: Size, other: Size) -> Size:
    return Size(size.parameters + other.parameters, size.bytes + other.bytes)


def check_smaller(solution: Solution) -> None:
    """Raise :class:`SlimLSTMError` if a solution changes nothing."""
    if not solution.replacements:
        reasons = "; ".join(f"{report.key}: {report.note}" for report in solution.reports)
        raise SlimLSTMError(f"nothing would get smaller: {reasons}")


def _plan(
    source: Source,
    config: Config,
    statistics: SiteStatistics,
    judge: Judge | None,
    sensitivity: Sensitivity | None,
    progress: Progress | None,
) -> tuple[Plan, list[str]]:
    """Return the plan of a configuration, and notes on how it was chosen."""
    if not (isinstance(config, LowRank) and config.is_auto):
        return make_plan(config, source.sites(), statistics), []
    selected = selected_sites(config, source.sites())
    replace = partial(_replacements, source, statistics=statistics)
    plan, note = chosen_plan(source, config, selected, statistics, replace, judge, sensitivity, progress)
    return plan, [note]


def _replacements(
    source: Source, plan: Plan, statistics: SiteStatistics, progress: Progress | None = None
) -> dict[str, Replacement]:
    """Return the replacements of all sites that change; sites that share a parameter and a plan share a replacement."""
    sites = {site.key: site for site in source.sites()}
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


def _refitted(
    source: Source,
    plan: Plan,
    statistics: SiteStatistics,
    replacements: Mapping[str, Replacement],
    observer: Observer | None,
    obstacle: str,
    passes: int | None,
) -> tuple[dict[str, Replacement], str]:
    """Return the replacements whose factors were fitted again, and a note for the report.

    Raises:
        SlimLSTMError: ``passes`` were asked for, and fitting is impossible. Otherwise the note gives the obstacle.
    """
    try:
        if observer is None:
            raise FittingError(obstacle)
        return fit_again(source, plan, statistics, replacements, observer, passes or PASSES)
    except FittingError as error:
        if passes:
            raise SlimLSTMError(f"factors cannot be fitted again: {error}; leave refit out, or give refit=0") from error
        return {}, f"factors were not fitted again to their new inputs: {error}"
