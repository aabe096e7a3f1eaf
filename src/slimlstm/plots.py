"""Arrays to figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlstm.analysis import Salient, block_maxima, energy, salient_lines
from slimlstm.errors import SlimLSTMError

Curve = Sequence[tuple[float, float]]

# SVD and Semi-NMF often lie on each other: one is a line, the other hollow marks on it.
_STYLE = {
    "svd": {"color": "#0b6e99", "marker": "o"},
    "semi-nmf": {"color": "#d9730d", "marker": "s", "linestyle": ":", "fillstyle": "none", "markersize": 9},
    "fisher": {"color": "#2e7d32", "marker": "D"},
    "prune": {"color": "#6b6b6b", "marker": "^"},
}
_PICTURE, _LINES = (200, 160), 0.02
"""Rows and columns of a heatmap, enough to see lines and few enough for a small file; what share of the lines is marked."""
_PRECISIONS = ("float32", "bfloat16", "int8")


def quality_curves(
    panels: Mapping[str, Mapping[str, Curve]], dense: float, path: Path, *, x_label: str, y_label: str
) -> None:
    """Draws quality against size, a panel for every target and a line for every method, and writes a PNG or PDF.

    Args:
        panels: the title of every panel, and in it the name and the points (x, y) of every line.
        dense: the dense model's y, drawn as a dashed line.
        path: where to; the ending says which format.

    Raises:
        SlimLSTMError: matplotlib is not installed.
    """
    figure, axes = _subplots(len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        axis.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=name, **_STYLE.get(name, {"marker": "o"}))
        axis.set(title=title, xlabel=x_label)
        axis.grid(True, which="both", alpha=0.25)
    axes[0].set_ylabel(y_label)
    axes[-1].legend(frameon=False)
    _save(figure, path, dpi=150, bbox_inches="tight")


def speed_ratios(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws how many times faster each of our candidates is than its best dense rival, and writes a PNG or PDF.

    Above, one sequence on one thread: a panel for every number of steps and precision, a line for every model, and hollow
    marks where the same low-rank model runs in the best other engine. Below, all other settings, a dot for every candidate.

    Args:
        rows: what ``benchmarks/engines.py`` measured, at least one of them with one sequence on one thread.
        path: where to; the ending says which format.

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
    _save(figure, path, dpi=150, bbox_inches="tight")


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


def predictions(points: Mapping[str, Curve], path: Path) -> None:
    """Draws measured against predicted rises of the loss, a mark for every plan and a colour for every method.

    Args:
        points: by method, (predicted, measured) of every plan; those that are not positive are left out.

    Raises:
        SlimLSTMError: as :func:`check_drawable`.
    """
    check_drawable(path)
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator

    figure, (axis,) = _subplots(1)
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
    _save(figure, path, dpi=160)


def _save(figure: Any, path: Path, **options: Any) -> None:
    """Without the time in it, so that the same picture is the same file."""
    figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None, **options)


def check_available() -> None:
    """Raises :class:`SlimLSTMError` where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise SlimLSTMError("drawing takes matplotlib: pip install 'slimlstm[plots]'")


def check_drawable(path: Path) -> None:
    """Raises what :func:`quality_curves` would, before there is anything to draw.

    Raises:
        SlimLSTMError: matplotlib is not installed, or does not know the ending; there is no such folder.
    """
    endings = _subplots(1)[0].canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings:
        raise SlimLSTMError(f"{path} ends in {path.suffix or 'nothing'}; a picture can be drawn as {', '.join(endings)}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise SlimLSTMError(f"{path} cannot be written: name a file in a folder that is there")


def _subplots(count: int) -> tuple[Any, list[Any]]:
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


def norm_curves(panels: Mapping[str, Mapping[str, Curve]], dense: Mapping[str, float], path: Path) -> None:
    """Draws a number of a matrix against rank, a panel for every title and a line for every method; writes a PNG or PDF.

    Args:
        panels: the title of every panel, and in it the name and the points (rank, value) of every line; two columns.
        dense: by title, the dense matrix's value, drawn as a dashed line.
        path: where to; the ending says which format.

    Raises:
        SlimLSTMError: as :func:`check_drawable`.
    """
    check_drawable(path)
    from matplotlib.figure import Figure

    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(7.6, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        axis.axhline(dense[title], color="black", linestyle="--", linewidth=1, label="dense")
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=name, **_STYLE.get(name, {"marker": "o"}))
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0.0)
        axis.grid(True, alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("rank")
    axes[0][-1].legend(frameon=False, fontsize=8)
    _save(figure, path, dpi=150)


def spectra(values: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Draws singular values and the energy that the first r of them hold, against r; writes a PNG or PDF.

    Args:
        values: by kind of matrix, such as hh and ih, the singular values of every layer's, largest first.
        path: where to; the ending says which format.

    Raises:
        SlimLSTMError: as :func:`check_drawable` and :func:`slimlstm.analysis.energy`.
    """
    check_drawable(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    one, two = figure.subplots(1, 2, sharex=True)
    for index, (kind, layers) in enumerate(values.items()):
        for layer, spectrum in enumerate(layers):
            style: dict[str, Any] = {"color": f"C{index}", "linestyle": ("-", "--", ":", "-.")[layer % 4], "linewidth": 1.3}
            ranks, held = range(1, len(spectrum) + 1), energy(torch.tensor(spectrum))
            one.plot(ranks, [value / spectrum[0] for value in spectrum], label=f"{kind}, layer {layer}", **style)
            two.plot(ranks, held.tolist(), **style)
    one.set(ylabel="singular value / largest", yscale="log", ylim=(1e-3, 1.2))
    two.set(ylabel="part of ‖W‖_F² held", ylim=(0.0, 1.02))
    for axis in (one, two):
        axis.set(xlabel="rank", xscale="log")
        axis.grid(True, alpha=0.25)
    one.legend(frameon=False, fontsize=8)
    _save(figure, path, dpi=130)


def heatmaps(matrices: Mapping[str, Tensor], path: Path, *, groups: Sequence[str] = ("i", "f", "g", "o")) -> None:
    """Draws |W| of matrices of one shape [m, n] side by side, block by block, each in shades of its own.

    The largest fiftieth of the rows and columns is marked at the right and below, see
    :func:`slimlstm.analysis.salient_lines`, and the titles say how much of Σ |w| they hold.

    Args:
        matrices: by title; their rows are those of the ``groups``, one after the other.
        path: where to; the ending says which format, PNG or PDF among others.

    Raises:
        SlimLSTMError: as :func:`check_drawable`, :func:`slimlstm.analysis.block_maxima` and ``salient_lines``.
    """
    check_drawable(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(matrices), 4.6), layout="constrained")
    axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        lines = salient_lines(matrix, _LINES)
        _heatmap(axis, matrix, lines, len(groups))
        held = f"{_LINES:.0%} of rows hold {lines.rows_hold:.1%},\n{_LINES:.0%} of columns {lines.columns_hold:.1%} of Σ|w|"
        axis.set_title(f"{title}\n{held}", fontsize=9)
        height = len(matrix) / len(groups)
        axis.set_yticks([(index + 0.5) * height for index in range(len(groups))], groups)
        axis.set_xticks([])
        axis.tick_params(length=0)
    _save(figure, path, dpi=100)


def _heatmap(axis: Any, matrix: Tensor, lines: Salient, groups: int) -> None:
    m, n = matrix.shape
    picture = block_maxima(matrix, _PICTURE[0], _PICTURE[1], groups)
    # A few outliers would leave all else in the dark.
    top = float(picture.flatten().quantile(0.995))
    axis.imshow(
        picture.numpy(),
        cmap="gray_r",
        vmin=0.0,
        vmax=top or None,
        extent=(0, n, m, 0),
        aspect="auto",
        interpolation="nearest",
    )
    for index in range(1, groups):
        axis.axhline(index * m / groups, color="#d9730d", linewidth=0.8)
    mark: dict[str, Any] = {"color": "#0b6e99", "clip_on": False, "linestyle": "none", "markersize": 5}
    axis.plot([1.015 * n] * len(lines.rows), [row + 0.5 for row in lines.rows], marker=0, **mark)
    axis.plot([column + 0.5 for column in lines.columns], [1.01 * m] * len(lines.columns), marker=3, **mark)
    axis.set(xlim=(0, n), ylim=(m, 0))
