"""Draw the demo's curves; the parts of a picture that others share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
