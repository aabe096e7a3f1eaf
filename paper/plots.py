"""Draw norms, spectra and heatmaps of recurrent matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paper.analysis import Salient, block_maxima, energy, salient_lines
from slimlstm.demo.plots import STYLE, Points, check_drawable, save_figure

_PICTURE = (200, 160)
"""Rows and columns of a heatmap: enough to see lines, few enough for a small file."""
_LINES = 0.02
"""Share of the rows and columns that a heatmap marks."""


def norm_curves(panels: Mapping[str, Mapping[str, Points]], dense: Mapping[str, float], path: Path) -> None:
    """Draw a norm against rank, a panel for every title and a line for every method; write a PNG or PDF.

    Args:
        panels: by title, the points (rank, value) of every line by its name; two columns of panels.
        dense: by title, the dense matrix's value, drawn as a dashed line.
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
