"""Find the sizes of every matrix, which are pairs of rank and storage, and their losses.

Moments predict the losses; a few measured losses correct the predictions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import METHODS, Factors, Option, break_even_rank, efficient, losses_of_ranks, matrix_bytes
from slimlstm.methods.low_bit import GROUP, largest_code
from slimlstm.modules.sites import Site
from slimlstm.ops.weights import Matrix, rebuilt
from slimlstm.pipeline.sensitivity import Probe, Sensitivity, SiteSensitivity
from slimlstm.pipeline.source import Source
from slimlstm.pipeline.statistics import SiteStatistics

BITS_OF = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "int3": 3}
"""The storages to choose from, and their bits."""
WIDE = "bfloat16"
"""The storage of whole matrices for which int8 would lose too much."""
_REFERENCE, _COARSEST = "int4", "int3"
"""The storage in which factors are rounded to predict other storages, and the storage whose loss is measured."""
_ROUNDED_AT = (0.06, 0.25, 0.9)
"""Fractions of the break-even rank at which factors are rounded, to predict the losses at other ranks."""
_PROBED_AT = (0.04, 0.15)
"""Fractions of the break-even rank whose losses are measured."""
_UNMEASURED = 3.0
"""Assumed ratio of truncation's loss to its prediction where nothing is measured; the ratio of rounding is then 1."""
_RANK_STEP = 1.08
"""Ratio of neighbouring ranks on the grid of ranks."""
_SHRINKAGE = 0.25
"""Weight of the mean ratio of all matrices against the ratio that was measured at one."""


class Judge(Protocol):
    """Measures the mean loss of the uncompressed source with certain matrices, on held-out batches."""

    def cost(self, weights: Mapping[str, Matrix]) -> float:
        """Return the mean loss with these matrices, by key; all others stay as they are."""
        ...


_Rise = Callable[[Mapping[str, Matrix]], float]
"""Returns the rise of the mean loss with these matrices, by key."""


@dataclass
class _Curves:
    """Predicted losses of one matrix: of truncation [k + 1], of rounding factors of some ranks, and of dense roundings."""

    keys: tuple[str, ...]
    site: Site
    truncation: list[float]
    rounding: list[tuple[int, float]]
    dense: dict[str, float]
    probes: tuple[Probe, ...]

    def rounding_at(self, rank: int, storage: str) -> float:
        """Return the loss of rounding factors of a rank, by interpolation of logarithms and the storage's share."""
        share = self.dense[storage] / max(self.dense[_REFERENCE], 1e-300)
        return share * _interpolated(self.rounding, rank)


def measure_sizes(
    source: Source,
    sites: Sequence[Site],
    statistics: SiteStatistics,
    method: str,
    judge: Judge | None,
    progress: Callable[[str, float], None] | None = None,
) -> Sensitivity:
    """Return the sizes of these sites' matrices and their losses.

    Args:
        source: holds the matrices.
        sites: the sites to compress; sites that share a parameter get one common entry.
        statistics: the sites' moments, with gradients.
        method: the method that finds the factors.
        judge: measures a few losses for each matrix; None leaves the moments' predictions as they are.
        progress: called with a site's key and the fraction done.

    Raises:
        SlimLSTMError: a matrix is compressed already, or the moments are missing.
    """
    groups: dict[Hashable, list[Site]] = {}
    for site in sites:
        if site.rank is not None or site.storage is not None or site.nonzeros is not None:
            raise SlimLSTMError(f"{site.key} is compressed already; choose rank and storage together on the dense model")
        groups.setdefault(source.identity(site), []).append(site)
    rise = None if judge is None else _measured_rise(judge)
    curves: list[_Curves] = []
    for index, group in enumerate(groups.values()):
        if progress is not None:
            progress(group[0].key, index / len(groups))
        curves.append(_curves(source, group, statistics, method, rise))
    truncations, roundings = _ratios(curves)
    found = [
        _site(one, truncation, rounding) for one, truncation, rounding in zip(curves, truncations, roundings, strict=True)
    ]
    return Sensitivity(method, found, judge is not None)


def _measured_rise(judge: Judge) -> _Rise:
    """Return a function that measures the rise of the mean loss with other matrices, by key."""
    baseline = judge.cost({})
    return lambda weights: judge.cost(weights) - baseline


def _curves(source: Source, group: Sequence[Site], statistics: SiteStatistics, method: str, rise: _Rise | None) -> _Curves:
    """Return the losses of the matrix that these sites share: the predicted ones, and a few that ``rise`` measures."""
    site, keys = group[0], tuple(site.key for site in group)
    matrix, rounder = rebuilt(source.weight(site)), statistics.rounder(site)
    loss = _Predicted(statistics, site, method)
    truncation = (losses_of_ranks(statistics.losses(site)) * loss.of_spectrum).tolist()
    factored = {rank: _factors(statistics, site, method, rank) for rank in _ranks_at(site, (*_ROUNDED_AT, *_PROBED_AT))}
    rounding: list[tuple[int, float]] = []
    for rank in _ranks_at(site, _ROUNDED_AT):
        u, v = rounder.factors(*factored[rank], matrix, _REFERENCE)
        rounding.append((rank, max(loss(matrix - u @ v) - truncation[rank], 1e-3 * truncation[rank], 1e-300)))
    rounded = {storage: rounder.matrix(matrix, storage) for storage in (WIDE, "int8", _REFERENCE, _COARSEST)}
    dense = {storage: loss(matrix - after) for storage, after in rounded.items()}
    for storage, bits in BITS_OF.items():
        # Rounding errors are proportional to the distance of neighbouring codes.
        dense.setdefault(storage, dense[_REFERENCE] * (largest_code(4) / largest_code(bits)) ** 2)
    probes: list[Probe] = []
    if rise is not None:
        for rank in _ranks_at(site, _PROBED_AT):
            probes.append(Probe(rank, "float32", truncation[rank], rise(dict.fromkeys(keys, factored[rank]))))
        probes.append(Probe(None, _COARSEST, dense[_COARSEST], rise(dict.fromkeys(keys, rounded[_COARSEST]))))
    return _Curves(keys, site, truncation, rounding, dense, tuple(probes))


class _Predicted:
    """Predicts the rise of the mean loss that an error of a site's matrix causes."""

    def __init__(self, statistics: SiteStatistics, site: Site, method: str) -> None:
        self._moments = statistics.moments(site, method)
        self.of_spectrum = 0.5 / statistics.predictions
        self._scale = self._moments.rows / statistics.predictions

    def __call__(self, difference: Tensor) -> float:
        return self._moments.loss_of(difference.float()) * self._scale


def _factors(statistics: SiteStatistics, site: Site, method: str, rank: int) -> tuple[Tensor, Tensor]:
    found = METHODS[method].solve(statistics.problem(site, method), rank, None)
    assert isinstance(found, Factors)  # noqa: S101 (a configuration has checked that the method finds factors)
    return found.u, found.v


def _ranks_at(site: Site, fractions: Sequence[float]) -> list[int]:
    return sorted({max(1, round(fraction * break_even_rank(site.shape))) for fraction in fractions})


def _ratios(curves: Sequence[_Curves]) -> tuple[list[list[tuple[float, float]]], list[float]]:
    """Return the ratios of measured to predicted losses of every matrix.

    Each ratio is drawn towards the ratio of all matrices together, because measurements on few batches are noisy.

    Returns:
        For truncation a list of points (predicted loss, ratio), and for rounding one ratio.
    """
    if not curves[0].probes:
        return [[(1.0, _UNMEASURED)] for _ in curves], [1.0 for _ in curves]
    truncation = [probe for one in curves for probe in one.probes if probe.rank is not None]
    rounding = [probe for one in curves for probe in one.probes if probe.rank is None]
    pooled, pooled_rounding = _pooled(truncation), _pooled(rounding)
    points = [
        [
            (probe.predicted, _shrunk(probe, pooled))
            for probe in one.probes
            if probe.rank is not None and probe.predicted > 0
        ]
        for one in curves
    ]
    return (
        [own or [(1.0, pooled)] for own in points],
        [_shrunk(probe, pooled_rounding) for one in curves for probe in one.probes if probe.rank is None],
    )


def _pooled(probes: Sequence[Probe]) -> float:
    predicted = sum(probe.predicted for probe in probes)
    return max(sum(probe.measured for probe in probes) / predicted, 0.1) if predicted > 0 else 1.0


def _shrunk(probe: Probe, pooled: float) -> float:
    if probe.predicted <= 0:
        return pooled
    drawn = (1 - _SHRINKAGE) * probe.measured / probe.predicted + _SHRINKAGE * pooled
    return max(drawn, _SHRINKAGE * pooled)


def _site(curves: _Curves, truncation: list[tuple[float, float]], rounding: float) -> SiteSensitivity:
    """Return the efficient sizes of one matrix."""
    site = curves.site
    options = [
        Option(None, storage, matrix_bytes(site.shape, None, storage, 4), rounding * curves.dense[storage])
        for storage in (WIDE, *BITS_OF)
    ]
    for rank in _ranks(site):
        lost = curves.truncation[rank]
        lost *= _interpolated(truncation, lost) if lost > 0 else 1.0
        options += [
            Option(
                rank,
                storage,
                matrix_bytes(site.shape, rank, storage, 4),
                lost + rounding * curves.rounding_at(rank, storage),
            )
            for storage in BITS_OF
        ]
    return SiteSensitivity(curves.keys, site.shape, tuple(efficient(options)), curves.probes)


def _ranks(site: Site) -> list[int]:
    """Return the ranks to consider: a geometric grid, and the ranks that fill their groups of scales."""
    highest = math.ceil(break_even_rank(site.shape)) - 1
    grid = {round(_RANK_STEP**power) for power in range(1 + int(math.log(max(highest, 1)) / math.log(_RANK_STEP)))}
    return sorted(rank for rank in grid | set(range(GROUP, highest + 1, GROUP)) if 1 <= rank <= highest)


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return y at x > 0 on straight lines between the logarithms of points; constant beyond them."""
    ordered = sorted(points)
    if x <= ordered[0][0] or len(ordered) == 1:
        return ordered[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(ordered):
        if x <= x1:
            fraction = math.log(x / x0) / math.log(x1 / x0)
            return y0 * (y1 / y0) ** fraction
    return ordered[-1][1]
