"""``slimlstm demo``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from slimlstm.cli.options import Force, Json, ReportPage, check_report
from slimlstm.cli.output import print_note, show
from slimlstm.errors import SlimLSTMError
from slimlstm.progress import shown

_PICTURE = Path("slimlstm-demo.png")
_HEADING = (
    "An AWD-LSTM language model of WikiText-2, compressed without training. Perplexity: per byte-pair token of held-out "
    "text. Parameters and bytes: of the LSTMs. Speed: of the LSTMs, relative to the dense model, batch 1, one thread."
)


def command(
    plot: Annotated[
        Path | None, typer.Option(help=f"File for the curves, PNG or PDF; by default {_PICTURE}, replaced if it exists.")
    ] = None,
    page: ReportPage = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compress the embedded language model by every method.

    Print quality, size and speed, and draw the curves. This takes a minute or two.
    """
    from slimlstm.demo import plots, tour

    if plot is not None and plot.is_file() and not force:
        raise SlimLSTMError(f"{plot} exists; add --force to replace it, or name another file")
    check_report(page, force)
    picture = plot or _PICTURE
    began = time.monotonic()
    is_drawn = plot is not None or plots.is_available()
    if is_drawn:
        plots.check_drawable(picture)
    with shown("compressing") as progress:
        found = tour.run(progress)
    note = "Without matplotlib no curves were drawn: pip install 'slimlstm[plots]'."
    if is_drawn:
        tour.draw(found, picture)
        note = f"The curves are in {picture}."
    if page is not None:
        found.report.to_html(page, title="The embedded language model, compressed by every method", trials=found)
        note += f" The report is in {page}."
    show({**found.to_dict(), "plot": str(picture) if is_drawn else None}, as_json, _HEADING, found, found.summary(), note)
    if not as_json:
        print_note(f"{time.monotonic() - began:.0f} s")
