"""What is to happen to every site: configurations, and the plans that they turn into."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods.factorize import SOLVERS
from slimlstm.methods.magnitude import nonzeros_at_rank
from slimlstm.methods.rank import RankCosts, allocate, is_smaller, rank_for_fraction, rank_for_share
from slimlstm.modules.sites import Site
from slimlstm.ops.weights import STORAGES, check_storage, matrix_bytes

Target = Literal["ih", "hh", "both"]
Filter = Callable[[Site], bool]
DENSE, PRUNE = "dense", "prune"
WEIGHTED = ("activation", "fisher")
"""The methods that need calibration: an SVD weighted by the second moments of inputs, and by those of gradients too."""
METHODS = (*SOLVERS, *WEIGHTED)


@dataclass(frozen=True)
class LowRank:
    """Replaces matrices by products of factors.

    How small they get is given by one of ``rank``, ``keep``, ``bytes`` and ``energy``.

    Attributes:
        method: ``"svd"`` or ``"semi-nmf"``, see :data:`slimlstm.methods.factorize.SOLVERS`; ``"activation"`` or
            ``"fisher"``, see :class:`slimlstm.methods.factorize.WeightedSVD`, which need calibration.
        rank: the same rank everywhere.
        keep: the fraction of the matrices' parameters that the factors may hold, in (0, 1).
        target: ``"hh"``, ``"ih"`` or ``"both"``.
        filter: takes a :class:`slimlstm.modules.sites.Site` and says whether it is meant; by default all are.
        allocation: ``"uniform"`` keeps the same fraction of every matrix; ``"global"`` has all share one budget, which goes
            where it lowers the loss that the method sees most (:func:`slimlstm.methods.rank.allocate`). By default global
            for the methods that are calibrated, whose losses can be compared between matrices.
        bytes: what all matrices that are meant may take together, in ``storage``; always shared out globally.
        energy: the fraction of the loss at rank 0 that every matrix has to keep away, of Σ σ² for ``"svd"``, in (0, 1].
        storage: ``"int8"`` or ``"bfloat16"`` also rounds what is left; see :class:`Quantize`.

    Raises:
        SlimLSTMError: a value that is none of these, or two that exclude each other.
    """

    method: str = "svd"
    rank: int | None = None
    keep: float | None = None
    target: Target = "both"
    filter: Filter | None = None
    allocation: Literal["uniform", "global"] | None = None
    bytes: int | None = None
    energy: float | None = None
    storage: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SlimLSTMError(f"no method is called {self.method!r}; there are {', '.join(map(repr, METHODS))}")
        given = [name for name in ("rank", "keep", "bytes", "energy") if getattr(self, name) is not None]
        if len(given) != 1:
            raise SlimLSTMError(f"give one of rank, keep, bytes and energy, not {' and '.join(given) or 'none'}")
        _check_rank_or_keep(self.rank, self.keep)
        if self.bytes is not None and (type(self.bytes) is not int or self.bytes < 1):
            raise SlimLSTMError(f"bytes are an int of at least 1, not {self.bytes!r}")
        if self.energy is not None and not (type(self.energy) in (int, float) and 0.0 < self.energy <= 1.0):
            raise SlimLSTMError(f"energy is a fraction in (0, 1], not {self.energy!r}")
        if self.storage is not None:
            check_storage(self.storage)
        _check_target(self.target)
        if self.allocation not in (None, "uniform", "global"):
            raise SlimLSTMError(f"allocation is 'uniform' or 'global', not {self.allocation!r}")
        if self.allocation == "global" and given[0] in ("rank", "energy"):
            raise SlimLSTMError(f"{given[0]} is the same everywhere and cannot be shared out; give keep or bytes")
        if self.allocation == "uniform" and given[0] == "bytes":
            raise SlimLSTMError("bytes are one budget for all matrices; give keep for a uniform allocation")
        if self.method == "semi-nmf" and (self.is_global or self.energy is not None):
            raise SlimLSTMError("semi-nmf has no spectrum to choose ranks from; give rank or keep")

    @property
    def is_global(self) -> bool:
        """Whether the matrices share one budget."""
        if self.bytes is not None or self.allocation == "global":
            return True
        return self.allocation is None and self.keep is not None and self.method in WEIGHTED

    @property
    def needs_spectra(self) -> bool:
        """Whether ranks depend on what is in the matrices."""
        return self.is_global or self.energy is not None

    def site_plan(self, site: Site) -> SitePlan:
        """What this configuration means for one site; a rank that saves nothing leaves it as it is."""
        rank = self.rank if self.rank is not None else rank_for_fraction(site.shape, self.keep or 0.0)
        return self.at_rank(site, rank)

    def at_rank(self, site: Site, rank: int) -> SitePlan:
        """The same with a rank that is known."""
        if site.rank is not None and rank >= site.rank:
            return SitePlan(DENSE, note=f"already at rank {site.rank}", storage=self.storage)
        if not is_smaller(site.shape, rank):
            return SitePlan(DENSE, note=f"rank {rank} is not below break-even", storage=self.storage)
        return SitePlan(self.method, rank=rank, storage=self.storage)


class Spectra(Protocol):
    """What a plan has to know of the matrices themselves."""

    def losses(self, site: Site) -> Tensor:
        """What leaving out each direction of a site costs, largest first, in a unit that is the same for all sites."""
        ...

    def identity(self, site: Site) -> Hashable:
        """Equal for sites that share one parameter."""
        ...

    def itemsize(self, site: Site) -> int:
        """Bytes of one number of a site as it is."""
        ...


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
        if (self.rank is None) == (self.keep is None):
            raise SlimLSTMError(f"give either rank or keep, not rank={self.rank} and keep={self.keep}")
        _check_rank_or_keep(self.rank, self.keep)
        _check_target(self.target)

    def site_plan(self, site: Site) -> SitePlan:
        """What this configuration means for one site; keeping all weights leaves it as it is."""
        size = site.shape[0] * site.shape[1]
        kept = (
            nonzeros_at_rank(site.shape, self.rank) if self.rank is not None else max(1, round((self.keep or 0.0) * size))
        )
        if site.rank is not None:
            raise SlimLSTMError(
                f"{site.key} is kept as factors of rank {site.rank}; a mask on their product would not last"
            )
        if kept >= site.parameters:
            return SitePlan(DENSE, note=f"{site.parameters:,} weights are no more than the {kept:,} to keep")
        return SitePlan(PRUNE, nonzeros=kept)


@dataclass(frozen=True)
class Quantize:
    """Keeps the weights of matrices, or of the factors that stand for them, in less than float32.

    int8 has a float32 scale for every row. The parameters stay float32 in memory, rounded to what the storage holds, so
    that every backend computes with the same weights and training goes on from them; the fused kernel reads, and
    :func:`slimlstm.save` writes, the small form. Of a projected layer, ``weight_hr`` goes with ``weight_hh``. Weights that
    a mask hides become zero.

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
    """What is to happen to one site: a solver and its ``rank``, ``"prune"`` and its ``nonzeros``, or ``"dense"``.

    ``"dense"`` leaves it as it is. ``storage`` is what its weights are then rounded to; None leaves that as it is, too, but
    new factors are always float32 unless it says otherwise.
    """

    method: str
    rank: int | None = None
    nonzeros: int | None = None
    note: str = ""
    storage: str | None = None

    def __post_init__(self) -> None:
        if self.storage is not None:
            check_storage(self.storage)
        complete = {DENSE: True, PRUNE: self.nonzeros is not None}.get(self.method, self.rank is not None)
        if self.method not in (*METHODS, DENSE, PRUNE) or not complete:
            raise SlimLSTMError(
                f"{self} is no plan for a site: a method of {', '.join(map(repr, METHODS))} needs a rank, "
                f"{PRUNE!r} needs nonzeros, {DENSE!r} nothing"
            )

    def __str__(self) -> str:
        amount = {DENSE: self.note, PRUNE: f"{self.nonzeros:,} weights" if self.nonzeros else ""}
        parts = self.method, self.storage, amount.get(self.method, f"rank {self.rank}")
        return " ".join(part for part in parts if part)

    def storage_of(self, site: Site) -> str | None:
        """What the site is stored in afterwards; None where that is its dtype."""
        before = site.storage if self.method in (DENSE, PRUNE) else None
        after = self.storage or before
        return None if after == "float32" else after

    def of(self, site: Site) -> SitePlan:
        """The same for one site: without a storage or, where it is stored already, factors that would take more bytes."""
        after = self.storage_of(site)
        is_whole, whole = site.storage is None and self.rank is None, matrix_bytes(site.shape, site.rank, None, 4)
        if after and is_whole and matrix_bytes(site.shape, site.rank, after, 4) >= whole:
            note = f"{after} would take no fewer bytes"
            return replace(self, storage=None, note="; ".join(filter(None, (self.note, note))))
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


def make_plan(config: LowRank | Prune | Quantize | Plan, sites: list[Site], spectra: Spectra | None = None) -> Plan:
    """The plan that ``config`` means for a model with these sites.

    ``spectra`` is asked only where ranks depend on what is in the matrices.

    Raises:
        SlimLSTMError: no site is meant, a site that is meant cannot be compressed, a plan names an unknown site, a rank is
            above that of every matrix, or a budget is too small for rank 1 everywhere.
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
        if isinstance(config, LowRank) and config.needs_spectra:
            _check_possible(chosen)
            if spectra is None:
                raise SlimLSTMError("global allocation and energy take the model itself; use compress_, or a uniform keep")
            plan = _shared_out(config, chosen, spectra)
        else:
            if not isinstance(config, Quantize):
                _check_rank(config, chosen)
            plan = Plan({site.key: config.site_plan(site) for site in chosen})
    plan = Plan({site.key: plan.sites[site.key].of(site) for site in chosen})
    _check_possible(chosen)
    return plan


def _check_possible(sites: list[Site]) -> None:
    for site in sites:
        if site.problem is not None:
            raise SlimLSTMError(site.problem)


def _shared_out(config: LowRank, sites: list[Site], spectra: Spectra) -> Plan:
    """The plan of a configuration whose ranks depend on the matrices' spectra."""
    if config.energy is not None:
        return Plan({site.key: config.at_rank(site, rank_for_share(spectra.losses(site), config.energy)) for site in sites})
    firsts: dict[Hashable, Site] = {}
    for site in sites:
        firsts.setdefault(spectra.identity(site), site)

    def unit(site: Site, rank: int | None) -> int:
        if config.bytes is not None:
            return matrix_bytes(site.shape, rank, config.storage, spectra.itemsize(site))
        return site.shape[0] * site.shape[1] if rank is None else rank * sum(site.shape)

    curves: dict[str, RankCosts] = {}
    for site in firsts.values():
        losses = spectra.losses(site)
        left_out = [*losses.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        one, two, whole = (unit(site, rank) for rank in (1, 2, site.rank))
        fixed = 2 * one - two  # scales of U's rows
        curves[site.key] = RankCosts(left_out[: (site.rank or len(losses)) + 1], two - one, whole - fixed, fixed)
    size = sum(m * n for m, n in (site.shape for site in firsts.values()))
    # As for a single matrix, a whole number that rounding put just below itself is meant.
    budget = config.bytes or (config.keep or 0.0) * size * (1 + 1e-12)
    ranks = allocate(curves, budget)
    plans: dict[str, SitePlan] = {}
    for site in sites:
        rank = ranks[firsts[spectra.identity(site)].key]
        whole = SitePlan(DENSE, note="stays whole, as more is lost elsewhere", storage=config.storage)
        plans[site.key] = whole if rank is None else config.at_rank(site, rank)
    return Plan(plans)


def _as_possible(plan: SitePlan, site: Site) -> SitePlan:
    if plan.method == DENSE:
        return plan
    if plan.method == PRUNE:
        _check_kept(plan, site)
        possible = Prune(keep=1.0).site_plan(site) if plan.nonzeros == site.parameters else plan
    else:
        config = LowRank(plan.method, plan.rank)
        _check_rank(config, [site])
        possible = config.site_plan(site)
    return replace(possible, storage=plan.storage)


def _check_kept(plan: SitePlan, site: Site) -> None:
    if site.rank is not None:
        Prune(rank=1).site_plan(site)
    size = site.shape[0] * site.shape[1]
    if plan.nonzeros is None or not 1 <= plan.nonzeros <= size:
        raise SlimLSTMError(f"{site.key} has {size:,} weights; {plan.nonzeros} of them cannot be kept")


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


def _check_rank_or_keep(rank: object, keep: object) -> None:
    if rank is not None and (type(rank) is not int or rank < 1):
        raise SlimLSTMError(f"a rank is an int of at least 1, not {rank!r}")
    if keep is not None and not (isinstance(keep, int | float) and type(keep) is not bool and 0.0 < keep <= 1.0):
        raise SlimLSTMError(f"keep is a fraction of the parameters in (0, 1], not {keep!r}")


def _check_target(target: object) -> None:
    if target not in ("ih", "hh", "both"):
        raise SlimLSTMError(f"the target is 'ih', 'hh' or 'both', not {target!r}")
