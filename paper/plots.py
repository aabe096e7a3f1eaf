"""Draw the pictures of the reproduction and of the results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paper.analysis import Salient, block_maxima, energy, salient_lines
from slimlstm.demo.plots import STYLE, Points, check_available, check_drawable, save_figure, subplots

_PICTURE = (200, 160)
"""Rows and columns of a heatmap: enough to see lines, few enough for a small file."""
_LINES = 0.02
"""Share of the rows and columns that a heatmap marks."""
_CYCLE = [
    {"color": color, "marker": marker, "linestyle": dash}
    for color, marker, dash in zip(
        ("#0b6e99", "#d9730d", "#2e7d32", "#8b1a62", "#6b6b6b", "#b8860b", "#000000"),
        "osD^vPX",
        ("-", "--", "-.", ":", "-", "--", "-."),
        strict=True,
    )
]
_PRECISIONS = ("float32", "bfloat16", "int8")


def quality_curves(
    panels: Mapping[str, Mapping[str, Points]], dense: float, path: Path, *, x_label: str, y_label: str
) -> None:
    """Draw quality against size, a panel per target and a line per method, and write a PNG or PDF.

    Args:
        panels: the title of every panel; for each, the names and points (x, y) of its lines.
        dense: the dense model's y, drawn as a dotted line.
        path: the file to write; its suffix decides the format.
        x_label, y_label: labels of the axes.

    Raises:
        SlimLSTMError: matplotlib is not installed.
    """
    figure, axes = subplots(len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        axis.axhline(dense, color="black", linestyle=(0, (1, 1)), linewidth=1, label="dense")
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=name, **STYLE.get(name, {"marker": "o"}))
        axis.set(title=title, xlabel=x_label)
        axis.grid(True, which="both", alpha=0.25)
    axes[0].set_ylabel(y_label)
    axes[-1].legend(frameon=False)
    save_figure(figure, path, dpi=150, bbox_inches="tight")


def norm_curves(panels: Mapping[str, Mapping[str, Points]], dense: Mapping[str, float], path: Path) -> None:
    """Draw a norm against rank, a panel for every title and a line for every method; write a PNG or PDF.

    Args:
        panels: by title, the points (rank, value) of every line by its name; two columns of panels.
        dense: by title, the dense matrix's value, drawn as a dotted line.
        path: its suffix sets the format.

    Raises:
        SlimLSTMError: see :func:`check_drawable`.
    """
    check_drawable(path)
    from matplotlib.figure import Figure

    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(7.6, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        axis.axhline(dense[title], color="black", linestyle=(0, (1, 1)), linewidth=1, label="dense")
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=name, **STYLE.get(name, {"marker": "o"}))
        axis.set_title(title, fontsize=10)
        # Markers at the top need room.
        axis.set_ylim(0.0, 1.08 * max(axis.dataLim.y1, dense[title]))
        axis.grid(True, alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("rank")
    axes[0][-1].legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=150)


def spectra(values: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Draw singular values, and the energy in the first r of them, against r; write a PNG or PDF.

    Args:
        values: by kind of matrix, such as hh and ih, the singular values of every layer, largest first.
        path: its suffix sets the format.

    Raises:
        SlimLSTMError: see :func:`check_drawable` and :func:`paper.analysis.energy`.
    """
    check_drawable(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    one, two = figure.subplots(1, 2, sharex=True)
    for index, (kind, layers) in enumerate(values.items()):
        for layer, spectrum in enumerate(layers):
            style: dict[str, Any] = {
                "color": ("#0b6e99", "#d9730d")[index % 2],
                "linestyle": ("-", "--", ":", "-.")[layer % 4],
            }
            style |= {"marker": "os"[index % 2], "markevery": 0.12, "markersize": 4, "linewidth": 1.3}
            ranks, held = range(1, len(spectrum) + 1), energy(torch.tensor(spectrum))
            one.plot(ranks, [value / spectrum[0] for value in spectrum], label=f"{kind}, layer {layer}", **style)
            two.plot(ranks, held.tolist(), **style)
    one.set(ylabel="singular value / largest", yscale="log", ylim=(1e-3, 1.2))
    two.set(ylabel="part of ‖W‖_F² held", ylim=(0.0, 1.02))
    for axis in (one, two):
        axis.set(xlabel="rank", xscale="log")
        axis.grid(True, alpha=0.25)
    one.legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=130)


def heatmaps(matrices: Mapping[str, Tensor], path: Path, *, groups: Sequence[str] = ("i", "f", "g", "o")) -> None:
    """Draw |W| of matrices of one shape [m, n] side by side, block by block, each with its own grey scale and colour bar.

    Marks at the right and below show the largest fiftieth of the rows and columns, see
    :func:`paper.analysis.salient_lines`; the titles give their fractions of Σ |w|.

    Args:
        matrices: by title.
        path: its suffix sets the format.
        groups: names of the equal groups of rows, such as gates.

    Raises:
        SlimLSTMError: see :func:`check_drawable`, :func:`paper.analysis.block_maxima` and ``salient_lines``.
    """
    check_drawable(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(matrices), 5.2), layout="constrained")
    axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        lines = salient_lines(matrix, _LINES)
        image = _heatmap(axis, matrix, lines, len(groups))
        bar = figure.colorbar(image, ax=axis, location="bottom", pad=0.03, extend="max", aspect=30)
        bar.set_label("|w|", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        held = f"{_LINES:.0%} of rows hold {lines.rows_hold:.1%},\n{_LINES:.0%} of columns {lines.columns_hold:.1%} of Σ|w|"
        axis.set_title(f"{title}\n{held}", fontsize=9)
        height = len(matrix) / len(groups)
        axis.set_yticks([(index + 0.5) * height for index in range(len(groups))], groups)
        axis.set_xticks([])
        axis.tick_params(length=0)
    save_figure(figure, path, dpi=100)


def _heatmap(axis: Any, matrix: Tensor, lines: Salient, groups: int) -> Any:
    m, n = matrix.shape
    picture = block_maxima(matrix, _PICTURE[0], _PICTURE[1], groups)
    # Outliers would leave everything else white.
    top = float(picture.flatten().quantile(0.995))
    image = axis.imshow(
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
    return image


def speed_ratios(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how many times faster slimlstm is than the best dense engine, and write a PNG or PDF.

    One sequence on one thread: a panel per number of steps and precision, a line per model.

    Args:
        rows: the results of ``benchmarks/engines.py``, at least one of them for one sequence on one thread.
        path: the file to write; its suffix decides the format.

    Raises:
        SlimLSTMError: matplotlib is not installed.
    """
    check_available()
    from matplotlib.figure import Figure

    single = [row for row in rows if (row["batch"], row["threads"]) == (1, 1)]
    steps = sorted({row["steps"] for row in single})
    figure = Figure(figsize=(8.0, 2.8 * len(steps) + 0.4), layout="constrained")
    axes: Any = figure.subplots(len(steps), len(_PRECISIONS), sharex=True, sharey=True, squeeze=False)
    for line, count in zip(axes, steps, strict=True):
        for axis, precision in zip(line, _PRECISIONS, strict=True):
            _ratio_panel(axis, [row for row in single if row["steps"] == count], precision)
            axis.set_title(f"{precision}, {count} step{'s' * (count != 1)}", fontsize=10)
        line[0].set_ylabel("times as fast as\nthe best dense engine")
    for axis in axes[-1]:
        axis.set_xlabel("H")
    axes[0][0].legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=150, bbox_inches="tight")


def _ratio_panel(axis: Any, rows: Sequence[Mapping[str, Any]], precision: str) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for one in row["candidates"].values():
            if one["ours"] and one["precision"] == precision and "dense" in one["faster"]:
                model = one["model"]
                name = model if model == "dense" else f"rank H/{round(row['hidden'] / int(model.split()[-1]))}"
                lines.setdefault(name, []).append((row["hidden"], one["faster"]["dense"]["ratio"]))
    for style, (name, points) in zip(_CYCLE, lines.items(), strict=False):
        axis.plot(*zip(*sorted(points), strict=True), markersize=5, label=name, **style)
    _ratio_axis(axis, {row["hidden"] for row in rows})


def _ratio_axis(axis: Any, sizes: Collection[int]) -> None:
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter, NullLocator

    axis.axhline(1.0, color="black", linewidth=1)
    axis.set(xscale="log", yscale="log")
    axis.yaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16, 32]))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%gx"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    # Labels of neighbouring sizes, such as 1024 and 1150, would overlap.
    shown = [size for size in sorted(sizes) if not any(size < other < 1.5 * size for other in sizes)]
    axis.set_xticks(shown, [str(size) for size in shown], fontsize=8)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(True, alpha=0.25)


def predictions(points: Mapping[str, Points], path: Path) -> None:
    """Draw measured against predicted rises of the loss: a mark per plan, a marker and colour per method.

    Args:
        points: pairs (predicted, measured) by method; pairs that are not positive are left out.
        path: the file to write; its suffix decides the format.

    Raises:
        SlimLSTMError: see :func:`check_drawable`.
    """
    check_drawable(path)
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator

    figure, (axis,) = subplots(1, width=5.6, height=4.0)
    for style, (method, pairs) in zip(_CYCLE, points.items(), strict=False):
        drawn = [(x, y) for x, y in pairs if x > 0 and y > 0]
        axis.plot(*zip(*drawn, strict=True), label=method, **style | {"linestyle": "none"})
    low, high = axis.get_xlim()
    axis.plot((low, high), (low, high), color="black", linewidth=1, linestyle="--", label="measured = predicted")
    axis.set_xscale("log")
    axis.yaxis.set_major_locator(LogLocator())
    axis.yaxis.set_major_formatter(LogFormatterSciNotation())
    axis.set_xlabel("predicted rise of the loss")
    axis.set_ylabel("measured rise, held-out text")
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=160)


def rises(panels: Mapping[str, Mapping[str, Points]], path: Path, *, x_label: str, y_label: str) -> None:
    """Draw rises of the loss against bytes, both logarithmic, a panel per model and a line per method or matrix.

    Args:
        panels: the title of every panel; for each, pairs (bytes, rise) by line; pairs that are not positive are left out.
        path: the file to write; its suffix decides the format.
        x_label, y_label: labels of the axes.

    Raises:
        SlimLSTMError: see :func:`check_drawable`.
    """
    check_drawable(path)
    from matplotlib.ticker import FormatStrFormatter, LogFormatterSciNotation, LogLocator, NullFormatter

    figure, axes = subplots(len(panels), width=4.4, height=3.8)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for style, (name, pairs) in zip(_CYCLE, lines.items(), strict=False):
            drawn = sorted((x, y) for x, y in pairs if x > 0 and y > 0)
            every = max(1, len(drawn) // 8)
            axis.plot(*zip(*drawn, strict=True), label=name, **style | {"markersize": 5, "markevery": every})
        axis.set(title=title, xlabel=x_label, xscale="log")
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_locator(LogLocator())
        axis.yaxis.set_major_formatter(LogFormatterSciNotation())
        axis.grid(True, which="major", alpha=0.25)
    axes[0].set_ylabel(y_label)
    axes[-1].legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=150)
