"""Plans: a method, rank and storage for every site, made from a configuration."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import (
    DENSE,
    METHODS,
    STORAGES,
    Needs,
    RankCosts,
    allocate,
    losses_of_ranks,
    matrix_bytes,
    rank_for_share,
)
from slimlstm.methods.low_bit import GROUP
from slimlstm.modules.sites import Site
from slimlstm.pipeline.config import AUTO, LowRank, Prune, Quantize, check_maskable
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.statistics import SiteStatistics


@dataclass
class Plan:
    """A :class:`SitePlan` for every selected site, by key. ``sites`` may be edited.

    Examples:
        >>> plan = Plan({"lstm.weight_hh_l0": SitePlan("svd", rank=8)})
        >>> print(plan)
        lstm.weight_hh_l0: svd rank 8
        >>> Plan.from_dict(plan.to_dict()) == plan
        True
    """

    sites: dict[str, SitePlan] = field(default_factory=dict[str, SitePlan])

    def __str__(self) -> str:
        return "\n".join(f"{key}: {site}" for key, site in self.sites.items())

    def stored_as(self, storage: str) -> Plan:
        """Return the plan with every site rounded to ``storage``."""
        return Plan({key: replace(site, storage=storage) for key, site in self.sites.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return {key: {k: v for k, v in asdict(site).items() if v not in (None, "")} for key, site in self.sites.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> Plan:
        """Return the plan that :meth:`to_dict` wrote.

        Raises:
            SlimLSTMError: an entry is no plan for a site.
        """
        try:
            return cls({key: SitePlan(**entry) for key, entry in data.items()})
        except (AttributeError, TypeError) as error:
            raise SlimLSTMError(f"this is no plan: {error}; give the result of Plan.to_dict()") from error


Config = LowRank | Prune | Quantize | Plan
"""Every way to say how to compress a model."""


def method_names(config: Config) -> list[str]:
    """Return the names of the methods that a configuration uses, each once and without ``"dense"``.

    Examples:
        >>> method_names(LowRank("svd", rank=8)), method_names(Quantize("int8"))
        (['svd'], [])
    """
    if isinstance(config, Plan):
        return [name for name in dict.fromkeys(site.method for site in config.sites.values()) if name != DENSE]
    return [] if isinstance(config, Quantize) else [config.method]


def storage_names(config: Config) -> list[str]:
    """Return the names of the storages that a configuration rounds to, each once; none where they are still to be chosen.

    Examples:
        >>> storage_names(Quantize("int8")), storage_names(LowRank("svd", rank=8))
        (['int8'], [])
    """
    if isinstance(config, Plan):
        names = [site.storage for site in config.sites.values()]
    else:
        names = [] if isinstance(config, Prune) else [config.storage]
    return [name for name in dict.fromkeys(names) if name is not None and name != AUTO]


def needs_of(config: Config) -> Needs:
    """Return the statistics that the most demanding method of a configuration needs."""
    return max((METHODS[name].needs for name in method_names(config)), default=Needs.NOTHING)


def calibration_needs(config: Config) -> Needs:
    """Return the statistics that a configuration uses, for its methods and for its rounding.

    Storages with grouped scales round in the metric of the inputs' moments where these are known.

    Examples:
        >>> calibration_needs(Quantize("int4")).name, calibration_needs(Quantize("int8")).name
        ('INPUTS', 'NOTHING')
    """
    has_groups = any(STORAGES[name].scales == "group" for name in storage_names(config))
    return max(needs_of(config), Needs.INPUTS if has_groups else Needs.NOTHING)


def make_plan(config: Config, sites: list[Site], statistics: SiteStatistics | None = None) -> Plan:
    """Return the plan of a configuration for a model with these sites.

    Args:
        config: the configuration. A plan is checked, and its steps that would save nothing become ``"dense"``.
        sites: all sites of the model.
        statistics: the sites' statistics, needed only where ranks depend on the numbers in the matrices.

    Raises:
        SlimLSTMError: no site is selected, a selected site cannot be compressed, a plan names an unknown site, a rank is
            higher than every matrix allows, or a budget is too small for rank 1 at every matrix.
    """
    if isinstance(config, Plan):
        selected = _named(config, sites)
        plan = Plan({site.key: _checked(config.sites[site.key], site) for site in selected})
    else:
        selected = _selected(config, sites)
        plan = _planned(config, selected, statistics)
    plan = Plan({site.key: plan.sites[site.key].fitted_to(site) for site in selected})
    _check_compressible(selected)
    return plan


def with_storage(config: Config, storage: str, sites: list[Site]) -> Config:
    """Return a configuration that also rounds every selected site to ``storage``.

    Examples:
        >>> with_storage(LowRank(rank=8), "int8", []).storage
        'int8'
    """
    if isinstance(config, LowRank | Quantize):
        return replace(config, storage=storage)
    return (config if isinstance(config, Plan) else make_plan(config, sites)).stored_as(storage)


def check_config(config: Config, sites: list[Site]) -> None:
    """Reject a bad configuration before time is spent on calibration; see :func:`make_plan` for the errors."""
    if not isinstance(cast(object, config), LowRank | Prune | Quantize | Plan):
        raise SlimLSTMError(
            f"a configuration is a LowRank, Prune, Quantize or Plan, not {config!r}; give for example Quantize('int8'), or "
            "Plan.from_dict(...) for a plan that was written to a file"
        )
    if isinstance(config, LowRank) and config.needs_spectra:
        storage = None if config.is_auto else config.storage
        config = replace(config, rank=1, keep=None, bytes=None, energy=None, allocation=None, storage=storage)
    make_plan(config, sites)


def selected_sites(config: Config, sites: list[Site]) -> list[Site]:
    """Return the sites that a configuration selects; see :func:`make_plan` for the errors."""
    return _named(config, sites) if isinstance(config, Plan) else _selected(config, sites)


def _planned(config: LowRank | Prune | Quantize, sites: list[Site], statistics: SiteStatistics | None) -> Plan:
    if isinstance(config, LowRank) and config.needs_spectra:
        _check_compressible(sites)
        if config.is_auto:
            raise SlimLSTMError("storage='auto' measures losses; use compress_, or the plan of a sensitivity")
        if statistics is None:
            raise SlimLSTMError("global allocation and energy take the model itself; use compress_, or a uniform keep")
        return _allocated(config, sites, statistics)
    if not isinstance(config, Quantize):
        _check_rank(config, sites)
    return Plan({site.key: config.site_plan(site) for site in sites})


def _allocated(config: LowRank, sites: list[Site], statistics: SiteStatistics) -> Plan:
    """Return the plan of a configuration whose ranks depend on the spectra."""
    if config.energy is not None:
        ranks = {site.key: rank_for_share(statistics.losses(site), config.energy) for site in sites}
        return Plan({site.key: config.at_rank(site, ranks[site.key]) for site in sites})
    firsts: dict[Hashable, Site] = {}
    for site in sites:
        firsts.setdefault(statistics.identity(site), site)
    size = sum(m * n for m, n in (site.shape for site in firsts.values()))
    # Tolerate rounding just below an integer, as rank_for_fraction does.
    budget = config.bytes or (config.keep or 0.0) * size * (1 + 1e-12)
    ranks = allocate({site.key: _rank_costs(config, site, statistics) for site in firsts.values()}, budget)
    whole = SitePlan(DENSE, note="stays whole, because other matrices lose less at the same cost", storage=config.storage)
    plans: dict[str, SitePlan] = {}
    for site in sites:
        rank = ranks[firsts[statistics.identity(site)].key]
        plan = config.at_rank(site, rank or 1)
        # Where rank 1 would save nothing, the plan's own note says so.
        plans[site.key] = whole if rank is None and plan.method != DENSE else plan
    return Plan(plans)


def _rank_costs(config: LowRank, site: Site, statistics: SiteStatistics) -> RankCosts:
    """Return the losses of all ranks of a site, and their costs in the unit of the budget: bytes or parameters."""

    def cost(rank: int | None) -> int:
        if config.bytes is not None:
            return matrix_bytes(site.shape, rank, config.storage, statistics.itemsize(site))
        return site.shape[0] * site.shape[1] if rank is None else rank * sum(site.shape)

    losses = statistics.losses(site)
    left_out = losses_of_ranks(losses).tolist()
    # Scales of groups make the cost a step function of the rank; a line with the slope over one group is an upper bound.
    slope = (cost(1 + GROUP) - cost(1)) / GROUP
    fixed = cost(1) - slope
    return RankCosts(left_out[: (site.rank or len(losses)) + 1], slope, cost(site.rank) - fixed, fixed)


def _named(plan: Plan, sites: list[Site]) -> list[Site]:
    """Return the sites that a plan names."""
    sites_of: Any = plan.sites
    wrong = (
        [one for one in sites_of.values() if not isinstance(one, SitePlan)] if isinstance(sites_of, dict) else [sites_of]
    )
    if wrong:
        raise SlimLSTMError(f"a plan holds a SitePlan for every key, such as SitePlan('svd', rank=8), not {wrong[0]!r}")
    by_key = {site.key: site for site in sites}
    unknown = [key for key in plan.sites if key not in by_key]
    if unknown:
        raise SlimLSTMError(f"the plan names {', '.join(unknown)}; the model has {', '.join(by_key) or 'no LSTM'}")
    return [by_key[key] for key in plan.sites]


def _checked(plan: SitePlan, site: Site) -> SitePlan:
    """Return a site's plan, or ``"dense"`` with a note where it would save nothing.

    Raises:
        SlimLSTMError: the site cannot have this rank or this number of nonzeros.
    """
    if plan.method == DENSE:
        return plan
    if plan.makes_mask:
        _check_nonzeros(plan, site)
        checked = Prune(keep=1.0).site_plan(site) if plan.nonzeros == site.parameters else plan
    else:
        config = LowRank(plan.method, plan.rank)
        _check_rank(config, [site])
        checked = config.site_plan(site)
    return replace(checked, storage=plan.storage)


def _check_nonzeros(plan: SitePlan, site: Site) -> None:
    check_maskable(site)
    size = site.shape[0] * site.shape[1]
    if type(plan.nonzeros) is not int or not 1 <= plan.nonzeros <= size:
        raise SlimLSTMError(f"{site.key} has {size:,} weights; the number of nonzeros cannot be {plan.nonzeros}")


def _selected(config: LowRank | Prune | Quantize, sites: list[Site]) -> list[Site]:
    if not sites:
        raise SlimLSTMError("the model holds no nn.LSTM or nn.LSTMCell; modules in plain lists or dicts are not found")
    targeted = [site for site in sites if config.target in (site.target, "both")]
    selected = [site for site in targeted if config.filter is None or config.filter(site)]
    if not selected:
        raise SlimLSTMError(
            f"the filter selected none of the {len(targeted)} sites with target {config.target!r}: "
            + ", ".join(site.key for site in targeted)
        )
    return selected


def _check_compressible(sites: list[Site]) -> None:
    for site in sites:
        if site.problem is not None:
            raise SlimLSTMError(site.problem)


def _check_rank(config: LowRank | Prune, sites: list[Site]) -> None:
    largest = max(min(site.shape) for site in sites)
    if config.rank is not None and config.rank > largest:
        raise SlimLSTMError(f"rank {config.rank} is above {largest}, the highest that any of the matrices can have")
