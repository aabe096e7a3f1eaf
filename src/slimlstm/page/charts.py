"""Draw charts as SVG, by Vega-Lite. Colours are the page's variables, which differ between light, dark and print."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from slimlstm.errors import SlimLSTMError

WIDE, NARROW = 736, 340
"""Widths of charts in pixels: of a whole column, and of half a column or a telephone."""
_BASE = "https://vega.github.io/vega-datasets/"
"""The address that the renderer puts before links, although they lead into the page."""
_MOST_TICKS = 7
"""The largest number of ticks on a logarithmic axis with ticks at 1, 2 and 5 times powers of ten."""
_LEAST_SHARE = 1e-4
"""The smallest share of a loss that the chart of a spectrum shows."""
_STYLE: dict[str, Any] = {
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "gridColor": "var(--line)",
        "domain": False,
        "ticks": False,
        "labelPadding": 6,
        "titlePadding": 8,
    },
    "text": {"fontSize": 12, "color": "var(--ink)"},
}


class Mark(NamedTuple):
    """A point of a scatter chart.

    Attributes:
        x, y: the position.
        kind: a key of :data:`KINDS`.
        text: a description, for readers who point at the mark.
        link: the id of an element of the page to link to, or empty.
        label: a label beside the mark in wide charts, or empty.
    """

    x: float
    y: float
    kind: str
    text: str
    link: str = ""
    label: str = ""


class Bar(NamedTuple):
    """A row of a bar chart.

    Attributes:
        name, note: the texts above and below the bar.
        value: the length of the bar.
        before: the length of the pale bar behind it, 0 for none.
        link: the id of an element of the page to link to, or empty.
        is_strong: whether the bar has the colour that stands out.
    """

    name: str
    note: str
    value: float
    before: float = 0.0
    link: str = ""
    is_strong: bool = True


KINDS: dict[str, dict[str, Any]] = {
    "beyond": {"shape": "circle", "filled": False, "stroke": "var(--soft)", "strokeWidth": 1.5, "size": 55},
    "within": {"shape": "circle", "filled": True, "fill": "var(--accent)", "size": 70},
    "dense": {"shape": "square", "filled": True, "fill": "var(--ink)", "size": 110},
    "best": {"shape": "diamond", "filled": True, "fill": "var(--warn)", "size": 220},
}
"""The looks of points; shapes and fills differ too, not only colours."""


def check_available() -> None:
    """Raise :class:`SlimLSTMError` if the renderer is not installed."""
    if find_spec("vl_convert") is None:
        raise SlimLSTMError(
            "vl-convert-python, which draws a report's charts, is not installed: pip install 'slimlstm[report]'"
        )


def scatter(
    marks: Sequence[Mark], x_title: str, y_title: str, width: int, *, limit: float | None, lower: bool, x_format: str
) -> str:
    """Return a chart of points as SVG; a stepped line joins the points of :func:`frontier`.

    Args:
        marks: at least one point.
        x_title, y_title: titles of the axes.
        width: the width in pixels.
        limit: a y to mark by a line, with its good side shaded; None for no line.
        lower: whether a lower y is better.
        x_format: the suffix of the unit of x, such as ``"B"``; SI prefixes come before it.
    """
    x, y = ([float(mark[index]) for mark in marks] for index in (0, 1))
    y_scale = _scale([*y, *([] if limit is None else [limit])], 3.0)
    edge = y_scale["domain"][0 if lower else 1]
    x_scale = _scale(x, 8.0)
    x_axis = {
        "title": x_title,
        "format": "~s",
        "labelExpr": f"replace(datum.label, /[a-zµ]?$/i, ' $&') + {x_format!r}",
        "grid": False,
    }
    y_axis = {"title": y_title, "format": "~r", "grid": True}
    encoding = {
        "x": {"field": "x", "type": "quantitative", "scale": x_scale, "axis": x_axis | _ticks(x_scale)},
        "y": {"field": "y", "type": "quantitative", "scale": y_scale, "axis": y_axis | _ticks(y_scale)},
    }
    layers = [] if limit is None else _limit_layers(limit, edge)
    steps = [{"x": mark.x, "y": mark.y} for mark in frontier(marks, lower)]
    layers.append(
        {
            "data": {"values": steps},
            "mark": {"type": "line", "interpolate": "step-after", "color": "var(--accent)", "strokeWidth": 1.5},
            "encoding": encoding,
        }
    )
    layers += [_points_layer([mark for mark in marks if mark.kind == kind], look, encoding) for kind, look in KINDS.items()]
    layers += [
        _label_layer(mark, encoding, mark.x > _middle(x), 18 if lower else -18)
        for mark in marks
        if mark.label and width == WIDE
    ]
    return _drawn({"width": width, "height": round(min(0.5 * width, 240) + 80), "layer": layers})


def frontier(marks: Sequence[Mark], lower: bool) -> list[Mark]:
    """Return the points for which no point with the same or a smaller x has a better y, by increasing x.

    Examples:
        >>> [mark.x for mark in frontier([Mark(1, 5, "", ""), Mark(2, 6, "", ""), Mark(3, 4, "", "")], lower=True)]
        [1, 3]
    """
    sign = 1.0 if lower else -1.0
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.x, sign * mark.y)):
        if not found or sign * mark.y < sign * found[-1].y:
            found.append(mark)
    return found


def bars(rows: Sequence[Bar], width: int = NARROW) -> str:
    """Return a chart of horizontal bars as SVG, each between its name and its note."""
    longest = max((max(row.value, row.before) for row in rows), default=0.0) or 1.0
    values = [
        {
            "row": index,
            "zero": 0,
            "name": row.name,
            "note": row.note,
            "value": max(row.value, 0.0),
            "before": row.before,
            "color": "var(--accent)" if row.is_strong else "var(--soft)",
            "text": f"{row.name}: {row.note}",
            "link": f"#{row.link}" if row.link else None,
        }
        for index, row in enumerate(rows)
    ]
    y = {"field": "row", "type": "ordinal", "axis": None}
    scale = {"domain": [0, longest], "nice": False}

    def length(field: str) -> dict[str, Any]:
        return {"field": field, "type": "quantitative", "scale": scale, "axis": None}

    def line(field: str, offset: int, color: str) -> dict[str, Any]:
        mark = {"type": "text", "align": "left", "dy": offset, "color": color, "limit": width - 12}
        return {"mark": mark, "encoding": {"x": length("zero"), "y": y, "text": {"field": field}}}

    def bar(field: str, **encoding: Any) -> dict[str, Any]:
        mark = {"type": "bar", "height": 10, "cornerRadius": 2}
        return {"mark": mark, "encoding": {"x": length(field), "y": y} | encoding}

    seen = {"description": {"field": "text"}}
    linked = seen | ({"href": {"field": "link"}} if any(row.link for row in rows) else {})
    layers = [
        bar("before", color={"value": "var(--track)"}, **seen),
        bar("value", color={"field": "color", "type": "nominal", "scale": None}, **linked),
        line("name", -15, "var(--ink)"),
        line("note", 15, "var(--soft)"),
    ]
    return _drawn({"width": width, "height": {"step": 58}, "data": {"values": values}, "layer": layers})


def spectrum(points: Sequence[tuple[float, float]], rank: int | None, break_even: float, width: int = NARROW) -> str:
    """Return a chart, as SVG, of the share of a loss that the directions beyond each rank hold.

    Args:
        points: pairs of a rank and a share.
        rank: the rank that was chosen, marked by a line.
        break_even: the rank at and above which factors are no smaller than the matrix, marked by a dashed line.
        width: the width in pixels.
    """
    values = [{"x": at, "y": share} for at, share in points if share > _LEAST_SHARE]
    full = points[-1][0]
    y_scale = {"type": "log", "domain": [min(*(value["y"] for value in values), 0.1), 1.0]}
    encoding = {
        "x": {
            "field": "x",
            "type": "quantitative",
            "scale": {"domain": [0, full], "nice": False},
            "axis": {"title": f"rank (dashed: break-even, {break_even:.0f})", "grid": False, "tickCount": 5, "format": "d"},
        },
        "y": {
            "field": "y",
            "type": "quantitative",
            "scale": y_scale,
            "axis": {"title": "share left out", "format": "~%"} | _ticks(y_scale),
        },
    }
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": values},
            "mark": {"type": "line", "color": "var(--accent)", "strokeWidth": 2},
            "encoding": encoding,
        }
    ]
    layers.append(_rank_rule(break_even, "", full, "var(--soft)"))
    if rank is not None:
        layers.append(_rank_rule(rank, f"rank {rank}", full, "var(--warn)"))
    return _drawn({"width": width, "height": 210, "layer": layers})


def _rank_rule(at: float, text: str, full: float, color: str) -> dict[str, Any]:
    """Return a vertical line, dashed where it has no text."""
    left = at < 0.6 * full
    rule = {"type": "rule", "color": color, "strokeWidth": 1.5, "strokeDash": [] if text else [4, 3]}
    label = {"type": "text", "align": "left" if left else "right", "dx": 5 if left else -5, "y": 12, "color": color}
    place = {"x": {"datum": at, "type": "quantitative"}}
    layers = [{"mark": rule, "encoding": place}, {"mark": label, "encoding": place | {"text": {"value": text}}}]
    return {"data": {"values": [{}]}, "layer": layers}


def _limit_layers(limit: float, edge: float) -> list[dict[str, Any]]:
    one = {"values": [{}]}
    place = {"y": {"datum": limit, "type": "quantitative"}}
    rule = {"type": "rule", "color": "var(--good)", "strokeDash": [5, 4], "strokeWidth": 1.5}
    label = {"type": "text", "align": "left", "dx": 4, "dy": -8, "x": 0, "color": "var(--good)"}
    return [
        {
            "data": one,
            "mark": {"type": "rect", "color": "var(--band)"},
            "encoding": place | {"y2": {"datum": edge, "type": "quantitative"}},
        },
        {"data": one, "mark": rule, "encoding": place},
        {"data": one, "mark": label, "encoding": place | {"text": {"value": f"limit {limit:,.4g}"}}},
    ]


def _points_layer(marks: Sequence[Mark], look: dict[str, Any], encoding: dict[str, Any]) -> dict[str, Any]:
    values = [{"x": m.x, "y": m.y, "text": m.text, "link": f"#{m.link}" if m.link else None} for m in marks]
    seen: dict[str, Any] = {"description": {"field": "text"}}
    linked = seen | ({"href": {"field": "link"}} if any(mark.link for mark in marks) else {})
    mark = {"type": "point", "opacity": 1} | look
    return {"data": {"values": values}, "mark": mark, "encoding": encoding | linked}


def _label_layer(mark: Mark, encoding: dict[str, Any], is_right: bool, down: int) -> dict[str, Any]:
    look = {"type": "text", "align": "right" if is_right else "left", "dy": down, "fontWeight": 600}
    look |= {"dx": 6 if is_right else -6}
    values = [{"x": mark.x, "y": mark.y}]
    return {"data": {"values": values}, "mark": look, "encoding": encoding | {"text": {"value": mark.label}}}


def _scale(values: Sequence[float], log_above: float) -> dict[str, Any]:
    """Return a scale with a margin, logarithmic where positive values span more than a factor of ``log_above``."""
    low, high = min(values), max(values)
    if low > 0.0 and high / low > log_above:
        factor = (high / low) ** 0.06
        return {"type": "log", "domain": [low / factor, high * factor], "nice": False}
    margin = 0.08 * (high - low) or abs(high) or 1.0
    return {"type": "linear", "domain": [low - margin, high + margin], "nice": False, "zero": False}


def _ticks(scale: dict[str, Any]) -> dict[str, Any]:
    """Return the ticks of an axis: at 1, 2 and 5 times powers of ten on a logarithmic scale, or only at powers of ten."""
    if scale["type"] == "linear":
        return {"tickCount": 5, "labelOverlap": True}
    low, high = scale["domain"]
    tens = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1, 2, 5), (1,)):
        values = [ten * factor for ten in tens for factor in factors if low <= ten * factor <= high]
        if len(values) <= _MOST_TICKS:
            break
    return {"values": values, "labelOverlap": True}


def _middle(values: Sequence[float]) -> float:
    scale = _scale(values, 8.0)
    low, high = scale["domain"]
    return (low * high) ** 0.5 if scale["type"] == "log" else (low + high) / 2


def _drawn(spec: dict[str, Any]) -> str:
    """Return the SVG of a specification, with texts for pointers and links into the page."""
    check_available()
    import vl_convert

    autosize = {"type": "fit-x", "contains": "padding"}
    whole = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "background": None, "padding": 2}
    svg = vl_convert.vegalite_to_svg(whole | {"autosize": autosize, "config": _STYLE} | spec)
    svg = re.sub(
        r' (?:role|aria-roledescription|pointer-events|class|font-family|version|xmlns(?::xlink)?)="[^"]*"', "", svg
    )
    svg = svg.replace(f'<a xlink:href="{_BASE}#', '<a tabindex="-1" href="#')
    # A label that is the child of a mark shows where a pointer rests; the attribute would not.
    svg = re.sub(r'<path aria-label="([^"]*)"([^>]*)/>', r"<path\2><title>\1</title></path>", svg)
    return re.sub(r'(?<=<g) aria-(?:label|hidden)="[^"]*"', "", svg)
