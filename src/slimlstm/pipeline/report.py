"""Reports of a compression: for every site and in total, to print and to keep."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from slimlstm.pipeline.plan import Plan
from slimlstm.tables import new_table


def as_text(table: RenderableType) -> str:
    """Return what a rich table prints in 160 columns, without colour."""
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)  # noqa: S101 (made above)
    return console.file.getvalue().rstrip()


@dataclass(frozen=True)
class SiteReport:
    """Result of a compression at one site.

    Attributes:
        key, shape: of the site; (m, n).
        method: a key of :data:`slimlstm.methods.METHODS`, or ``"dense"``.
        rank: the rank of the factors afterwards, None for a dense matrix.
        break_even_rank: m n / (m + n), at and above which factors are no smaller than the matrix.
        parameters_before, parameters_after: the numbers in the matrix or its factors; weights under a mask do not count.
        bytes_before, bytes_after: in the saved file, scales included. A mask saves no bytes. The fused kernel reads as
            many; the parameters in memory stay float32.
        relative_error: ‖W - W'‖_F / ‖W‖_F, rounding included.
        iterations, converged: of an iterative solver; 0 and True for a direct one.
        note: why the site was treated differently from its configuration.
        storage: the storage afterwards, None for the matrix's own dtype.
        predicted_rise: the rise of the mean loss that the calibration predicts for this site alone.
    """

    key: str
    shape: tuple[int, int]
    method: str
    rank: int | None
    break_even_rank: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    relative_error: float
    iterations: int = 0
    converged: bool = True
    note: str = ""
    storage: str | None = None
    predicted_rise: float | None = None


@dataclass(frozen=True)
class Total:
    """Parameters and bytes before and after; shared parameters count once."""

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int

    @classmethod
    def between(cls, before: tuple[int, int], after: tuple[int, int]) -> Total:
        """Return the total of (parameters, bytes) before and after."""
        return cls(before[0], after[0], before[1], after[1])

    def __str__(self) -> str:
        return (
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes ({self.bytes_after / max(self.bytes_before, 1):.1%})"
        )


@dataclass(frozen=True)
class Report:
    """Result of a compression. Print it, keep ``to_dict()``, or repeat the compression with ``plan``.

    Attributes:
        sites: one report for every selected site.
        plan: what was decided, with ranks and storages.
        lstm: the total of the LSTMs with their biases.
        model: the total of the model; for an ONNX file, of the file.
        notes: what else to know.
        loss_before, loss_after: mean losses on the calibration batches, where a loss was given.

    Examples:
        >>> import slimlstm, torch
        >>> report = slimlstm.compress_(torch.nn.Sequential(torch.nn.LSTM(8, 16)), slimlstm.LowRank(rank=2))
        >>> [site.rank for site in report.sites]
        [2, 2]
    """

    sites: list[SiteReport]
    plan: Plan
    lstm: Total
    model: Total
    notes: list[str] = field(default_factory=list[str])
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def predicted_rise(self) -> float | None:
        """The sum of the sites' predicted rises of the mean loss; None without predictions."""
        rises = [site.predicted_rise for site in self.sites if site.predicted_rise is not None]
        return sum(rises) if rises else None

    @property
    def measured_rise(self) -> float | None:
        """The rise of the mean loss on the calibration batches; None where it was not measured."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before

    @property
    def loss_note(self) -> str:
        """The predicted and the measured rise in words, and a warning where they differ; empty without a loss."""
        predicted, measured = self.predicted_rise, self.measured_rise
        parts = [f"predicted {predicted:+.4f}"] if predicted is not None else []
        if measured is not None and self.loss_before is not None:
            parts.append(f"measured {measured:+.4f} (from {self.loss_before:.4f})")
        if predicted is None or measured is None:
            is_near = True
        else:
            # Where almost nothing is lost, rounding makes the ratio meaningless.
            is_near = abs(measured - predicted) < 1e-4 or 0.5 * predicted <= measured <= 2.0 * predicted
        if not is_near:
            parts.append("these differ: the prediction ranks plans here, but does not measure the loss")
        return "loss on the calibration batches: " + ", ".join(parts) if parts else ""

    def __rich__(self) -> Table:
        table = new_table(["site", "method"], ["shape", "rank", "parameters", "bytes", "error"])
        for site in self.sites:
            table.add_row(
                site.key,
                " ".join(filter(None, (site.method, site.storage))),
                f"{site.shape[0]} x {site.shape[1]}",
                "" if site.rank is None else str(site.rank),
                f"{site.parameters_after:,}",
                f"{site.bytes_after:,}",
                f"{site.relative_error:.4f}",
            )
        notes = [f"{site.key}: {site.note}" for site in self.sites if site.note]
        table.caption = "\n".join([f"LSTM:  {self.lstm}", f"model: {self.model}", *notes, *self.notes])
        if self.loss_note:
            table.caption += f"\n{self.loss_note}"
        return table

    def __str__(self) -> str:
        return as_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        sites = [{**asdict(site), "shape": list(site.shape)} for site in self.sites]
        return {**asdict(self), "sites": sites, "plan": self.plan.to_dict()}

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Return the report that :meth:`to_dict` wrote."""
        entries: list[dict[str, Any]] = data["sites"]
        sites = [replace(SiteReport(**entry), shape=(entry["shape"][0], entry["shape"][1])) for entry in entries]
        lstm, model = Total(**data["lstm"]), Total(**data["model"])
        plan, losses = Plan.from_dict(data["plan"]), (data.get("loss_before"), data.get("loss_after"))
        return cls(sites, plan, lstm, model, data["notes"], *losses)
