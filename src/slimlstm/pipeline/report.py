"""Reports of a compression: for every site and in total, to print and to keep."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from slimlstm.errors import SlimLSTMError
from slimlstm.files import write_text
from slimlstm.pipeline.plan import Plan
from slimlstm.pipeline.trials import Trials
from slimlstm.tables import new_table


def as_text(table: RenderableType) -> str:
    """Return a rich table as text of at most 160 columns, without colour."""
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)  # noqa: S101 (made above)
    return console.file.getvalue().rstrip()


@dataclass(frozen=True)
class SiteReport:
    """Result of a compression at one site.

    Attributes:
        key, shape: the site's key and its shape (m, n).
        method: a key of :data:`slimlstm.methods.METHODS`, or ``"dense"``. A matrix that is only rounded keeps the method
            that made its factors or its mask.
        rank: the rank of the factors afterwards, None for a dense matrix.
        break_even_rank: m n / (m + n), at and above which factors are no smaller than the matrix.
        parameters_before, parameters_after: the numbers in the matrix or its factors; weights under a mask do not count.
        bytes_before, bytes_after: the bytes in the saved file, scales included. A mask takes a byte more for each weight;
            an ONNX file has none. The fused kernel reads as many bytes; the parameters in memory stay float32.
        relative_error: ‖W - W'‖_F / ‖W‖_F, rounding included.
        iterations, converged: the iterations of an iterative solver, and whether it converged; 0 and True for a direct one.
        note: why the site was treated differently from its configuration.
        storage: the storage afterwards, None for the matrix's own dtype.
        predicted_rise: the rise of the mean loss that the calibration predicts for this site alone.
        source_sha256: the SHA-256 of the matrix before; empty where nothing changed.
        spectrum: pairs (rank, share of the method's loss that the directions beyond this rank hold), at some ranks up to
            the full one; empty where the method does not rank directions.
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
    source_sha256: str = ""
    spectrum: tuple[tuple[int, float], ...] = ()


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
        plan: the decision for every selected site.
        lstm: the total of the LSTMs with their biases.
        model: the total of the whole model, or of the whole ONNX file.
        notes: further remarks, one sentence each.
        loss_before, loss_after: mean losses on the calibration batches, where a loss was given.
        forms: the form of every compressed LSTM operator of an ONNX file, ``"lstm"`` or ``"scan"``, and the reason.
        lstm_since_dense, model_since_dense: the totals of all compressions together; None where this is the first one.

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
    forms: dict[str, str] = field(default_factory=dict[str, str])
    lstm_since_dense: Total | None = None
    model_since_dense: Total | None = None

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
        parts = [f"predicted {predicted:+.3g}"] if predicted is not None else []
        if measured is not None and self.loss_before is not None:
            parts.append(f"measured {measured:+.3g} (from {self.loss_before:.4g})")
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
        table.caption = "\n".join(self._lines())
        return table

    def _lines(self) -> list[str]:
        """Return the totals and notes in words."""
        totals = {"LSTM": self.lstm, "model": self.model}
        totals |= {"LSTM, since dense": self.lstm_since_dense, "model, since dense": self.model_since_dense}
        lines = [f"{name}: {total}" for name, total in totals.items() if total is not None]
        notes = [f"{site.key}: {site.note}" for site in self.sites if site.note]
        notes += [f"{name}: {form}" for name, form in self.forms.items()]
        return [*lines, *notes, *self.notes, *filter(None, [self.loss_note])]

    def __str__(self) -> str:
        return as_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        sites = [{**asdict(site), "shape": list(site.shape)} for site in self.sites]
        return {**asdict(self), "sites": sites, "plan": self.plan.to_dict()}

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        from slimlstm.page.document import element
        from slimlstm.pipeline.report_page import sites_table

        return sites_table(self) + "".join(element("p", line) for line in self._lines())

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "Compressed model",
        trials: Trials | None = None,
        latencies: Mapping[str, float] | None = None,
        usage: str = "",
        files: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        """Write the report as one page for a browser, which needs no network and no script.

        Args:
            path: the file to write, such as ``"report.html"``; an existing file is replaced.
            title: the page's heading.
            trials: every model that was tried, such as the result of a search.
            latencies: median seconds by engine, measured side by side.
            usage: how to load the model; by default by :func:`slimlstm.save` and :func:`slimlstm.load`.
            files: files to list with their sizes and SHA-256.

        Raises:
            SlimLSTMError: the package that draws is not installed, ``path`` is a folder or has no suffix, or one of
                ``files`` does not exist.

        Examples:
            >>> import slimlstm, tempfile, torch
            >>> report = slimlstm.compress_(torch.nn.Sequential(torch.nn.LSTM(8, 16)), slimlstm.LowRank(rank=2))
            >>> report.to_html(Path(tempfile.mkdtemp()) / "report.html", title="Example")
        """
        from slimlstm.pipeline.report_page import USAGE, digest_of, report_page

        if Path(path).is_dir() or not Path(path).suffix:
            raise SlimLSTMError(f"{path} is no name of a file; name one that ends in .html")
        hashes = {str(file): digest_of(Path(file)) for file in files}
        write_text(path, report_page(self, title, trials, latencies, usage or USAGE, hashes))

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Return the report that :meth:`to_dict` wrote."""
        entries: list[dict[str, Any]] = data["sites"]
        sites = [SiteReport(**{**entry, **_tuples(entry)}) for entry in entries]
        lstm, model = Total(**data["lstm"]), Total(**data["model"])
        plan, losses = Plan.from_dict(data["plan"]), (data.get("loss_before"), data.get("loss_after"))
        earlier = (data.get("lstm_since_dense"), data.get("model_since_dense"))
        since = (None if total is None else Total(**total) for total in earlier)
        return cls(sites, plan, lstm, model, data["notes"], *losses, data.get("forms", {}), *since)


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a site's entry that JSON turned from tuples into lists."""
    return {"shape": tuple(entry["shape"]), "spectrum": tuple((rank, share) for rank, share in entry.get("spectrum", ()))}
