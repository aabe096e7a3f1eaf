"""Bars of long steps: on a terminal by default, from one place; silent in pipes, beside callbacks and after the step."""

import io
import math
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import slimlstm as sl
from slimlstm import progress
from slimlstm.bench import bench_layers, interleaved_seconds
from slimlstm.onnx.layers import layer_model
from slimlstm.search import find_best


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard error a terminal of 100 columns, whose bars appear at once, and returns it.

    A function, because pytest replaces standard error between a test's fixtures and the test.
    """

    def terminal():
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress, "SECONDS_BEFORE_BARS", -1.0)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("TERM", "xterm")
        for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        return stream

    return terminal


def squares(model, batch):
    return model(batch)[0].square()


def loss_of(model):
    return squares(model, BATCHES[0]).mean().item()


def tagger():
    return nn.Sequential(nn.LSTM(4, 8))


BATCHES = [torch.randn(5, 2, 4) for _ in range(5)]
LAYERS = {"lstm": sl.LowRankLSTM(3, 4)}


def file_of(folder):
    save_file(tagger().state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def onnx_of(folder):
    pytest.importorskip("onnx")
    (folder / "model.onnx").write_bytes(layer_model(sl.LowRankLSTM(8, 16).layers()[0]).SerializeToString())
    return folder / "model.onnx"


FISHER = sl.LowRank("fisher", keep=0.5)
STEPS = {
    "calibrate": (lambda folder, **more: sl.calibrate(tagger(), BATCHES, squares, **more), "calibrating"),
    "compress_": (lambda folder, **more: sl.compress_(tagger(), sl.Quantize("int8"), **more), "compressing"),
    "compress_ with batches": (
        lambda folder, **more: sl.compress_(tagger(), FISHER, batches=BATCHES, loss=squares, **more),
        "fitting again, pass 2",
    ),
    "measure_sensitivity": (
        lambda folder, **more: sl.measure_sensitivity(tagger(), BATCHES, squares, **more),
        "measuring sensitivity",
    ),
    "compress_file": (
        lambda folder, **more: sl.compress_file(file_of(folder), sl.Quantize("int8"), folder / "small", **more),
        "compressing",
    ),
    "compress_onnx": (
        lambda folder, **more: sl.compress_onnx(onnx_of(folder), sl.Quantize("int8"), folder / "small.onnx", **more),
        "compressing",
    ),
    "finetune": (lambda folder, **more: sl.finetune(tagger(), BATCHES, squares, steps=4, **more), "fine-tuning"),
    "find_smallest": (
        lambda folder, **more: sl.find_smallest(tagger(), loss_of, better="lower", at_most=1.0, **more),
        "int8: ",
    ),
    "find_best": (
        lambda folder, **more: find_best(tagger(), loss_of, better="lower", bytes=1200, **more),
        "at most",
    ),
    "bench_layers": (lambda folder, **more: bench_layers(LAYERS, LAYERS, steps=2, seconds=0.01, **more), "timing"),
    "interleaved_seconds": (lambda folder, **more: interleaved_seconds({"sum": lambda: 1}, seconds=0.01, **more), "timing"),
}
"""Every long step, and words that its bar or lines contain."""
every_step = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "find_best" else []) for name in STEPS]
)


@every_step
def test_a_terminal_shows_progress(name, terminal, tmp_path):
    step, words = STEPS[name]
    screen = terminal()
    step(tmp_path)
    assert words in screen.getvalue()
    assert not progress._display._rows


@every_step
def test_a_pipe_shows_none(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(progress, "SECONDS_BEFORE_BARS", -1.0)
    STEPS[name][0](tmp_path)
    assert capsys.readouterr() == ("", "")


@every_step
def test_a_callback_takes_the_place_of_bars(name, terminal, tmp_path):
    seen, screen = [], terminal()
    STEPS[name][0](tmp_path, progress=lambda *values: seen.append(values))
    assert seen
    if not name.startswith("find"):  # its trials are lines, and the steps within them bars
        assert screen.getvalue() == ""


def test_short_steps_show_no_bar(terminal, monkeypatch):
    screen = terminal()
    monkeypatch.setattr(progress, "SECONDS_BEFORE_BARS", 60.0)
    sl.calibrate(tagger(), BATCHES, squares)
    assert screen.getvalue() == ""


def test_a_bar_ends_with_an_error_and_leaves_the_streams_alone(terminal):
    before, screen = sys.stdout, terminal()

    def fails(model, batch):
        if torch.equal(batch, BATCHES[2]):
            raise RuntimeError("out of memory")
        return squares(model, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        sl.calibrate(tagger(), BATCHES, fails)
    assert "batch 1 of 5" in screen.getvalue()
    assert (progress._display._rows, progress._display._bars) == (0, None)
    assert (sys.stdout, sys.stderr) == (before, screen)


def test_no_console_at_all(monkeypatch):
    """As under pythonw."""
    monkeypatch.setattr(sys, "stderr", None)
    assert sl.calibrate(tagger(), BATCHES, squares).predictions == 400


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(6, 5, 2, 4))


def test_batches_of_unknown_number():
    """A DataLoader of a stream has a ``__len__`` that raises."""
    loader, seen = DataLoader(Stream(), batch_size=None), []
    sl.calibrate(tagger(), loader, squares, progress=lambda label, fraction: seen.append((label, math.isnan(fraction))))
    assert seen == [(f"batch {number}", True) for number in range(1, 7)]
    model = tagger()
    report = sl.compress_(model, FISHER, batches=loader, loss=squares)
    assert report.loss_after is not None
