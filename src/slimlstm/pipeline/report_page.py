"""A report as a page: one file for a browser, with a table behind every picture."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimlstm.errors import SlimLSTMError
from slimlstm.page.charts import NARROW, WIDE, Bar, Mark, bars, check_available, scatter, spectrum
from slimlstm.page.document import Markup, code, details, document, element, figure, pairs, table
from slimlstm.pipeline.trials import Trials, Tried
from slimlstm.provenance import provenance

if TYPE_CHECKING:
    from slimlstm.pipeline.report import Report, SiteReport

USAGE = """import slimlstm as sl

sl.save(model, "small")              # after compress_: weights and config
model = sl.load("small", MyModel())  # anywhere: into a fresh, dense model
"""
"""Code that saves and loads a live module."""
_LEGEND = {
    "dense": ("as it was", '<rect x="1.5" y="1.5" width="9" height="9" fill="var(--ink)"/>'),
    "best": ("chosen", '<path d="M6,0L12,6L6,12L0,6Z" fill="var(--warn)"/>'),
    "within": ("within the limit", '<circle cx="6" cy="6" r="4.5" fill="var(--accent)"/>'),
    "beyond": ("beyond the limit", '<circle cx="6" cy="6" r="4" fill="none" stroke="var(--soft)" stroke-width="1.5"/>'),
}


def report_page(
    report: Report,
    title: str,
    trials: Trials | None,
    latencies: Mapping[str, float] | None,
    usage: str,
    files: Mapping[str, str],
) -> str:
    """Return the HTML of a report's page; see :meth:`slimlstm.Report.to_html` for the arguments.

    Raises:
        SlimLSTMError: the package that draws is not installed.
    """
    check_available()
    sections: dict[str, Sequence[str]] = {}
    if trials is not None:
        sections["What was tried"] = _tried(trials)
    sections["The matrices"] = _matrices(report)
    if report.loss_note:
        sections["The loss, predicted and measured"] = _loss(report)
    if latencies:
        sections["Speed beside other engines"] = _speed(latencies)
    sections["Load it"] = [code(usage), *_plan(report)]
    sections["Where it comes from"] = _origin(report, files)
    footer = f"Made by slimlstm {provenance()['slimlstm']}. This page needs no network and no script."
    return document(title, _lead(report, trials), sections, footer)


def sites_table(report: Report) -> Markup:
    """Return the table of all sites, without links."""
    return table("Every matrix that was selected", _HEADER, [_row(site) for site in report.sites], texts=2)


def size_in_words(count: int) -> str:
    """Return a number of bytes with an SI prefix.

    Examples:
        >>> size_in_words(2_620_000), size_in_words(64)
        ('2.62 MB', '64 B')
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 0.9995 * 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count} B"


def time_in_words(seconds: float) -> str:
    """Return a time with an SI prefix.

    Examples:
        >>> time_in_words(0.00125)
        '1.25 ms'
    """
    for power, unit in ((0, "s"), (-3, "ms")):
        if seconds >= 0.9995 * 10**power:
            return f"{seconds / 10**power:,.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _lead(report: Report, trials: Trials | None) -> list[str]:
    model, lstm = report.model, report.lstm
    changed = sum(bool(site.source_sha256) for site in report.sites)
    sentence = (
        f"The model takes {size_in_words(model.bytes_after)} instead of {size_in_words(model.bytes_before)}; "
        f"{changed} of {len(report.sites)} selected matrices changed."
    )
    key = {
        "Model": _key(size_in_words(model.bytes_after), f"{_share(model.bytes_after, model.bytes_before)} of the bytes"),
        "LSTMs": _key(size_in_words(lstm.bytes_after), f"{_share(lstm.bytes_after, lstm.bytes_before)} of the bytes"),
    }
    whole = report.model_since_dense
    if whole is not None:
        before = size_in_words(whole.bytes_before)
        key["Since dense"] = _key(_share(whole.bytes_after, whole.bytes_before), f"of {before}, all steps together")
    if trials is not None and trials.best is not None:
        key[_capital(trials.metric_name)] = _key(f"{trials.best.metric:,.4g}", f"{trials.dense.metric:,.4g} as it was")
        if trials.best.latency and trials.dense.latency:
            faster = trials.dense.latency / trials.best.latency
            key["Speed"] = _key(f"{faster:.2f}x", f"{time_in_words(trials.best.latency)} instead of "
                                f"{time_in_words(trials.dense.latency)}")  # fmt: skip
    elif report.measured_rise is not None and report.loss_before is not None:
        key["Loss"] = _key(f"{report.measured_rise:+.4f}", f"from {report.loss_before:.4f} on the calibration batches")
    lead: list[str] = [element("p", sentence, class_="lead"), pairs(key, class_="key")]
    if trials is not None and trials.best is None and trials.limit:
        words = f"Nothing smaller that was tried is within the limit: {trials.limit}."
        lead.insert(1, element("p", words, class_="warning"))
    return lead


def _key(value: str, beside: str) -> Markup:
    return element("span", element("strong", value), element("span", beside, class_="soft"))


def _tried(trials: Trials) -> list[str]:
    every = [trials.dense, *(one for one in trials.trials if one is not trials.dense)]
    parts: list[str] = [element("p", f"Limit: {trials.limit}.")] if trials.limit else []
    parts.append(_frontier(trials, every, is_time=False))
    if sum(one.latency is not None and math.isfinite(one.metric) for one in every) > 1:
        parts.append(_frontier(trials, every, is_time=True))
    header = ["plan", "", trials.metric_name, "bytes", "left", "latency"]
    rows = [
        [
            one.label,
            _LEGEND[_kind(one, trials)][0] if trials.limit or one is trials.dense else "",
            f"{one.metric:,.5g}",
            f"{one.bytes:,}",
            _share(one.bytes, trials.dense.bytes),
            "" if one.latency is None else time_in_words(one.latency),
        ]
        for one in every
    ]
    ids = [f"tried-{index}" for index in range(len(every))]
    return [*parts, table("Every plan that was tried", header, rows, texts=2, ids=ids)]


def _frontier(trials: Trials, every: Sequence[Tried], *, is_time: bool) -> Markup:
    name, lower = trials.metric_name, not trials.higher_is_better
    marks = [
        Mark(
            (one.latency or 0.0) if is_time else one.bytes,
            one.metric,
            _kind(one, trials),
            f"{one.label}: {name} {one.metric:,.5g}, {size_in_words(one.bytes)}"
            + ("" if one.latency is None else f", {time_in_words(one.latency)}"),
            f"tried-{index}",
            one.label if one is trials.best else "",
        )
        for index, one in enumerate(every)
        if math.isfinite(one.metric) and (one.latency is not None or not is_time)
    ]
    what, unit = ("time for one call", "s") if is_time else ("bytes", "B")
    better = "Lower and further left is better." if lower else "Higher and further left is better."
    dense = "".join(f"as it was: {mark.text}." for mark in marks if mark.kind == "dense")
    best = "".join(f" Chosen: {mark.text}." for mark in marks if mark.kind == "best")
    caption = f"{_capital(name)} against the {what}. {better} The line joins the plans that no other betters in both."
    charts = [scatter(marks, what, name, width, limit=trials.worst, lower=lower, x_format=unit) for width in (WIDE, NARROW)]
    seen = dict.fromkeys(mark.kind for mark in marks)
    words = _LEGEND
    if not trials.limit:
        words = words | {"within": ("tried", _LEGEND["within"][1]), "best": ("this report", _LEGEND["best"][1])}
    legend = [
        element("li", Markup(f'<svg width="12" height="12" aria-hidden="true">{words[kind][1]}</svg>'), words[kind][0])
        for kind in words
        if kind in seen
    ]
    alternative = f"{len(every)} plans as points; {dense}{best} The table below has every number."
    return figure(caption, alternative, charts, element("ul", *legend, class_="legend"))


def _kind(one: Tried, trials: Trials) -> str:
    if one is trials.dense:
        return "dense"
    if one is trials.best:
        return "best"
    return "within" if one.accepted else "beyond"


_HEADER = ["matrix", "became", "shape", "rank", "break-even", "bytes before", "bytes after", "error", "predicted rise"]


def _matrices(report: Report) -> list[str]:
    sites = report.sites
    ids = [f"matrix-{index}" for index in range(1, len(sites) + 1)]
    sizes = [
        Bar(site.key, f"{size_in_words(site.bytes_before)} to {_became(site)}", site.bytes_after, site.bytes_before, link)
        for site, link in zip(sites, ids, strict=True)
    ]
    has_predictions = any(site.predicted_rise is not None for site in sites)
    costs = [
        Bar(site.key, _cost(site), (site.predicted_rise or 0.0) if has_predictions else site.relative_error, 0.0, link)
        for site, link in zip(sites, ids, strict=True)
    ]
    cost = "predicted rise of the loss" if has_predictions else "relative error ‖W - W'‖ / ‖W‖"
    largest = max(sites, key=lambda site: site.bytes_before)
    before, after = (sum(getattr(site, name) for site in sites) for name in ("bytes_before", "bytes_after"))
    words = f"{len(sites)} matrices, {size_in_words(before)} before and {size_in_words(after)} after; the largest is"
    seen = f"{words} {largest.key}. The table below has every number."
    pictures = element(
        "div",
        figure("Size: the pale bar is the matrix before, the dark bar after.", seen, [bars(sizes)]),
        figure(f"Cost: the {cost} of each matrix alone.", f"The {cost} as bars; see the table below.", [bars(costs)]),
        class_="columns",
    )
    rows = [[element("a", row[0], href=f"#{link}"), *row[1:]] for row, link in zip(map(_row, sites), ids, strict=True)]
    whole = table("Every matrix that was selected", _HEADER, rows, texts=2)
    notes = [element("ul", *(element("li", note) for note in report.notes))] if report.notes else []
    each = [_one(site, link) for site, link in zip(sites, ids, strict=True)]
    return [pictures, whole, *notes, element("p", "Each matrix, with its spectrum:", class_="soft"), *each]


def _one(site: SiteReport, link: str) -> Markup:
    """Return the part of the page that unfolds for one matrix: its spectrum and its other facts."""
    parts: list[str] = []
    if any(share > 0.0 for _, share in site.spectrum):
        rank = site.rank if site.method != "dense" else None
        left = next((share for at, share in site.spectrum if at == rank), None)
        chosen = "" if left is None else f" Rank {rank} leaves out {left:.2%}."
        caption = f"Share of the loss of {site.method} that the directions beyond a rank hold.{chosen}"
        parts.append(figure(caption, caption, [spectrum(site.spectrum, rank, site.break_even_rank)]))
        parts.append(details("The spectrum in numbers", _shares(site)))
    else:
        parts.append(element("p", "No spectrum: the method does not rank the directions of the matrix.", class_="soft"))
    facts = {"note": site.note, "SHA-256 of the matrix before": site.source_sha256}
    if site.iterations:
        facts["iterations"] = f"{site.iterations}, {'converged' if site.converged else 'stopped at the limit'}"
    facts = {name: value for name, value in facts.items() if value}
    summary = Markup(element("span", site.key) + element("span", _became(site), class_="soft"))
    # Browsers open what a link leads into, so the id is inside.
    return details(summary, element("div", *parts, *([pairs(facts, class_="facts")] if facts else []), id=link))


def _shares(site: SiteReport) -> Markup:
    shown = [*site.spectrum[:: len(site.spectrum) // 8 or 1], site.spectrum[-1]]
    shown += [(at, share) for at, share in site.spectrum if at == site.rank]
    rows = [[str(at), f"{share:.2%}"] for at, share in sorted(set(shown))]
    return table(f"Spectrum of {site.key}", ["rank", "share left out"], rows)


def _row(site: SiteReport) -> list[str]:
    return [
        site.key,
        " ".join(filter(None, (site.method, site.storage))),
        f"{site.shape[0]} x {site.shape[1]}",
        "" if site.rank is None else str(site.rank),
        f"{site.break_even_rank:.0f}",
        f"{site.bytes_before:,}",
        f"{site.bytes_after:,}",
        f"{site.relative_error:.4f}",
        "" if site.predicted_rise is None else f"{site.predicted_rise:+.2g}",
    ]


def _became(site: SiteReport) -> str:
    method = "" if site.method == "dense" and site.storage else "as it was" if site.method == "dense" else site.method
    rank = "" if site.rank is None else f"rank {site.rank}"
    return f"{size_in_words(site.bytes_after)} · {', '.join(filter(None, (method, rank, site.storage)))}"


def _cost(site: SiteReport) -> str:
    rise = "" if site.predicted_rise is None else f", predicted {site.predicted_rise:+.2g}"
    return f"error {site.relative_error:.2%}{rise}"


def _loss(report: Report) -> list[str]:
    """Return the note about the loss, and a chart of the predicted and the measured rise where both are known."""
    note = element("p", f"{_capital(report.loss_note)}.")
    predicted, measured = report.predicted_rise, report.measured_rise
    if predicted is None or measured is None:
        return [note]
    rises = {"predicted": predicted, "measured": measured}
    rows = [Bar(name, f"{rise:+.4f}", rise, is_strong=name == "measured") for name, rise in rises.items()]
    caption = "Rise of the mean loss on the calibration batches"
    words = ", ".join(f"{name} {rise:+.4f}" for name, rise in rises.items())
    cells = [[name, f"{rise:+.6f}"] for name, rise in rises.items()]
    return [figure(f"{caption}.", words, [bars(rows)]), note, table(caption, ["", "rise"], cells)]


def _speed(latencies: Mapping[str, float]) -> list[str]:
    fastest = min(latencies, key=latencies.__getitem__)
    rows = [
        Bar(name, f"{time_in_words(seconds)}, {seconds / latencies[fastest]:.2f}x the fastest", seconds,
            is_strong=name.startswith("slimlstm"))
        for name, seconds in latencies.items()
    ]  # fmt: skip
    caption = "Median time, measured by turns in one run. Shorter is better."
    cells = [[name, f"{1e6 * s:,.1f}", f"{s / latencies[fastest]:.2f}x"] for name, s in latencies.items()]
    chart = figure(caption, f"The fastest is {fastest}, {time_in_words(latencies[fastest])}.", [bars(rows)])
    return [chart, table("Median time of each engine", ["engine", "µs", "of the fastest"], cells)]


def _plan(report: Report) -> list[str]:
    text = json.dumps(report.plan.to_dict(), indent=1)
    again = f"plan = sl.Plan.from_dict({text})\nsl.compress_(model, plan)\n"
    return [details("The plan, to repeat or to edit", code(again))]


def _origin(report: Report, files: Mapping[str, str]) -> list[str]:
    plan = hashlib.sha256(json.dumps(report.plan.to_dict(), sort_keys=True).encode()).hexdigest()
    facts = {name: str(value) for name, value in provenance().items() if value is not None}
    return [pairs({**files, **facts, "SHA-256 of the plan": plan}, class_="facts")]


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def digest_of(file: Path) -> str:
    """Return the size and SHA-256 of a file, or of every weights file of a folder, in words.

    Raises:
        SlimLSTMError: the file does not exist.
    """
    inner = sorted(file.glob("*.safetensors")) if file.is_dir() else [file]
    if not inner or not all(one.is_file() for one in inner):
        raise SlimLSTMError(f"{file} is no file whose hash a report could give; name one that exists")
    return "; ".join(f"{one.stat().st_size:,} bytes, SHA-256 {_sha256(one)}" for one in inner)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
