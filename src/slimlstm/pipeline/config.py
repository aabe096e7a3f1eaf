"""Configurations: rules that say how to compress every matrix they select."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import (
    DENSE,
    METHODS,
    STORAGES,
    Method,
    Needs,
    factoring_methods,
    is_smaller,
    method_called,
    nonzeros_at_rank,
    rank_for_fraction,
    storage_called,
)
from slimlstm.modules.sites import Site
from slimlstm.pipeline.site_plan import SitePlan

Target = Literal["ih", "hh", "both"]
AUTO = "auto"
"""The storage to give for a plan that chooses storage and rank of every matrix together."""
Filter = Callable[[Site], bool]


@dataclass(frozen=True)
class LowRank:
    """Replace matrices by products of two factors.

    Give the size by exactly one of ``rank``, ``keep``, ``bytes`` and ``energy``.

    Attributes:
        method: a factoring method of :data:`slimlstm.methods.METHODS`: ``"svd"``, ``"semi-nmf"``, or one that needs
            calibration, ``"activation"`` or ``"fisher"``.
        rank: the same rank for every matrix.
        keep: the fraction of the parameters that the factors may hold, in (0, 1].
        target: ``"hh"`` (hidden-to-hidden matrices), ``"ih"`` (input-to-hidden matrices) or ``"both"``.
        filter: takes a :class:`slimlstm.modules.sites.Site` and returns whether to compress it; None selects all.
        allocation: ``"uniform"`` keeps the same fraction of every matrix. ``"global"`` spends one budget where it reduces
            the method's loss the most (:func:`slimlstm.methods.allocate`). None means global for calibrated methods, whose
            losses are comparable between matrices, and uniform for others.
        bytes: a budget in bytes for all selected matrices, counted in ``storage``; always global.
        energy: the fraction of Σ σ² (of the method's losses) that every matrix preserves, in (0, 1].
        storage: also round the factors to this storage; see :class:`Quantize`. ``"auto"`` chooses rank and storage of
            every matrix together, from 3 to 8 bits, where dense matrices are a choice too. It takes ``bytes`` and a method
            that needs gradients, and measures a few losses for every matrix (:mod:`slimlstm.pipeline.probing`).

    Raises:
        SlimLSTMError: an unknown method, target or storage, a value out of range, or two values that exclude each other.

    Examples:
        >>> LowRank("svd", keep=0.5, target="hh").method
        'svd'
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
        method = METHODS.get(self.method) if type(self.method) is str else None
        if method is None or method.makes_mask:
            names = ", ".join(map(repr, factoring_methods()))
            raise SlimLSTMError(f"no method that finds factors is called {self.method!r}; the methods are {names}")
        sizes = {"rank": self.rank, "keep": self.keep, "bytes": self.bytes, "energy": self.energy}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) != 1:
            raise SlimLSTMError(
                f"give exactly one of rank, keep, bytes and energy, not {', '.join(given) or 'none'}; whole matrices in a "
                "smaller storage, by Quantize or by --storage alone, need none"
            )
        _check_rank_or_keep(self.rank, self.keep)
        if self.bytes is not None and (type(self.bytes) is not int or self.bytes < 1):
            raise SlimLSTMError(f"bytes is an int of at least 1, not {self.bytes!r}")
        if self.energy is not None and not _is_fraction(self.energy):
            raise SlimLSTMError(f"energy is a fraction in (0, 1], not {self.energy!r}")
        if self.is_auto:
            self._check_auto(method)
        elif self.storage is not None:
            storage_called(self.storage)
        check_selection(self.target, self.filter)
        self._check_allocation(given[0])
        if method.spectrum is None and self.needs_spectra:
            raise SlimLSTMError(f"{self.method} has no spectrum to choose ranks from; give rank or keep")

    def _check_allocation(self, given: str) -> None:
        if self.allocation not in (None, "uniform", "global"):
            raise SlimLSTMError(f"allocation is 'uniform' or 'global', not {self.allocation!r}")
        if self.allocation == "global" and given in ("rank", "energy"):
            raise SlimLSTMError(f"{given} is the same for every matrix and cannot be allocated; give keep or bytes")
        if self.allocation == "uniform" and given == "bytes":
            raise SlimLSTMError("bytes are one budget for all matrices; give keep for a uniform allocation")

    def _check_auto(self, method: Method) -> None:
        if self.bytes is None:
            raise SlimLSTMError(
                "storage='auto' chooses rank and bits for one budget; give bytes=, not rank, keep or energy"
            )
        if method.needs < Needs.GRADIENTS or method.spectrum is None:
            raise SlimLSTMError(f"storage='auto' compares losses between matrices; {self.method!r} has none, use 'fisher'")

    @property
    def is_auto(self) -> bool:
        """Whether rank and storage of every matrix are chosen together."""
        return self.storage == AUTO

    @property
    def is_global(self) -> bool:
        """Whether the matrices share one budget."""
        if self.bytes is not None or self.allocation == "global":
            return True
        return self.allocation is None and self.keep is not None and METHODS[self.method].needs > Needs.NOTHING

    @property
    def needs_spectra(self) -> bool:
        """Whether the ranks depend on the numbers in the matrices."""
        return self.is_global or self.energy is not None

    def site_plan(self, site: Site) -> SitePlan:
        """Return the plan for one site, at ``rank`` or ``keep``."""
        rank = self.rank if self.rank is not None else rank_for_fraction(site.shape, self.keep or 0.0)
        return self.at_rank(site, rank)

    def at_rank(self, site: Site, rank: int) -> SitePlan:
        """Return the plan for one site at a rank; a rank that saves nothing leaves the site as it is."""
        if site.rank is not None and rank >= site.rank:
            return SitePlan(DENSE, note=f"already at rank {site.rank}", storage=self.storage)
        if not is_smaller(site.shape, rank):
            return SitePlan(DENSE, note=f"rank {rank} is not below break-even", storage=self.storage)
        return SitePlan(self.method, rank=rank, storage=self.storage)


@dataclass(frozen=True)
class Prune:
    """Zero the weights of smallest magnitude, matrix by matrix; a mask holds them at zero.

    Attributes:
        rank: leave as many weights as factors of this rank hold, r (m + n). Give either this or ``keep``.
        keep: the fraction of every matrix's weights to leave, in (0, 1].
        target, filter: see :class:`LowRank`.
        method: a masking method of :data:`slimlstm.methods.METHODS`.

    Raises:
        SlimLSTMError: an unknown method or target, a value out of range, or not exactly one of ``rank`` and ``keep``.

    Examples:
        >>> Prune(keep=0.1).keep
        0.1
    """

    rank: int | None = None
    keep: float | None = None
    target: Target = "both"
    filter: Filter | None = None
    method: str = "prune"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.keep is None):
            raise SlimLSTMError(f"give either rank or keep, not rank={self.rank} and keep={self.keep}")
        if not method_called(self.method).makes_mask:
            raise SlimLSTMError(f"{self.method!r} finds factors, not a mask; use LowRank({self.method!r}, ...)")
        _check_rank_or_keep(self.rank, self.keep)
        check_selection(self.target, self.filter)

    def site_plan(self, site: Site) -> SitePlan:
        """Return the plan for one site; a site whose weights would all stay is left as it is.

        Raises:
            SlimLSTMError: the site is factored.
        """
        check_maskable(site)
        nonzeros = max(1, round((self.keep or 0.0) * site.shape[0] * site.shape[1]))
        if self.rank is not None:
            nonzeros = nonzeros_at_rank(site.shape, self.rank)
        if nonzeros >= site.parameters:
            return SitePlan(DENSE, note=f"{site.parameters:,} weights are no more than the {nonzeros:,} to keep")
        return SitePlan(self.method, nonzeros=nonzeros)


@dataclass(frozen=True)
class Quantize:
    """Round the weights of matrices, or of their factors, to a storage smaller than float32.

    int8 has a float32 scale for every row; int6 to int3 have a float16 scale for every 64 weights of a row. The parameters
    stay float32 in memory, rounded to numbers that the storage can hold, so every backend computes with the same weights.
    :func:`slimlstm.finetune` keeps them such numbers; other training does not. The fused kernel reads the small form, and
    :func:`slimlstm.save` writes it. The projection ``weight_hr`` is rounded together with ``weight_hh``. Weights that a
    mask hides become zero.

    Attributes:
        storage: ``"int8"``, ``"bfloat16"`` or another row of :data:`slimlstm.methods.STORAGES`, except ``"float32"``.
        target, filter: see :class:`LowRank`.

    Raises:
        SlimLSTMError: an unknown storage or target.

    Examples:
        >>> Quantize("int8").storage
        'int8'
    """

    storage: str
    target: Target = "both"
    filter: Filter | None = None

    def __post_init__(self) -> None:
        small = [name for name in STORAGES if name != "float32"]
        if self.storage == "float32":
            raise SlimLSTMError(
                f"in float32 nothing gets smaller; the storages to round to are {', '.join(map(repr, small))}"
            )
        if self.storage not in small:
            raise SlimLSTMError(f"no storage is called {self.storage!r}; the storages are {', '.join(map(repr, small))}")
        check_selection(self.target, self.filter)

    def site_plan(self, site: Site) -> SitePlan:
        """Return the plan for any site: only the storage changes, factors and masks stay."""
        return SitePlan(DENSE, storage=self.storage)


def configuration(
    method: str, *, storage: str | None = None, target: Target = "both", filter: Filter | None = None, **size: Any
) -> LowRank | Prune:
    """Return the configuration for a method by name: :class:`LowRank` or :class:`Prune`.

    Args:
        method: a key of :data:`slimlstm.methods.METHODS`.
        storage, target, filter: see :class:`LowRank`.
        size: ``rank`` or ``keep``, and for factors ``bytes``, ``energy`` and ``allocation``.

    Raises:
        SlimLSTMError: a masking method gets a storage or a size other than ``rank`` and ``keep``; or see the
            configurations.

    Examples:
        >>> configuration("prune", keep=0.5)
        Prune(rank=None, keep=0.5, target='both', filter=None, method='prune')
    """
    if not method_called(method).makes_mask:
        return LowRank(method, target=target, filter=filter, storage=storage, **size)
    if storage is not None:
        raise SlimLSTMError(f"{method!r} takes no storage; round its result with Quantize({storage!r}) afterwards")
    unknown = [name for name, value in size.items() if name not in ("rank", "keep") and value is not None]
    if unknown:
        raise SlimLSTMError(f"{method!r} takes rank or keep, not {', '.join(unknown)}")
    return Prune(size.get("rank"), size.get("keep"), target, filter, method)


def check_maskable(site: Site) -> None:
    """Raise :class:`SlimLSTMError` if the site is factored."""
    if site.rank is not None:
        raise SlimLSTMError(f"{site.key} is a product of factors of rank {site.rank}; a mask on the product would not last")


def check_selection(target: object, filter: object) -> None:
    """Raise :class:`SlimLSTMError` unless the target is one of three, and the filter a function or None."""
    if target not in ("ih", "hh", "both"):
        raise SlimLSTMError(f"the target is 'ih', 'hh' or 'both', not {target!r}")
    if filter is not None and not callable(filter):
        raise SlimLSTMError(f"a filter is a function of a site, such as lambda site: 'encoder' in site.key, not {filter!r}")


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0.0 < value <= 1.0


def _check_rank_or_keep(rank: object, keep: object) -> None:
    if rank is not None and (type(rank) is not int or rank < 1):
        raise SlimLSTMError(f"a rank is an int of at least 1, not {rank!r}")
    if keep is not None and not _is_fraction(keep):
        raise SlimLSTMError(f"keep is a fraction of the parameters in (0, 1], not {keep!r}")
