"""Arrays to figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimlstm.errors import SlimLSTMError

Curve = Sequence[tuple[float, float]]

# SVD and Semi-NMF often lie on each other: one is a line, the other hollow marks on it.
_STYLE = {
    "svd": {"color": "#0b6e99", "marker": "o"},
    "semi-nmf": {"color": "#d9730d", "marker": "s", "linestyle": ":", "fillstyle": "none", "markersize": 9},
    "prune": {"color": "#6b6b6b", "marker": "^"},
}


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
    figure.savefig(path, dpi=150, bbox_inches="tight")


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
