"""The program that trains language models: it learns, survives kill -9, and divides its work among processes."""

import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from recipe_helpers import (
    ENVIRONMENT,
    TINY,
    assert_same,
    command,
    in_a_process,
    log_of,
    outcome,
    run,
    run_and_kill,
    run_script,
)
from safetensors.torch import load_file

import slimlstm as sl
from paper.cells import calibration_batches
from slimlstm.demo.awd_lstm import load_awd_lstm
from slimlstm.demo.corpora import Vocabulary, words_of
from slimlstm.evaluate import NextTokens


def test_training_learns_the_text(trained):
    log = log_of(trained)
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    assert log[-1]["valid_loss"] < 0.8 * log[0]["valid_loss"]
    assert load_awd_lstm(trained).config.hidden_size == 12


def test_a_folder_in_which_another_process_works_is_left_alone(text, tmp_path):
    with FileLock(tmp_path / ".lock"):
        refused = subprocess.run(
            in_a_process(command(text, tmp_path, *TINY)), env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
    assert refused.returncode == 1
    assert "another process works in" in refused.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


@pytest.fixture(scope="module")
def calibration(text, trained, tmp_path_factory):
    """A file that the recipe reads, made on the text that it calibrates on."""
    path = tmp_path_factory.mktemp("calibration") / "calibration.safetensors"
    words = Vocabulary.read(trained / "vocab.txt").encode(words_of((text / "train.txt").read_text(encoding="utf-8")))
    sl.calibrate(load_awd_lstm(trained), calibration_batches(words), NextTokens()).save(path)
    return path


RUNS = {
    "training": ("--optimizer", "adamw", "--epochs", "3", "--half"),
    "factors": ("--optimizer", "asgd", "--lr", "1", "--epochs", "3", "--compress", "svd", "--rank", "2"),
    "trains": ("--optimizer", "adamw", "--lr", "0.1", "--dropout", "0.1", "--epochs", "2", "--tensor-train", "0.5"),
    "masks": ("--optimizer", "asgd", "--lr", "1", "--epochs", "3", "--compress", "prune", "--rank", "2"),
    "grid": ("--optimizer", "asgd", "--lr", "1", "--epochs", "3", "--compress", "fisher-auto", "--rank", "3"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_same_files(text, trained, calibration, tmp_path, name):
    options = (
        *TINY,
        *RUNS[name],
        "--checkpoint-seconds",
        "0",
        *(("--start", trained) if "--compress" in RUNS[name] else ()),
        *(("--calibration", calibration) if name == "grid" else ()),
    )
    run(text, tmp_path / "whole", *options)
    run_and_kill(text, tmp_path / "parts", *options)
    run(text, tmp_path / "parts", *options)
    found = outcome(tmp_path / "parts")
    expected = outcome(tmp_path / "whole")
    for weights, *_ in (found, expected):
        del weights[Path("checkpoint.safetensors")]
    assert_same(found, expected)
    if name == "masks":
        pruned = sl.load(tmp_path / "parts" / "compressed", load_awd_lstm(trained)).lstms[0].weight_hh_l0
        assert int((pruned != 0).sum()) == 2 * sum(pruned.shape)
    if name == "training":
        assert expected[0].keys() == {Path("model-00001-of-00001.safetensors")}
        assert load_awd_lstm(tmp_path / "parts").config.hidden_size == 12
    if name == "trains":
        weights = load_file(tmp_path / "parts" / "model.safetensors")
        cores = [weights[f"lstms.0.parametrizations.weight_ih_l0.original{index}"] for index in range(3)]
        assert expected[1][-1]["valid_loss"] < 0.9 * math.log(6)
        # 48 = 4 * 3 * 4 and 8 = 2 * 2 * 2; half of its parameters, or nearly so.
        assert [core.shape[1:3] for core in cores] == [(4, 2), (3, 2), (4, 2)]
        assert 0.3 * 48 * 8 < sum(core.numel() for core in cores) <= 0.5 * 48 * 8
    if name == "grid":
        rounded = sl.load(tmp_path / "parts" / "compressed", load_awd_lstm(trained))
        assert any(site.storage for site in sl.find_sites(rounded))
    if name == "factors":
        factored = sl.load(tmp_path / "parts" / "compressed", load_awd_lstm(trained))
        assert {site.rank for site in sl.find_sites(factored) if site.name.startswith("weight_hh")} == {2}


def test_semi_nmf_trains_the_factors_of_its_svd(text, trained, tmp_path):
    """The product is what Semi-NMF finds; its own factors would be far from orthogonal."""
    options = ("--optimizer", "asgd", "--lr", "1e-9", "--epochs", "1", "--compress", "semi-nmf", "--rank", "3")
    run(text, tmp_path, *TINY, *options, "--start", trained)
    expected, found = load_awd_lstm(trained), sl.load(tmp_path / "compressed", load_awd_lstm(trained))
    sl.compress_(expected, sl.LowRank("semi-nmf", rank=3, target="hh"))
    for ours, theirs in zip(found.lstms, expected.lstms, strict=True):
        torch.testing.assert_close(ours.product("weight_hh_l0"), theirs.product("weight_hh_l0"), rtol=1e-4, atol=1e-5)
        for orthogonal, module in ((True, ours), (False, theirs)):
            u, v = (factor.detach() for factor in module.matrix("weight_hh_l0"))
            scale = torch.linalg.matrix_norm(u, 2) ** 2
            for gram in (u.T @ u, v @ v.T):
                assert torch.allclose(gram, gram.diag().diag(), atol=1e-4 * float(scale)) == orthogonal
            assert torch.allclose((u.T @ u).diag(), (v @ v.T).diag(), rtol=1e-3)


def test_two_processes_are_one_with_twice_the_streams(text, tmp_path):
    options = (*TINY, "--dropout", "0", "--lr", "5", "--epochs", "2")
    alone = run(text, tmp_path / "one", *options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    subprocess.run([*launcher, *map(str, command(text, tmp_path / "two", *options))], env=ENVIRONMENT, check=True)
    for entry, expected in zip(log_of(tmp_path / "two"), alone, strict=True):
        assert entry["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert entry["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-5)


def test_other_settings_are_refused(text, tmp_path):
    options = (*TINY, "--lr", "1", "--epochs", "1")
    run(text, tmp_path, *options)
    (tmp_path / "result.json").unlink()
    with pytest.raises(sl.SlimLSTMError, match=r"lr=1\.0, not 2\.0"):
        run_script(*command(text, tmp_path, *TINY, "--lr", "2", "--epochs", "2"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A text of 10,000 words, as Penn Treebank has."""
    folder = tmp_path_factory.mktemp("wide")
    for split, count in (("train", 9999), ("valid", 60), ("test", 60)):
        (folder / f"{split}.txt").write_text(" ".join(f"w{index}" for index in range(count)) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(("config", "millions"), [("ptb-13m", 13.1366), ("ptb-tensor-train", 12.0)])
def test_controls_are_as_large_as_what_they_are_compared_with(wide, tmp_path, capsys, config, millions):
    options = ("--config", config, "--streams", "2", "--bptt", "5", "--max-minutes", "0")
    assert not run_script(*command(wide, tmp_path, *options))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.endswith(" parameters"))
    assert int(line.removesuffix(" parameters").replace(",", "")) / 1e6 == pytest.approx(millions, rel=1e-3)
