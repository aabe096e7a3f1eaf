"""Make printed tables in one style: with few lines, to fit 80 columns, and with cells that wrap instead of being cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def new_table(texts: Sequence[str] = (), numbers: Sequence[str] = ()) -> Table:
    """Return an empty table with columns of texts, aligned left, and then columns of numbers, aligned right.

    Args:
        texts: the headings of the columns of texts.
        numbers: the headings of the columns of numbers.

    Examples:
        >>> table = new_table(["site"], ["rank"])
        >>> table.add_row("encoder.weight_hh_l0", "16")
        >>> table.row_count, [column.header for column in table.columns]
        (1, ['site', 'rank'])
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, overflow="fold", justify="right")
    return table
