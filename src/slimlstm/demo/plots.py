"""Draw the demo's curves, engine ratios and predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimlstm.errors import SlimLSTMError
from slimlstm.files import replacing

Points = Sequence[tuple[float, float]]
"""Pairs (x, y) of one line."""

# SVD and Semi-NMF often coincide: draw one as a line, the other as hollow marks on it.
STYLE = {
    "svd": {"color": "#0b6e99", "marker": "o"},
    "semi-nmf": {"color": "#d9730d", "marker": "s", "linestyle": ":", "fillstyle": "none", "markersize": 9},
    "fisher": {"color": "#2e7d32", "marker": "D"},
    "prune": {"color": "#6b6b6b", "marker": "^"},
}
_PRECISIONS = ("float32", "bfloat16", "int8")


def quality_curves(
    panels: Mapping[str, Mapping[str, Points]], dense: float, path: Path, *, x_label: str, y_label: str
) -> None:
    """Draw quality against size, a panel per target and a line per method, and write a PNG or PDF.

    Args:
        panels: the title of every panel; for each, the names and points (x, y) of its lines.
        dense: the dense model's y, drawn as a dashed line.
        path: the file to write; its suffix decides the format.
        x_label, y_label: labels of the axes.

    Raises:
        SlimLSTMError: matplotlib is not installed.
    """
    figure, axes = subplots(len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        axis.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=name, **STYLE.get(name, {"marker": "o"}))
        axis.set(title=title, xlabel=x_label)
        axis.grid(True, which="both", alpha=0.25)
    axes[0].set_ylabel(y_label)
    axes[-1].legend(frameon=False)
    save_figure(figure, path, dpi=150, bbox_inches="tight")


def speed_ratios(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how many times faster slimlstm is than the best dense engine, and write a PNG or PDF.

    The upper panels show one sequence on one thread: a panel per number of steps and precision, a line per model. Hollow
    marks compare with the same low-rank model in the best other engine. The lowest panel has all settings, a dot per model.

    Args:
        rows: the results of ``benchmarks/engines.py``, at least one of them for one sequence on one thread.
        path: the file to write; its suffix decides the format.

    Raises:
        SlimLSTMError: matplotlib is not installed.
    """
    check_available()
    from matplotlib.figure import Figure

    steps = sorted({row["steps"] for row in rows})
    figure = Figure(figsize=(11, 3.0 * len(steps) + 2.6), layout="constrained")
    grid = figure.add_gridspec(len(steps) + 1, len(_PRECISIONS))
    first: Any = None
    for line, count in enumerate(steps):
        for column, precision in enumerate(_PRECISIONS):
            axis: Any = figure.add_subplot(grid[line, column], sharex=first, sharey=first)
            first = first or axis
            _ratio_panel(
                axis, [row for row in rows if (row["steps"], row["batch"], row["threads"]) == (count, 1, 1)], precision
            )
            axis.set_title(f"{precision}, T = {count}, B = 1, one thread", fontsize=10)
    first.set_ylabel("best rival's time / ours")
    first.legend(frameon=False, fontsize=8)
    _ratio_strip(figure.add_subplot(grid[len(steps), :]), rows)
    save_figure(figure, path, dpi=150, bbox_inches="tight")


def _ratio_panel(axis: Any, rows: Sequence[Mapping[str, Any]], precision: str) -> None:
    points: dict[str, dict[str, list[tuple[int, float]]]] = {"dense": {}, "same model": {}}
    for row in rows:
        for one in row["candidates"].values():
            if one["ours"] and one["precision"] == precision:
                model = one["model"]
                share = model if model == "dense" else f"rank H/{round(row['hidden'] / int(model.split()[-1]))}"
                for what, entry in one["faster"].items():
                    points[what].setdefault(share, []).append((row["hidden"], entry["ratio"]))
    for index, (share, line) in enumerate(points["dense"].items()):
        axis.plot(*zip(*sorted(line), strict=True), marker="o", color=f"C{index}", label=share)
        if share in points["same model"]:
            same = zip(*sorted(points["same model"][share]), strict=True)
            axis.plot(*same, marker="o", color=f"C{index}", fillstyle="none", linestyle=":", label=f"{share}, same model")
    _ratio_axis(axis)
    axis.set_xscale("log", base=2)
    hidden = sorted({row["hidden"] for row in rows})
    axis.set_xticks(hidden, [str(size) for size in hidden], fontsize=7, rotation=60)
    axis.set_xlabel("H")


def _ratio_strip(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    groups = sorted({(row["threads"], row["batch"]) for row in rows})
    for place, group in enumerate(groups):
        for column, precision in enumerate(_PRECISIONS):
            ratios = [
                one["faster"]["dense"]["ratio"]
                for row in rows
                if (row["threads"], row["batch"]) == group
                for one in row["candidates"].values()
                if one["ours"] and one["precision"] == precision and "dense" in one["faster"]
            ]
            spread = [
                place + 0.25 * (column - 1) + 0.16 * (index / max(len(ratios), 1) - 0.5) for index in range(len(ratios))
            ]
            axis.plot(spread, ratios, ".", markersize=3, color=f"C{column}", label=precision if place == 0 else None)
    _ratio_axis(axis)
    axis.set_xticks(range(len(groups)), [f"B = {batch}, {threads} thread(s)" for threads, batch in groups], fontsize=8)
    axis.set_title("all settings and models against the best dense rival", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _ratio_axis(axis: Any) -> None:
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter

    axis.axhline(1.0, color="black", linewidth=1)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16, 32]))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%gx"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, alpha=0.25)


def predictions(points: Mapping[str, Points], path: Path) -> None:
    """Draw measured against predicted rises of the loss: a mark per plan, a colour per method.

    Args:
        points: pairs (predicted, measured) by method; pairs that are not positive are left out.
        path: the file to write; its suffix decides the format.

    Raises:
        SlimLSTMError: see :func:`check_drawable`.
    """
    check_drawable(path)
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator

    figure, (axis,) = subplots(1)
    for method, pairs in points.items():
        x, y = zip(*((x, y) for x, y in pairs if x > 0 and y > 0), strict=True)
        axis.plot(x, y, "o", label=method, markersize=4)
    low, high = axis.get_xlim()
    axis.plot((low, high), (low, high), color="black", linewidth=1, linestyle="--")
    axis.set_xscale("log")
    axis.yaxis.set_major_locator(LogLocator())
    axis.yaxis.set_major_formatter(LogFormatterSciNotation())
    axis.set_xlabel("predicted rise of the loss")
    axis.set_ylabel("measured rise, held-out text")
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=160)


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure without a creation time, so that equal pictures are equal files."""
    with replacing(path) as draft:
        figure.savefig(draft, metadata={"CreationDate": None} if path.suffix == ".pdf" else None, **options)


def check_available() -> None:
    """Raise :class:`SlimLSTMError` if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise SlimLSTMError("matplotlib, which draws, is not installed: pip install 'slimlstm[plots]'")


def check_drawable(path: Path) -> None:
    """Check that a picture can be written to ``path``, before spending time on its content.

    Raises:
        SlimLSTMError: matplotlib is not installed or does not know the suffix, or the folder does not exist.
    """
    endings = subplots(1)[0].canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings:
        raise SlimLSTMError(f"{path} has the suffix {path.suffix!r}; a picture can have {', '.join(endings)}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise SlimLSTMError(f"{path} cannot be written; name a file in a folder that exists")


def subplots(count: int) -> tuple[Any, list[Any]]:
    """Return a figure and ``count`` panels side by side, with a logarithmic y axis."""
    check_available()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(3.6 * count, 3.4), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
    return figure, list(axes)
