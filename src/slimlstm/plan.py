"""What is to happen to every site: configurations, and the plans that they turn into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from slimlstm.errors import SlimLSTMError
from slimlstm.factorize import SOLVERS
from slimlstm.ops.weights import STORAGES, check_storage, matrix_bytes
from slimlstm.prune import kept_by_rank
from slimlstm.rank import rank_for_fraction, saves
from slimlstm.sites import Site

Target = Literal["ih", "hh", "both"]
Filter = Callable[[Site], bool]
DENSE, PRUNE = "dense", "prune"


@dataclass(frozen=True)
class LowRank:
    """Replaces matrices by products of factors.

    Attributes:
        method: ``"svd"`` or ``"semi-nmf"``; see :data:`slimlstm.factorize.SOLVERS`.
        rank: the same rank everywhere. Give either this or ``keep``.
        keep: the fraction of every matrix's parameters that its factors may hold, in (0, 1).
        target: ``"hh"``, ``"ih"`` or ``"both"``.
        filter: takes a :class:`slimlstm.sites.Site` and says whether it is meant; by default all are.

    Raises:
        SlimLSTMError: a value that is none of these.
    """

    method: str = "svd"
    rank: int | None = None
    keep: float | None = None
    target: Target = "both"
    filter: Filter | None = None

    def __post_init__(self) -> None:
        if self.method not in SOLVERS:
            raise SlimLSTMError(f"no method is called {self.method!r}; there are {', '.join(map(repr, SOLVERS))}")
        _check_amount(self)

    def site_plan(self, site: Site) -> SitePlan:
        """What this configuration means for one site; a rank that saves nothing leaves it as it is."""
        rank = self.rank if self.rank is not None else rank_for_fraction(site.shape, self.keep or 0.0)
        if site.rank is not None and rank >= site.rank:
            return SitePlan(DENSE, note=f"already at rank {site.rank}")
        if not saves(site.shape, rank):
            return SitePlan(DENSE, note=f"rank {rank} is not below break-even")
        return SitePlan(self.method, rank=rank)


@dataclass(frozen=True)
class Prune:
    """Zeroes the weights of smallest magnitude, matrix by matrix, and keeps them at zero.

    Attributes:
        rank: keep as many weights as factors of this rank would hold, r (m + n). Give either this or ``keep``.
        keep: the fraction of every matrix's weights to keep, in (0, 1).
        target, filter: as of :class:`LowRank`.

    Raises:
        SlimLSTMError: a value that is none of these.
    """

    rank: int | None = None
    keep: float | None = None
    target: Target = "both"
    filter: Filter | None = None

    def __post_init__(self) -> None:
        _check_amount(self)

    def site_plan(self, site: Site) -> SitePlan:
        """What this configuration means for one site; keeping all weights leaves it as it is."""
        size = site.shape[0] * site.shape[1]
        kept = kept_by_rank(site.shape, self.rank) if self.rank is not None else max(1, round((self.keep or 0.0) * size))
        if site.rank is not None:
            raise SlimLSTMError(
                f"{site.key} is kept as factors of rank {site.rank}; a mask on their product would not last"
            )
        if kept >= site.parameters:
            return SitePlan(DENSE, note=f"{site.parameters:,} weights are no more than the {kept:,} to keep")
        return SitePlan(PRUNE, kept=kept)


@dataclass(frozen=True)
class Quantize:
    """Keeps the weights of matrices, or of the factors that stand for them, in less than float32.

    int8 has a float32 scale for every row. The parameters stay float32 in memory, rounded to what the storage holds, so
    that every backend computes with the same weights and training goes on from them; the fused kernel reads, and
    :func:`slimlstm.save` writes, the small form. Of a projected layer, ``weight_hr`` goes with ``weight_hh``.

    Attributes:
        storage: ``"int8"`` or ``"bfloat16"``.
        target, filter: as of :class:`LowRank`.

    Raises:
        SlimLSTMError: a value that is none of these.
    """

    storage: str
    target: Target = "both"
    filter: Filter | None = None

    def __post_init__(self) -> None:
        check_storage(self.storage, STORAGES[1:])
        _check_target(self.target)

    def site_plan(self, site: Site) -> SitePlan:
        """What this configuration means for any site: factors and masks stay."""
        return SitePlan(DENSE, storage=self.storage)


@dataclass(frozen=True)
class SitePlan:
    """What is to happen to one site: a solver and its ``rank``, ``"prune"`` and how many are ``kept``, or ``"dense"``.

    ``"dense"`` leaves it as it is. ``storage`` is what its weights are then rounded to; None leaves that as it is, too, but
    new factors are always float32 unless it says otherwise.
    """

    method: str
    rank: int | None = None
    kept: int | None = None
    note: str = ""
    storage: str | None = None

    def __post_init__(self) -> None:
        if self.storage is not None:
            check_storage(self.storage)
        complete = {DENSE: True, PRUNE: self.kept is not None}.get(self.method, self.rank is not None)
        if self.method not in (*SOLVERS, DENSE, PRUNE) or not complete:
            raise SlimLSTMError(
                f"{self} is no plan for a site: a method of {', '.join(map(repr, SOLVERS))} needs a rank, "
                f"{PRUNE!r} needs kept, {DENSE!r} nothing"
            )

    def __str__(self) -> str:
        amount = {DENSE: self.note, PRUNE: f"{self.kept:,} weights" if self.kept else ""}
        parts = self.method, self.storage, amount.get(self.method, f"rank {self.rank}")
        return " ".join(part for part in parts if part)

    def storage_of(self, site: Site) -> str | None:
        """What the site is stored in afterwards; None where that is its dtype."""
        before = site.storage if self.method in (DENSE, PRUNE) else None
        after = self.storage or before
        return None if after == "float32" else after

    def of(self, site: Site) -> SitePlan:
        """The same for a site that is stored already: with a note, and without factors that would take more bytes."""
        after = self.storage_of(site)
        if site.storage is None or (self.storage is None and after == site.storage):
            return self
        before = matrix_bytes(site.shape, site.rank, site.storage, 4)
        if self.rank is not None and matrix_bytes(site.shape, self.rank, after, 4) >= before:
            note = f"{after or 'float32'} factors of rank {self.rank} take no fewer bytes than {site.storage} does now"
            return SitePlan(DENSE, note=note)
        note = f"already {after}" if after == site.storage else f"{after or 'float32'}, was {site.storage}"
        return self if note in self.note else replace(self, note="; ".join(filter(None, (self.note, note))))


@dataclass
class Plan:
    """What is to happen to a model: a :class:`SitePlan` for every site that is meant, by key; ``sites`` may be edited."""

    sites: dict[str, SitePlan] = field(default_factory=dict[str, SitePlan])

    def __str__(self) -> str:
        return "\n".join(f"{key}: {site}" for key, site in self.sites.items())

    def stored_as(self, storage: str) -> Plan:
        """The same, every site being kept in ``storage`` afterwards."""
        return Plan({key: replace(site, storage=storage) for key, site in self.sites.items()})

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return {key: {k: v for k, v in asdict(site).items() if v not in (None, "")} for key, site in self.sites.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> Plan:
        """The plan that :meth:`to_dict` gave.

        Raises:
            SlimLSTMError: an entry is not a site's plan.
        """
        try:
            return cls({key: SitePlan(**entry) for key, entry in data.items()})
        except TypeError as error:
            raise SlimLSTMError(f"this is no plan: {error}") from error


def make_plan(config: LowRank | Prune | Quantize | Plan, sites: list[Site]) -> Plan:
    """The plan that ``config`` means for a model with these sites.

    Raises:
        SlimLSTMError: no site is meant, a site that is meant cannot be compressed, a plan names an unknown site or a
            rank is above that of every matrix.
    """
    by_key = {site.key: site for site in sites}
    if isinstance(config, Plan):
        unknown = [key for key in config.sites if key not in by_key]
        if unknown:
            raise SlimLSTMError(f"the plan names {', '.join(unknown)}; the model has {', '.join(by_key) or 'no LSTM'}")
        chosen = [by_key[key] for key in config.sites]
        plan = Plan({site.key: _as_possible(config.sites[site.key], site) for site in chosen})
    else:
        chosen = _chosen(config, sites)
        if not isinstance(config, Quantize):
            _check_rank(config, chosen)
        plan = Plan({site.key: config.site_plan(site) for site in chosen})
    plan = Plan({site.key: plan.sites[site.key].of(site) for site in chosen})
    for site in chosen:
        if site.problem is not None:
            raise SlimLSTMError(site.problem)
    return plan


def _as_possible(plan: SitePlan, site: Site) -> SitePlan:
    if plan.method == DENSE:
        return plan
    if plan.method == PRUNE:
        _check_kept(plan, site)
        possible = Prune(keep=1.0).site_plan(site) if plan.kept == site.parameters else plan
    else:
        config = LowRank(plan.method, plan.rank)
        _check_rank(config, [site])
        possible = config.site_plan(site)
    return replace(possible, storage=plan.storage)


def _check_kept(plan: SitePlan, site: Site) -> None:
    if site.rank is not None:
        Prune(rank=1).site_plan(site)
    size = site.shape[0] * site.shape[1]
    if plan.kept is None or not 1 <= plan.kept <= size:
        raise SlimLSTMError(f"{site.key} has {size:,} weights; {plan.kept} of them cannot be kept")


def _chosen(config: LowRank | Prune | Quantize, sites: list[Site]) -> list[Site]:
    if not sites:
        raise SlimLSTMError("the model holds no nn.LSTM or nn.LSTMCell; modules kept in plain lists are not found")
    targeted = [site for site in sites if config.target in (site.target, "both")]
    chosen = [site for site in targeted if config.filter is None or config.filter(site)]
    if not chosen:
        raise SlimLSTMError(
            f"the filter chose none of the {len(targeted)} sites with target {config.target!r}: "
            + ", ".join(site.key for site in targeted)
        )
    return chosen


def _check_rank(config: LowRank | Prune, sites: list[Site]) -> None:
    largest = max(min(site.shape) for site in sites)
    if config.rank is not None and config.rank > largest:
        raise SlimLSTMError(f"rank {config.rank} is above {largest}, the highest that any of the matrices can have")


def _check_amount(config: LowRank | Prune) -> None:
    if (config.rank is None) == (config.keep is None):
        raise SlimLSTMError(f"give either rank or keep, not rank={config.rank} and keep={config.keep}")
    if config.rank is not None and (type(config.rank) is not int or config.rank < 1):
        raise SlimLSTMError(f"a rank is an int of at least 1, not {config.rank!r}")
    number = isinstance(config.keep, int | float) and not isinstance(config.keep, bool)
    if config.keep is not None and not (number and 0.0 < config.keep <= 1.0):
        raise SlimLSTMError(f"keep is a fraction of the parameters in (0, 1], not {config.keep!r}")
    _check_target(config.target)


def _check_target(target: object) -> None:
    if target not in ("ih", "hh", "both"):
        raise SlimLSTMError(f"the target is 'ih', 'hh' or 'both', not {target!r}")
