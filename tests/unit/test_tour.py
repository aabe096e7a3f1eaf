"""``slimlstm demo``: its table, its picture, and its checks before anything is measured."""

import hashlib
import itertools
import re
import sys

import numpy as np
import pytest
import torch
from command import CONFIG, RANKS
from matplotlib.image import imread

from slimlstm import LowRank, Prune, compress_
from slimlstm.demo import tour as demo
from slimlstm.demo.awd_lstm import AWDLSTM
from slimlstm.evaluate import perplexity


def test_the_tour(tiny_demo, tmp_path, run_json):
    dense, tokens = tiny_demo
    found = run_json("demo", "--plot", tmp_path / "curves.pdf")
    rows = {(row["method"], row["target"], row["rank"]): row for row in found["rows"]}
    assert list(rows) == [
        ("dense", "", None),
        *itertools.product(("svd", "semi-nmf", "fisher", "prune"), ("hh", "ih", "both"), RANKS),
    ]
    assert len(found["rows"]) == len(rows)
    size = sum(parameter.numel() for parameter in dense.lstms.parameters())
    first = found["rows"][0]
    assert (first["parameters"], first["bytes"], first["change"], first["latency_ratio"]) == (size, 4 * size, 0.0, 1.0)
    for (method, target, rank), row in rows.items():
        assert row["change"] == pytest.approx(row["perplexity"] / first["perplexity"] - 1.0)
        assert row["latency_ratio"] > 0.0
        if method == "fisher":
            assert row["bytes"] <= rows["svd", target, rank]["bytes"]
            continue
        model = AWDLSTM(CONFIG)
        model.load_state_dict(dense.state_dict())
        if method != "dense":
            config = Prune(rank=rank, target=target) if method == "prune" else LowRank(method, rank=rank, target=target)
            report = compress_(model, config)
            assert (row["parameters"], row["bytes"]) == (report.lstm.parameters_after, report.lstm.bytes_after)
        assert row["perplexity"] == pytest.approx(perplexity(model, tokens, streams=20).perplexity, rel=1e-6)
    assert len(re.findall(r"\.(?:\s|$)", found["summary"])) == 3
    assert found["data_sha256"] == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    assert found["provenance"]["torch"] == torch.__version__
    assert found["plot"] == str(tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_the_tour_on_paper(tiny_demo, tmp_path, run):
    status, out, err = run("demo", "--plot", tmp_path / "curves.png")
    assert status == 0
    assert "…" not in out
    for words in ("dense", "svd", "semi-nmf", "fisher", "prune", "perplexity", "SVD", "curves.png"):
        assert words in out
    assert re.fullmatch(r"\d+ s\n", err)

    picture = (imread(tmp_path / "curves.png")[..., :3] * 255).round().astype(int)
    height, width, _ = picture.shape
    assert min(height, width) > 300
    for color in (0x0B6E99, 0xD9730D, 0x6B6B6B):
        points = (picture == [color >> 16, color >> 8 & 255, color & 255]).all(axis=2)
        # In every one of the three panels, side by side.
        assert all(panel.sum() > 50 for panel in np.array_split(points, 3, axis=1))


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


def test_missing_matplotlib_is_known_before_measuring(no_measuring, tmp_path, monkeypatch, run):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = run("demo", "--plot", tmp_path / "curves.png")
    assert (status, out) == (1, "")
    assert err.startswith("slimlstm: ")
    assert err.endswith("pip install 'slimlstm[plots]'\n")
