"""Draw the demo's curves, engine ratios and predictions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimlstm.errors import SlimLSTMError
from slimlstm.files import replacing

Points = Sequence[tuple[float, float]]
"""Pairs (x, y) of one line."""

# Lines differ by colour, marker and dash. SVD and Semi-NMF often coincide: one is a line, the other hollow marks on it.
STYLE: dict[str, dict[str, Any]] = {
    "svd": {"color": "#0b6e99", "marker": "o"},
    "semi-nmf": {"color": "#d9730d", "marker": "s", "linestyle": ":", "fillstyle": "none", "markersize": 9},
    "fisher": {"color": "#2e7d32", "marker": "D", "linestyle": "-."},
    "prune": {"color": "#6b6b6b", "marker": "^", "linestyle": "--"},
    "svd int8": {"color": "#0b6e99", "marker": "v", "linestyle": ":", "fillstyle": "none"},
    "fisher int8": {"color": "#d9730d", "marker": "P", "linestyle": "--"},
    "fisher auto": {"color": "#000000", "marker": "X", "linestyle": "-"},
    "int8": {"color": "#8b1a62", "marker": "*", "linestyle": "none", "markersize": 14},
}
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
        dense: the dense model's y, drawn as a dashed line.
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


def loss_against_bytes(curves: Mapping[str, Points], dense: tuple[float, float], path: Path) -> None:
    """Draw the loss against the bytes of the LSTMs, a line per method on one axis, and write a PNG or PDF.

    Args:
        curves: pairs (bytes, loss in nats) by method.
        dense: the dense model's pair, drawn as a cross.
        path: the file to write; its suffix decides the format.

    Raises:
        SlimLSTMError: matplotlib is not installed.
    """
    figure, (axis,) = subplots(1, width=7.0, height=4.0, log_y=False)
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter

    axis.plot(dense[0] / 1e6, dense[1], "x", color="black", markersize=9, markeredgewidth=2, label="dense")
    for name, points in curves.items():
        axis.plot([size / 1e6 for size, _ in points], [loss for _, loss in points], label=name, **STYLE[name])
    axis.axhline(dense[1], color="black", linestyle=(0, (1, 1)), linewidth=1)
    axis.set(xscale="log", xlabel="bytes of the LSTMs (MB)", ylabel="loss on held-out text (nats per token)")
    axis.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20]))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, alpha=0.25)
    axis.legend(frameon=False)
    save_figure(figure, path, dpi=150)


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


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure without a creation time, so that equal pictures are equal files."""
    with replacing(path) as draft:
        figure.savefig(draft, metadata={"CreationDate": None} if path.suffix == ".pdf" else None, **options)


def is_available() -> bool:
    """Return whether matplotlib is installed."""
    try:
        return find_spec("matplotlib") is not None
    except ValueError:  # a module without a specification
        return False


def check_available() -> None:
    """Raise :class:`SlimLSTMError` if matplotlib is not installed."""
    if not is_available():
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


def subplots(count: int, *, width: float = 3.6, height: float = 3.4, log_y: bool = True) -> tuple[Any, list[Any]]:
    """Return a figure and ``count`` panels side by side, by default with a logarithmic y axis; sizes are in inches."""
    check_available()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axis in axes if log_y else ():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
    return figure, list(axes)
