"""Options that several verbs share, and the configuration that they describe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from slimlstm.errors import SlimLSTMError
from slimlstm.files import check_file_name

if TYPE_CHECKING:
    from slimlstm.modules.sites import Site
    from slimlstm.pipeline.config import LowRank, Prune, Quantize, Target

InputFile = Annotated[
    Path, typer.Argument(help="A .safetensors, .pt, .pth, .ckpt, .bin or .onnx file, or a compressed folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Form = Annotated[
    str,
    typer.Option(
        help="Form of the LSTMs in the ONNX file: lstm (the operator, dense once loaded), scan (a Scan that multiplies by "
        "factors), or auto (the form that is predicted to be faster in ONNX Runtime).",
    ),
]
ReportPage = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.html", help="Also write a report as a page for a browser.")
]
Method = Annotated[
    str,
    typer.Option(
        help="svd, semi-nmf or prune, or a registered method; compress takes activation or fisher too, for ONNX files with "
        "--batches.",
    ),
]
Rank = Annotated[int | None, typer.Option(help="Give every matrix factors of this rank.")]
Keep = Annotated[float | None, typer.Option(help="Keep this fraction of the parameters, above 0, at most 1.")]
Bytes = Annotated[int | None, typer.Option("--bytes", help="Spend this many bytes on all matrices together.")]
Energy = Annotated[float | None, typer.Option(help="Preserve this fraction of every matrix's squared singular values.")]
Allocation = Annotated[
    str | None,
    typer.Option(help="With --keep: uniform (every matrix alike) or global (one budget, spent where it helps most)."),
]
Targets = Annotated[str, typer.Option("--target", help="hh (hidden to hidden), ih (input to hidden) or both.")]
SiteFilter = Annotated[
    str | None,
    typer.Option("--filter", help="Compress only matrices whose name contains a match of this regular expression."),
]
Part = Annotated[
    str | None,
    typer.Option(help="The keys, joined by dots, that lead to the state dict, if a checkpoint has several."),
]
Storage = Annotated[
    str | None,
    typer.Option(help="Store weights or factors as bfloat16, int8, int6, int5, int4 or int3; may be given alone."),
]


def check_report(page: Path | None, force: bool) -> None:
    """Check that a report can be written to ``page``, before spending time on its content.

    Raises:
        SlimLSTMError: ``page`` does not end in .html, it exists and ``force`` is not given, or the package that draws is
            not installed.
    """
    if page is None:
        return
    if page.suffix.lower() not in (".html", ".htm") or page.is_dir():
        raise SlimLSTMError(f"--report {page} is no name of a page; name a file that ends in .html")
    if page.exists() and not force:
        raise SlimLSTMError(f"{page} exists; add --force to replace it, or name another file")
    check_file_name(page)
    from slimlstm.page.charts import check_available

    check_available()


@dataclass(frozen=True)
class Request:
    """A configuration as the command line describes it."""

    method: str
    rank: int | None
    keep: float | None
    target: str
    storage: str | None
    bytes: int | None = None
    energy: float | None = None
    allocation: str | None = None
    filter: str | None = None

    def has_size_or_storage(self) -> bool:
        """Return whether a size or a storage was given."""
        return any(value is not None for value in (self.rank, self.keep, self.bytes, self.energy, self.storage))

    def configuration(self) -> LowRank | Prune | Quantize:
        """Return the configuration.

        Raises:
            SlimLSTMError: a value is out of range, two values exclude each other, or the filter is no regular expression.
        """
        from slimlstm.pipeline.config import Quantize, configuration

        target, selects = cast("Target", self.target), self._filter()
        storage = None if self.storage_of_masked() else self.storage
        size: dict[str, Any] = {"rank": self.rank, "keep": self.keep, "bytes": self.bytes, "energy": self.energy}
        if self.storage is not None and self.method == "svd" and all(value is None for value in size.values()):
            if self.allocation is not None:
                raise SlimLSTMError("--allocation divides a budget among the matrices; give --keep too, or leave it out")
            return Quantize(self.storage, target, selects)
        size["allocation"] = self.allocation
        return configuration(self.method, storage=storage, target=target, filter=selects, **size)

    def check_needs_no_data(self, instead: str) -> None:
        """Check that the method needs no calibration, for a verb that has no batches.

        Args:
            instead: what to do, in words.

        Raises:
            SlimLSTMError: it needs calibration.
        """
        from slimlstm.methods import Needs, method_called

        if method_called(self.method).needs > Needs.NOTHING:
            raise SlimLSTMError(f"{self.method!r} has to see data; {instead}")

    def storage_of_masked(self) -> str | None:
        """Return the storage to round to after masking; None for other methods, whose configuration holds the storage."""
        from slimlstm.methods import method_called

        return self.storage if method_called(self.method).makes_mask else None

    def _filter(self) -> Any:
        if self.filter is None:
            return None
        try:
            pattern = re.compile(self.filter)
        except re.error as error:
            raise SlimLSTMError(f"--filter {self.filter!r} is no regular expression: {error}") from error

        def selects(site: Site) -> bool:
            return pattern.search(site.key) is not None

        return selects
