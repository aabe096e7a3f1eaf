"""The loss of a model at every size of every matrix: predicted from the moments, and corrected by measurements.

A size is a pair of rank and storage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.files import check_regular, write_json
from slimlstm.methods import DENSE, Option, choose_options
from slimlstm.pipeline.plan import Plan
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.tables import new_table

_FORMAT = "slimlstm sensitivity 1"


@dataclass(frozen=True)
class Probe:
    """One measurement: the rise of the mean loss on held-out batches when only this matrix changes.

    Attributes:
        rank: the rank of its factors in float32, or None for a dense matrix.
        storage: the storage that the dense matrix was rounded to, or ``"float32"`` for factors.
        predicted: the rise that the moments predict.
        measured: the rise that was measured.
    """

    rank: int | None
    storage: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class SiteSensitivity:
    """One matrix, with all sizes that it may have.

    Attributes:
        keys: the keys of the sites that share it.
        shape: (m, n).
        options: its sizes, and the predicted rise of the mean loss for each, corrected by the probes.
        probes: the measurements.
    """

    keys: tuple[str, ...]
    shape: tuple[int, int]
    options: tuple[Option, ...]
    probes: tuple[Probe, ...] = ()

    def rise(self, plan: SitePlan) -> float | None:
        """Return the rise of a plan that is one of the options, or None."""
        rank = None if plan.method == DENSE else plan.rank
        return next((o.loss for o in self.options if (o.rank, o.storage) == (rank, plan.storage)), None)


@dataclass(frozen=True)
class Sensitivity:
    """The sizes of every matrix of a model and their losses, from which plans for any budget follow at once.

    Attributes:
        method: the method that finds the factors.
        sites: one entry for every matrix.
        is_measured: whether probes corrected the predictions.

    Examples:
        >>> options = (Option(None, "int3", 400, 0.2), Option(None, "int4", 520, 0.05))
        >>> sensitivity = Sensitivity("fisher", [SiteSensitivity(("lstm.weight_hh_l0",), (40, 25), options)], True)
        >>> print(sensitivity.plan(600))
        lstm.weight_hh_l0: dense int4
        >>> sensitivity.predicted_rise(sensitivity.plan(600)), sensitivity.smallest_bytes
        (0.05, 400)
    """

    method: str
    sites: Sequence[SiteSensitivity]
    is_measured: bool

    def of(self, keys: Collection[str]) -> Sensitivity:
        """Return the sensitivity of these sites alone."""
        return replace(self, sites=[site for site in self.sites if set(site.keys) & set(keys)])

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that :meth:`plan` accepts."""
        return sum(min(option.bytes for option in site.options) for site in self.sites)

    def plan(self, budget: int) -> Plan:
        """Return the plan that loses least in ``budget`` bytes for all matrices together.

        Raises:
            SlimLSTMError: the budget is below :attr:`smallest_bytes`.
        """
        chosen = choose_options({site.keys[0]: site.options for site in self.sites}, budget)
        plans = {site.keys: self._plan_of(chosen[site.keys[0]]) for site in self.sites}
        return Plan({key: plan for keys, plan in plans.items() for key in keys})

    def _plan_of(self, option: Option) -> SitePlan:
        if option.rank is None:
            return SitePlan(DENSE, storage=option.storage)
        return SitePlan(self.method, rank=option.rank, storage=option.storage)

    def predicted_rise(self, plan: Plan) -> float:
        """Return the sum of the rises of a plan's matrices.

        Raises:
            SlimLSTMError: the plan has a matrix or size that was not considered.
        """
        rises = [(site.keys[0], site.rise(plan.sites[site.keys[0]])) for site in self.sites if site.keys[0] in plan.sites]
        unknown = [key for key, rise in rises if rise is None]
        if unknown or not rises:
            raise SlimLSTMError(
                f"no rise is known for the sizes of {', '.join(unknown) or 'any matrix'}; take a plan of this sensitivity"
            )
        return sum(rise for _, rise in rises if rise is not None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a JSON file; :meth:`load` reads it."""
        write_json(path, {"format": _FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read a file that :meth:`save` wrote.

        Raises:
            SlimLSTMError: the file is missing, or holds no sensitivity.
        """
        try:
            check_regular(path)
            with Path(path).open(encoding="utf-8") as file:
                data: dict[str, Any] = json.load(file)
            if data.get("format") != _FORMAT:
                raise SlimLSTMError(f"{path} holds no sensitivity that this slimlstm can read; measure it again")
            return cls(data["method"], [_site(entry) for entry in data["sites"]], data["is_measured"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SlimLSTMError(f"{path} is no intact sensitivity: {reason_of(error)}; measure it again") from error

    def __rich__(self) -> Table:
        """Return a table of the probes: which matrix costs what."""
        table = new_table(["matrix", "probe"], ["shape", "predicted", "measured", "ratio"])
        for site in self.sites:
            for probe in site.probes:
                what = f"rank {probe.rank}" if probe.rank is not None else probe.storage
                ratio = f"{probe.measured / probe.predicted:.1f}" if probe.predicted > 0 else ""
                shape = f"{site.shape[0]} x {site.shape[1]}"
                table.add_row(site.keys[0], what, shape, f"{probe.predicted:+.4f}", f"{probe.measured:+.4f}", ratio)
        return table


def _site(entry: dict[str, Any]) -> SiteSensitivity:
    m, n = entry["shape"]
    options, probes = (Option(**o) for o in entry["options"]), (Probe(**p) for p in entry["probes"])
    return SiteSensitivity(tuple(entry["keys"]), (m, n), tuple(options), tuple(probes))
