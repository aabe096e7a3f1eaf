"""Hold out batches that judge what the others were fitted to."""

from __future__ import annotations

_HELD_OUT = 5
"""One batch in this many is held out to judge the result; if there are fewer batches, all of them both fit and judge."""


def split_batches(count: int, has_costs: bool) -> tuple[range, range]:
    """Return the numbers of the batches to fit to, and of the batches that judge the result.

    Examples:
        >>> split_batches(10, has_costs=True)
        (range(0, 8), range(8, 10))
        >>> split_batches(3, has_costs=True)
        (range(0, 3), range(0, 3))
    """
    held_out = count // _HELD_OUT if has_costs else 0
    return range(count - held_out), range(count - held_out if held_out else 0, count)
