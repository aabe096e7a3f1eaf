"""Make the HTML of a page: text, tables, figures and sections. Every text is escaped unless it is :class:`Markup`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy of a page: a browser loads nothing that is not in the file."""


class Markup(str):
    """Text that is HTML already, and must not be escaped."""

    __slots__ = ()


def markup(text: str) -> Markup:
    """Return a text as HTML; :class:`Markup` stays as it is.

    Examples:
        >>> markup("a < b")
        'a &lt; b'
    """
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def element(tag: str, *content: str, **attributes: str) -> Markup:
    """Return an element; an attribute's underscores become hyphens, and ``class_`` becomes ``class``.

    Examples:
        >>> element("a", "R & D", href="#x")
        '<a href="#x">R &amp; D</a>'
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    given = "".join(f' {names[name]}="{html.escape(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{given}>{''.join(map(markup, content))}</{tag}>")


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1, ids: Sequence[str] = ()
) -> Markup:
    """Return a table whose first column names the rows; it scrolls by itself where the page is narrow.

    Args:
        caption: what the table shows.
        header: the columns' headings.
        rows: the cells, as many as headings.
        texts: how many of the first columns hold text; the others hold numbers and are aligned right.
        ids: ids of the rows, for links.
    """
    head = element("tr", *(element("th", name, scope="col", **_side(i, texts)) for i, name in enumerate(header)))
    body: list[Markup] = []
    for index, row in enumerate(rows):
        cells = [
            element("td", cell, **_side(column, texts)) if column else element("th", cell, scope="row")
            for column, cell in enumerate(row)
        ]
        body.append(element("tr", *cells, **({"id": ids[index]} if ids else {})))
    parts = element("caption", caption), element("thead", head), element("tbody", *body)
    whole = element("table", *parts)
    return element("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _side(column: int, texts: int) -> dict[str, str]:
    return {} if column < texts else {"class_": "number"}


def figure(caption: str, alternative: str, charts: Sequence[str], *below: str) -> Markup:
    """Return a figure with one chart, or with a wide and a narrow one, of which the page shows the one that fits.

    Args:
        caption: what the figure shows.
        alternative: a description of the charts in words.
        charts: SVG elements.
        below: further content below the charts, such as a legend.
    """
    names = ("wide", "narrow") if len(charts) == 2 else ("",)
    pictures = [
        Markup(chart.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alternative)}" class="{name}" ', 1))
        for name, chart in zip(names, charts, strict=True)
    ]
    return element("figure", element("figcaption", caption), *pictures, *below)


def details(summary: str, *content: str) -> Markup:
    """Return content that a click, a key, or a link to an id in it unfolds."""
    return element("details", element("summary", summary), *content)


def pairs(content: Mapping[str, str], **attributes: str) -> Markup:
    """Return a list of names and values."""
    groups = (element("div", element("dt", name), element("dd", value)) for name, value in content.items())
    return element("dl", *groups, **attributes)


def code(text: str) -> Markup:
    """Return lines of code, which scroll by themselves where the page is narrow."""
    return element("pre", element("code", text), tabindex="0")


def document(title: str, lead: Sequence[str], sections: Mapping[str, Sequence[str]], footer: str) -> str:
    """Return a whole page.

    Args:
        title: the page's title and heading.
        lead: content before the sections.
        sections: content by heading; headings become links at the top.
        footer: the last line.
    """
    ids = {heading: f"part-{index}" for index, heading in enumerate(sections, 1)}
    links = [element("li", element("a", heading, href=f"#{ids[heading]}")) for heading in sections]
    parts = [
        element("section", element("h2", heading, id=ids[heading]), *content, aria_labelledby=ids[heading])
        for heading, content in sections.items()
    ]
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("p", "slimlstm report", class_="eyebrow"), element("h1", title)),
        element("main", *lead, element("nav", element("ul", *links), aria_label="On this page"), *parts, id="content"),
        element("footer", element("p", footer)),
    )
    style = Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))
    head = [
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup('<link rel="icon" href="data:,">'),
        element("title", title),
        element("style", style),
    ]
    return f'<!doctype html>\n<html lang="en">{element("head", *head)}{body}</html>\n'
