"""The command's output: help, version, tables of 80 columns, pipes, encodings, interrupts, exit statuses."""

import io
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import nn

from slimlstm import Plan, Quantize, bench, cli, compress_
from slimlstm.methods import METHODS, STORAGES
from slimlstm.onnx import export as onnx_export
from slimlstm.onnx.export import Exported
from slimlstm.search import Search, Trial, onnx_file

VERBS = {
    "demo": (("demo", "--plot", "{}/curves.png"), "slimlstm.demo.tour.run"),
    "inspect": (("inspect", "{}/model.safetensors"), "slimlstm.weight_files.read_weights"),
    "compress": (
        ("compress", "{}/model.safetensors", "-o", "{}/out", "--rank", "2"),
        "slimlstm.weight_files.compress_file",
    ),
    "shrink": (
        ("shrink", "{}/small.onnx", "-o", "{}/smaller.onnx", "--inputs", "{}/../runs.npz"),
        "slimlstm.search.onnx_file.shrink_onnx",
    ),
    "bench": (("bench", "{}/model.safetensors", "--rank", "2", "--steps", "2"), "slimlstm.bench.bench_layers"),
    "eval": (("eval", "{}", "--text", "{}/../text.txt"), "slimlstm.evaluate.perplexity"),
    "export": (("export", "{}", "-o", "{}/small.onnx"), "slimlstm.onnx.export.export_onnx"),
}
"""An example of every verb, and a function that it calls."""
every_verb = pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=pytest.mark.slow) if verb == "demo" else verb for verb in VERBS]
)


@pytest.fixture
def arguments(folder, tiny_demo, monkeypatch):
    """The arguments of a verb's example, made quick."""
    monkeypatch.setitem(bench.bench_layers.__kwdefaults__, "seconds", 0.005)
    exported = Exported(
        {"tokens": ["T", "B"]},
        {"logits": ["T", "B", 11]},
        9_999,
        [{"T": 5, "B": 3}],
        1e-7,
        "ONNX Runtime",
        17,
        ["lstm: a reason " * 9],
    )
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *_, **__: exported)
    np.savez(folder.parent / "runs.npz", x=np.zeros((2, 5, 1, 3), np.float32))
    dense = Trial("uncompressed", None, 99_999, 0.0, accepted=True)
    small = Trial("int8", Plan(), 33_333, 0.001, accepted=True)
    report = compress_(nn.Sequential(nn.LSTM(8, 16)), Quantize("int8"))
    search = Search(dense, [small], small, report, "disagreement of at most 0.01", "lower", "disagreement", False, [], 0.01)
    monkeypatch.setattr(onnx_file, "shrink_onnx", lambda *_, **__: search)

    def arguments(verb):
        return [argument.format(folder) for argument in VERBS[verb][0]]

    return arguments


def test_every_verb_has_an_example():
    assert set(cli.VERBS) == set(VERBS)


@pytest.mark.parametrize("words", [(), *((verb,) for verb in VERBS)], ids=lambda words: " ".join(words) or "none")
def test_help_is_whole_and_fits_80_columns(words, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(*words, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: {' '.join(('slimlstm', *words))} ")
    assert "..." not in out.replace("[ARGS]...", "")
    assert max(map(len, out.splitlines())) <= 80
    if not words:
        assert all(re.search(rf"^  {verb} +\w.*\.$", out, re.MULTILINE) for verb in VERBS)


def test_help_names_every_method_and_storage(run):
    _, out, _ = run("compress", "--help")
    assert {*METHODS, *STORAGES} - {"float32"} <= set(re.findall(r"[\w-]+", out))


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["compress", "--help"]], ids=" ".join)
def test_help_and_version_import_no_pytorch(words):
    code = f"import sys; from slimlstm.cli import main\ntry: main({words})\nexcept SystemExit: pass\n"
    code += "print('\\n' + str({'torch', 'numpy', 'rich'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_version():
    done = subprocess.run([sys.executable, "-m", "slimlstm", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"slimlstm {version('slimlstm')}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Usage: "),
        (("nonsense",), "No such command 'nonsense'"),
        (("inspect",), "Missing argument"),
        (("inspect", "a.pt", "--colour"), "No such option: --colour"),
        (("compress", "a.pt", "-o", "out", "--rank", "many"), "Invalid value for '--rank'"),
        (("eval", "embedded", "--streams", "1.5"), "Invalid value for '--streams'"),
    ],
    ids=["no command", "unknown command", "no file", "unknown option", "no integer", "a fraction"],
)
def test_a_wrong_call_is_answered_with_usage(words, message, run):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@every_verb
def test_tables_fit_80_columns_and_are_plain_in_a_pipe(verb, arguments, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(*arguments(verb))
    assert status == 0, err
    assert out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "\x1b" not in out + err
    assert "Traceback" not in err


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def written_in(encoding, words, monkeypatch, kind=io.TextIOWrapper):
    """Status, standard output and standard error of the command whose streams have this encoding and kind."""
    streams = [kind(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        patch.delenv("COLUMNS", raising=False)
        status = 0
        try:
            cli.main(words)
        except SystemExit as end:
            status = end.code
    for stream in streams:
        stream.flush()
    return status, *(stream.buffer.getvalue().decode(encoding) for stream in streams)


@pytest.mark.parametrize(
    ("verb", "encoding"),
    [
        *((verb, "cp1252") for verb in VERBS if verb != "demo"),
        pytest.param("demo", "cp1252", marks=pytest.mark.slow),
        ("inspect", "ascii"),
    ],
)
def test_output_in_a_small_encoding(verb, encoding, arguments, monkeypatch):
    status, out, err = written_in(encoding, arguments(verb), monkeypatch)
    assert (status, "Traceback" in err) == (0, False), err
    assert out
    assert "?" not in out


@every_verb
@pytest.mark.parametrize(
    ("environment", "allowed"),
    # Bold and dim stay; styles 30 to 49 and 90 to 107 are colours.
    [({"NO_COLOR": "1", "TERM": "xterm-256color"}, {"0", "1", "2", "3"}), ({"TERM": "dumb"}, set())],
    ids=["NO_COLOR", "dumb"],
)
def test_a_terminal_without_colour(environment, allowed, verb, arguments, monkeypatch):
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, out, err = written_in("utf-8", arguments(verb), monkeypatch, Terminal)
    assert status == 0, err
    styles = {style for group in re.findall("\x1b\\[([0-9;]*)m", out + err) for style in group.split(";")}
    assert styles <= allowed
    assert ("\x1b" in out + err) <= bool(allowed)


def test_names_outside_the_encoding_are_replaced(tmp_path, monkeypatch):
    path = tmp_path / "重み.safetensors"
    save_file(nn.LSTM(2, 3).state_dict(), path)
    status, out, _ = written_in(
        "cp1252", ["compress", str(path), "-o", str(tmp_path / "重"), "--storage", "int8"], monkeypatch
    )
    assert status == 0
    assert "Written to" in out
    assert "?" in out


@pytest.mark.slow
def test_a_real_pipe_in_cp1252(folder):
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "slimlstm", "inspect", str(folder / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "lstms.1.weight_hh_l0" in done.stdout.decode("cp1252")


@every_verb
def test_an_interrupt_ends_with_one_line_and_status_130(verb, arguments, run, monkeypatch):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    module, _, name = VERBS[verb][1].rpartition(".")
    monkeypatch.setattr(import_module(module), name, interrupted)
    # A shell starts its background jobs with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(*arguments(verb)) == (130, "", "slimlstm: interrupted\n")
    finally:
        signal.signal(signal.SIGINT, before)
