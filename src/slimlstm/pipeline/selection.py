"""Choose rank and storage of every matrix together, and compare the plan with simpler ones on held-out batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import DENSE, Replacement
from slimlstm.modules.sites import Site
from slimlstm.ops.weights import Matrix, rebuilt
from slimlstm.pipeline.config import LowRank
from slimlstm.pipeline.plan import Plan, make_plan
from slimlstm.pipeline.probing import BITS_OF, Judge, measure_sizes
from slimlstm.pipeline.sensitivity import Sensitivity
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.source import Source
from slimlstm.pipeline.statistics import SiteStatistics

TOGETHER = "rank and bits together"
"""The name of the plan that follows from the sensitivity."""

Replace = Callable[[Plan], dict[str, Replacement]]
"""Returns a plan's replacements by site key; the source does not change."""


def chosen_plan(
    source: Source,
    config: LowRank,
    sites: list[Site],
    statistics: SiteStatistics,
    replace: Replace,
    judge: Judge | None,
    sensitivity: Sensitivity | None,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Plan, str]:
    """Return the plan of a configuration with ``storage="auto"``, and a note on how it was chosen.

    Args:
        source: holds the matrices.
        config: names the method and the budget.
        sites: the sites that the configuration selects.
        statistics: the sites' moments, with gradients.
        replace: returns the replacements of a plan.
        judge: measures losses on held-out batches. Without one, the plan follows from predictions alone.
        sensitivity: an earlier measurement for the same sites; None measures now.
        progress: called with a site's key and the fraction done.

    Raises:
        SlimLSTMError: the budget is too small, or the sensitivity has other sites.
    """
    if sensitivity is None:
        sensitivity = measure_sizes(source, sites, statistics, config.method, judge, progress)
    known = {key for site in sensitivity.sites for key in site.keys}
    unknown = [site.key for site in sites if site.key not in known]
    if unknown:
        raise SlimLSTMError(f"the sensitivity does not know {', '.join(unknown)}; measure it for this model")
    budget = config.bytes or 0
    trials = {TOGETHER: make_plan(sensitivity.of({site.key for site in sites}).plan(budget), sites)}
    if judge is None:
        return trials[TOGETHER], "rank and storage were chosen by predicted losses; no batches measured the result"
    trials |= _simpler_plans(config, sites, statistics)
    costs = {name: judge.cost(_weights(source, sites, replace(plan))) for name, plan in trials.items()}
    best = min(costs, key=lambda name: costs[name])
    measured = ", ".join(f"{name} {cost:.4g}" for name, cost in sorted(costs.items(), key=lambda item: item[1]))
    return trials[best], f"chosen by the loss on held-out batches: {measured}"


def _simpler_plans(config: LowRank, sites: list[Site], statistics: SiteStatistics) -> dict[str, Plan]:
    """Return simpler plans within the same bytes; the chosen plan must not have a higher loss than these."""
    budget, plans = config.bytes or 0, dict[str, Plan]()
    for method, storage in ((config.method, "int8"), (config.method, "int5"), ("svd", "int8")):
        simpler = dataclasses.replace(config, method=method, storage=storage)
        try:
            plans[f"{method} in {storage}"] = make_plan(simpler, sites, statistics.for_method(method))
        except SlimLSTMError:
            continue  # the budget is too small for it
    unique = {statistics.identity(site): site for site in sites}
    for storage in BITS_OF:
        if sum(SitePlan(DENSE, storage=storage).bytes_at(site) for site in unique.values()) <= budget:
            plans[f"dense in {storage}"] = make_plan(
                Plan({site.key: SitePlan(DENSE, storage=storage) for site in sites}), sites
            )
            break
    return plans


def _weights(source: Source, sites: list[Site], found: Mapping[str, Replacement]) -> dict[str, Matrix]:
    return {site.key: found[site.key].effective(rebuilt(source.weight(site))) for site in sites if site.key in found}
