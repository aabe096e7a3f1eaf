"""What the plots of norms, spectra and heatmaps show."""

import itertools

import numpy
import pytest
import torch

from paper import plots
from slimlstm import SlimLSTMError

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *_arguments, **_options: figures.append(figure))
    return figures


def lines_of(axis):
    """The lines of a panel by their labels; unlabelled ones by their place."""
    return {line.get_label(): line for line in axis.get_lines()}


def test_norms_have_a_panel_a_title_and_a_line_a_method(drawn, tmp_path):
    titles = ("l1 of ih", "l1 of hh", "nuclear of ih")
    panels = {title: {"svd": [(10, 1.0), (50, 2.0)], "prune": [(10, 0.5)]} for title in titles}
    plots.norm_curves(panels, {"l1 of ih": 2.5, "l1 of hh": 3.5, "nuclear of ih": 4.5}, tmp_path / "norms.png")
    (figure,) = drawn
    used = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in used] == list(titles)
    for axis, dense in zip(used, (2.5, 3.5, 4.5), strict=True):
        lines = lines_of(axis)
        assert list(lines) == ["dense", "svd", "prune"]
        assert list(lines["svd"].get_xdata()) == [10, 50]
        assert list(lines["svd"].get_ydata()) == [1.0, 2.0]
        assert set(lines["dense"].get_ydata()) == {dense}
        assert axis.get_ylim()[0] == 0.0
        assert axis.get_ylim()[1] > 1.05 * dense, "markers at the top are not cut"
        assert len({line.get_marker() for line in lines.values()}) == 3
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["dense", "svd", "prune"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "rank", "rank"]


def test_spectra_are_relative_to_the_largest_value_and_energy_ends_at_one(drawn, tmp_path):
    plots.spectra({"hh": [[2.0, 1.0, 0.5], [1.0, 0.1]], "ih": [[3.0, 3.0]]}, tmp_path / "spectra.png")
    values, held = drawn[0].axes
    assert [line.get_label() for line in values.get_lines()] == ["hh, layer 0", "hh, layer 1", "ih, layer 0"]
    assert list(values.get_lines()[0].get_xdata()) == [1, 2, 3]
    assert list(values.get_lines()[0].get_ydata()) == [1.0, 0.5, 0.25]
    assert [line.get_ydata()[-1] for line in held.get_lines()] == pytest.approx([1.0, 1.0, 1.0])
    assert held.get_lines()[2].get_ydata()[0] == pytest.approx(0.5)
    colors = [line.get_color() for line in values.get_lines()]
    assert colors[0] == colors[1] != colors[2], "a colour for every kind of matrix"
    assert (values.get_ylim(), held.get_ylim()) == ((1e-3, 1.2), (0.0, 1.02))
    assert (values.get_xscale(), values.get_yscale()) == ("log", "log")


def test_heatmaps_show_block_maxima_gates_and_salient_lines(drawn, tmp_path):
    matrix = torch.zeros(8, 50)
    matrix[3], matrix[:, 20] = 1.0, 2.0
    matrix[5, 7] = -5.0
    plots.heatmaps({"dense": matrix, "half": matrix / 2}, tmp_path / "heatmap.png")
    (figure,) = drawn
    panels, bars = figure.axes[:2], figure.axes[2:]
    assert [axis.get_title().splitlines()[0] for axis in panels] == ["dense", "half"]
    assert [axis.get_xlabel() for axis in bars] == ["|w|", "|w|"]
    for axis, bar, scale in zip(panels, bars, (1.0, 0.5), strict=True):
        assert bar.get_xlim() == pytest.approx((0.0, axis.get_images()[0].get_clim()[1]))
        (image,) = axis.get_images()
        numpy.testing.assert_array_equal(image.get_array(), scale * matrix.abs().numpy())
        assert (axis.get_xlim(), axis.get_ylim()) == ((0.0, 50.0), (8.0, 0.0))
        *borders, rows, columns = axis.get_lines()
        assert [line.get_ydata()[0] for line in borders] == [2.0, 4.0, 6.0]
        assert list(rows.get_ydata()) == [3.5]
        assert list(columns.get_xdata()) == [20.5]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["i", "f", "g", "o"]
    assert "2% of rows hold" in figure.axes[0].get_title()


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plots.norm_curves({"a": {"svd": [(1, 1.0)]}}, {"a": 1.0}, path),
        lambda path: plots.spectra({"hh": [[1.0]]}, path),
        lambda path: plots.heatmaps({"a": torch.ones(4, 4)}, path),
    ],
    ids=["norms", "spectra", "heatmaps"],
)
def test_unknown_endings_are_refused(draw, tmp_path):
    with pytest.raises(SlimLSTMError, match="a picture can have"):
        draw(tmp_path / "picture.nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_spectrum_of_zeros_is_refused(tmp_path):
    with pytest.raises(SlimLSTMError, match="without a positive value"):
        plots.spectra({"hh": [[0.0, 0.0]]}, tmp_path / "spectra.png")


@pytest.mark.slow
def test_the_picture_of_ratios(tmp_path, drawn):
    rows = []
    for threads, batch, steps, hidden in itertools.product((1, 2), (1, 4), (1, 35), (64, 1024, 1150)):
        candidates = {}
        for precision, model in itertools.product(("float32", "bfloat16", "int8"), ("dense", f"rank {hidden // 8}")):
            ratio = hidden / 100 + steps + (model == "dense") + 100 * (threads + batch - 2)
            faster = {"dense": {"than": "rival", "ratio": ratio}, "same model": {"than": "rival", "ratio": 0.9}}
            candidates[f"{precision} {model}"] = {"ours": True, "precision": precision, "model": model, "faster": faster}
        candidates["rival"] = {"ours": False, "precision": "float32", "model": "dense", "faster": {}}
        setting = {"threads": threads, "batch": batch, "steps": steps, "hidden": hidden}
        rows.append(setting | {"candidates": candidates, "refused": {}})
    plots.speed_ratios(rows, tmp_path / "ratios.png")
    axes = drawn[0].axes
    names = [f"{precision}, {steps}" for steps in ("1 step", "35 steps") for precision in ("float32", "bfloat16", "int8")]
    assert [axis.get_title() for axis in axes] == names
    for axis, steps in zip(axes, (1, 1, 1, 35, 35, 35), strict=True):
        dense, low_rank, _one = axis.get_lines()
        assert [dense.get_label(), low_rank.get_label()] == ["dense", "rank H/8"]
        assert list(dense.get_xdata()) == [64, 1024, 1150]
        assert list(dense.get_ydata()) == pytest.approx([steps + 1 + size / 100 for size in (64, 1024, 1150)])
        assert list(low_rank.get_ydata()) == pytest.approx([steps + size / 100 for size in (64, 1024, 1150)])
        assert dense.get_marker() != low_rank.get_marker()
        assert dense.get_linestyle() != low_rank.get_linestyle()
    assert [text.get_text() for text in axes[-1].get_xticklabels()] == ["64", "1150"], "labels do not overlap"


def test_predictions_have_a_marker_per_method_and_a_named_line(tmp_path, drawn):
    plots.predictions({"svd": [(0.01, 0.02), (0.1, 0.2)], "prune": [(0.5, 0.9), (0.0, -0.1)]}, tmp_path / "p.png")
    (axis,) = drawn[0].axes
    svd, prune, equal = axis.get_lines()
    assert [list(svd.get_xdata()), list(svd.get_ydata())] == [[0.01, 0.1], [0.02, 0.2]]
    assert [list(prune.get_xdata()), list(prune.get_ydata())] == [[0.5], [0.9]], "without the pair that is not positive"
    assert svd.get_marker() != prune.get_marker()
    assert list(equal.get_xdata()) == list(equal.get_ydata())
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["svd", "prune", "measured = predicted"]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")


def test_rises_have_a_panel_per_model_and_a_line_per_method(tmp_path, drawn):
    lines = {"int8": [(8.0, 0.1), (4.0, 0.3), (2.0, -0.1)], "together": [(4.0, 0.1), (8.0, 0.02)]}
    plots.rises({"one": lines, "two": lines}, tmp_path / "r.png", x_label="bytes (%)", y_label="rise")
    for axis, title in zip(drawn[0].axes, ("one", "two"), strict=True):
        int8, together = axis.get_lines()
        assert [list(int8.get_xdata()), list(int8.get_ydata())] == [[4, 8], [0.3, 0.1]], "sorted, and positive"
        assert [list(together.get_xdata()), list(together.get_ydata())] == [[4, 8], [0.1, 0.02]]
        assert int8.get_marker() != together.get_marker()
        assert int8.get_linestyle() != together.get_linestyle()
        assert (axis.get_title(), axis.get_xlabel(), axis.get_xscale(), axis.get_yscale()) == (
            title,
            "bytes (%)",
            "log",
            "log",
        )
    assert drawn[0].axes[0].get_ylabel() == "rise"


def test_pictures_are_written_in_the_format_of_their_suffix(tmp_path):
    plots.predictions({"svd": [(0.01, 0.02)]}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SlimLSTMError, match="a picture can have"):
        plots.predictions({}, tmp_path / "p.txt")
