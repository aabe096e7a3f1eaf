"""``slimlstm demo``: its table, its picture, and its checks before anything is measured."""

import hashlib
import itertools
import math
import re
import sys

import pytest
import torch
from command import CONFIG, RANKS

from slimlstm import LowRank, Prune, Quantize, compress_
from slimlstm.demo import plots
from slimlstm.demo import tour as demo
from slimlstm.demo.awd_lstm import AWDLSTM
from slimlstm.evaluate import perplexity


@pytest.mark.slow
def test_the_tour(tiny_demo, tmp_path, run_json):
    dense, tokens = tiny_demo
    found = run_json("demo", "--plot", tmp_path / "curves.pdf")
    rows = {(row["storage"], row["method"], row["target"], row["rank"]): row for row in found["rows"]}
    assert list(rows) == [
        ("float32", "dense", "", None),
        *itertools.product(("float32",), ("svd", "semi-nmf", "fisher", "prune"), ("hh", "ih", "both"), RANKS),
        ("int8", "dense", "both", None),
        *itertools.product(("int8",), ("svd", "fisher"), ("both",), RANKS),
        *itertools.product(("auto",), ("fisher",), ("both",), RANKS),
    ]
    assert len(found["rows"]) == len(rows)
    size = sum(parameter.numel() for parameter in dense.lstms.parameters())
    first = found["rows"][0]
    assert (first["parameters"], first["bytes"], first["change"], first["latency_ratio"]) == (size, 4 * size, 0.0, 1.0)
    for (storage, method, target, rank), row in rows.items():
        assert row["change"] == pytest.approx(row["perplexity"] / first["perplexity"] - 1.0)
        assert row["latency_ratio"] > 0.0
        if method == "fisher":
            assert row["bytes"] <= rows["int8" if storage == "auto" else storage, "svd", target, rank]["bytes"]
            continue
        model = AWDLSTM(CONFIG)
        model.load_state_dict(dense.state_dict())
        if rank is None and storage == "int8":
            config = Quantize("int8")
        elif method == "prune":
            config = Prune(rank=rank, target=target)
        elif method != "dense":
            config = LowRank(method, rank=rank, target=target, storage=None if storage == "float32" else storage)
        if row is not first:
            report = compress_(model, config)
            assert (row["parameters"], row["bytes"]) == (report.lstm.parameters_after, report.lstm.bytes_after)
        assert row["perplexity"] == pytest.approx(perplexity(model, tokens, streams=20).perplexity, rel=1e-6)
    assert len(re.findall(r"\.(?:\s|$)", found["summary"])) == 3
    assert found["data_sha256"] == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    assert found["provenance"]["torch"] == torch.__version__
    assert found["plot"] == str(tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_the_tour_as_a_page(tiny_demo, tmp_path, run):
    page = tmp_path / "report.html"
    status, out, err = run("demo", "--plot", tmp_path / "curves.png", "--report", page)
    assert status == 0, err
    assert f"Thereportisin{page}." in "".join(out.split())
    text = page.read_text(encoding="utf-8")
    for method in demo.METHODS:
        assert f"{method} of hh, rank 2" in text
    assert "this report" in text


@pytest.mark.slow
def test_the_tour_on_paper(tiny_demo, tmp_path, run):
    status, out, err = run("demo", "--plot", tmp_path / "curves.png")
    assert status == 0
    assert "…" not in out
    for words in ("dense", "svd", "semi-nmf", "fisher", "prune", "perplexity", "SVD", "curves.png"):
        assert words in out
    assert re.fullmatch(r"\d+ s\n", err)


@pytest.mark.slow
def test_the_picture_shows_the_loss_against_bytes(tiny_demo, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *_arguments, **_options: drawn.append(figure))
    tour = demo.run()
    demo.draw(tour, tmp_path / "curves.png")
    (axis,) = drawn[0].axes
    lines = {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}
    assert list(lines) == ["dense", "svd", "fisher", "int8", "svd int8", "fisher int8", "fisher auto"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(lines)
    assert len({line.get_marker() for line in lines.values()}) == len(lines), "markers differ, not only colours"
    for name, line in lines.items():
        rows = [row for row in tour.rows if row.name == name and row.target in ("both", "")]
        assert list(line.get_xdata()) == pytest.approx([row.bytes / 1e6 for row in rows])
        assert list(line.get_ydata()) == pytest.approx([math.log(row.perplexity) for row in rows])
    assert (axis.get_xscale(), axis.get_xlabel()) == ("log", "bytes of the LSTMs (MB)")
    assert "nats" in axis.get_ylabel()


@pytest.fixture
def no_measuring(monkeypatch):
    """Nobody should wait a minute to be told of what could be known at once."""

    def run(_progress):
        pytest.fail("measured first")

    monkeypatch.setattr(demo, "run", run)


@pytest.mark.parametrize("plot", ["nowhere/curves.png", "curves.docx", "."])
def test_a_picture_that_cannot_be_written_is_known_before_measuring(plot, no_measuring, tmp_path, run):
    status, out, err = run("demo", "--plot", tmp_path / plot)
    assert (status, out) == (1, "")
    assert err.startswith("slimlstm: ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_without_matplotlib_the_demo_prints_its_table(tiny_demo, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "is_available", lambda: False)
    status, out, _ = run("demo")
    assert status == 0
    assert "fisher int8" in out
    assert "Without matplotlib no curves were drawn: pip install 'slimlstm[plots]'." in " ".join(out.split())
    assert list(tmp_path.glob("*.png")) == []


def test_missing_matplotlib_is_known_before_measuring(no_measuring, tmp_path, monkeypatch, run):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = run("demo", "--plot", tmp_path / "curves.png")
    assert (status, out) == (1, "")
    assert err.startswith("slimlstm: ")
    assert err.endswith("pip install 'slimlstm[plots]'\n")
