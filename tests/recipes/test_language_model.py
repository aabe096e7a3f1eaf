"""The program that trains language models: it learns, survives kill -9, and shares its work out among processes."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import slimlstm as sl
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig, load_awd_lstm

RECIPE = Path(__file__).parents[2] / "recipes" / "language_model.py"
TINY = ("--embedding", "8", "--hidden", "12", "--streams", "4", "--bptt", "10")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences in which every word but the first follows from the one before."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    for split, lines in (("train", 400), ("valid", 40), ("test", 40)):
        starts = torch.randint(5, (lines,), generator=generator).tolist()
        sentences = [" ".join(f"w{(start + step) % 5}" for step in range(6)) for start in starts]
        (folder / f"{split}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return folder


def command(text, output, *options):
    return [str(part) for part in (RECIPE, "--text", text, "--output", output, *options)]


def run(text, output, *options, launcher=()):
    subprocess.run([sys.executable, *launcher, *command(text, output, *options)], env=ENVIRONMENT, check=True)
    return log_of(output)


def log_of(output):
    """The epochs without their seconds."""
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def outcome(output):
    """All that a run leaves behind but its times."""
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    weights = {path.relative_to(output): load_file(path) for path in output.rglob("*.safetensors")}
    return weights, log_of(output), result["perplexity"], (output / "vocab.txt").read_text(encoding="utf-8")


def assert_same(found, expected):
    assert found[1:] == expected[1:]
    assert found[0].keys() == expected[0].keys()
    for name, tensors in expected[0].items():
        assert found[0][name].keys() == tensors.keys()
        assert not [key for key, tensor in tensors.items() if not torch.equal(found[0][name][key], tensor)]


def run_and_kill(text, output, *options):
    """Kills the run as soon as it has written a checkpoint amid an epoch or at its end."""
    process = subprocess.Popen([sys.executable, *command(text, output, *options)], env=ENVIRONMENT)
    until = time.monotonic() + 60.0
    while not (output / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (output / "result.json").exists()


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    options = ("--optimizer", "adamw", "--lr", "0.1", "--dropout", "0", "--epochs", "3")
    run(text, output, *TINY, *options)
    return output


def test_training_learns_the_text(trained):
    log = log_of(trained)
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    assert log[-1]["valid_loss"] < 0.8 * log[0]["valid_loss"]
    assert load_awd_lstm(trained).config.hidden_size == 12


def test_a_folder_in_which_another_process_works_is_left_alone(text, tmp_path):
    with FileLock(tmp_path / ".lock"):
        refused = subprocess.run(
            [sys.executable, *command(text, tmp_path, *TINY)], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
    assert refused.returncode == 1
    assert "another process works in" in refused.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


RUNS = {
    "training": ("--optimizer", "adamw", "--epochs", "3", "--half"),
    "factors": ("--optimizer", "asgd", "--lr", "1", "--epochs", "3", "--compress", "svd", "--rank", "2"),
    "trains": ("--optimizer", "adamw", "--lr", "0.1", "--dropout", "0.1", "--epochs", "2", "--tensor-train", "0.5"),
    "masks": ("--optimizer", "asgd", "--lr", "1", "--epochs", "3", "--compress", "prune", "--rank", "2"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_same_files(text, trained, tmp_path, name):
    options = (
        *TINY,
        *RUNS[name],
        "--checkpoint-seconds",
        "0",
        *(("--start", trained) if "--compress" in RUNS[name] else ()),
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
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    shared = run(text, tmp_path / "two", *options, launcher=launcher)
    for entry, expected in zip(shared, alone, strict=True):
        assert entry["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert entry["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-5)


SWEEP = [sys.executable, str(RECIPE.with_name("sweep.py")), "--methods", "svd", "--ranks", "2", "3", "--streams", "4"]


def cells(output):
    """What a sweep has found so far: its files without times."""
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*.json"))}
    return {name: (entry["perplexity"], entry["parameters"]) for name, entry in found.items()}


def test_a_cluster_finds_what_one_machine_does_and_a_killed_sweep_goes_on(text, trained, tmp_path):
    from distributed import LocalCluster

    alone, shared = ([*SWEEP, "--model", trained, "--text", text, "--output", tmp_path / name] for name in ("one", "many"))
    process = subprocess.Popen([str(part) for part in alone], env=ENVIRONMENT)
    until = time.monotonic() + 60.0
    while not (tmp_path / "one" / "dense.json").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the sweep ended before it could be killed"
    first = (tmp_path / "one" / "dense.json").stat().st_mtime_ns
    subprocess.run([str(part) for part in alone], env=ENVIRONMENT, check=True)
    assert (tmp_path / "one" / "dense.json").stat().st_mtime_ns == first
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        command = [*shared, "--scheduler", cluster.scheduler_address]
        subprocess.run([str(part) for part in command], env=ENVIRONMENT, check=True)
    assert len(cells(tmp_path / "one")) == 5
    assert cells(tmp_path / "many") == cells(tmp_path / "one")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_every_cell_of_a_sweep_is_fine_tuned_and_a_killed_one_goes_on(text, trained, tmp_path):
    tuning = "--optimizer asgd --lr 1 --epochs 1 --streams 4 --bptt 10 --checkpoint-seconds 0.1"
    options = ["--ranks", "2", "--targets", "hh", "--tune", tuning, "--model", trained, "--text", text]
    whole, parts = ([str(part) for part in (*SWEEP, *options, "--output", tmp_path / name)] for name in ("one", "two"))
    subprocess.run(whole, env=ENVIRONMENT, check=True)
    # Its own session, so that the program that tunes dies with it.
    process = subprocess.Popen(parts, env=ENVIRONMENT, start_new_session=True)
    until = time.monotonic() + 60.0
    while not (tmp_path / "two" / "dense" / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the sweep ended before it could be killed"
    assert not list((tmp_path / "two").glob("*.json"))
    subprocess.run(parts, env=ENVIRONMENT, check=True)
    assert cells(tmp_path / "one").keys() == {"dense.json", "svd-hh-002.json"}
    assert cells(tmp_path / "two") == cells(tmp_path / "one")
    for cell in ("dense", "svd-hh-002"):
        found, expected = (outcome(tmp_path / name / cell) for name in ("two", "one"))
        for weights, *_ in (found, expected):
            del weights[Path("checkpoint.safetensors")]
        assert_same(found, expected)


def test_other_settings_are_refused(text, tmp_path):
    options = (*TINY, "--lr", "1", "--epochs", "1")
    run(text, tmp_path, *options)
    (tmp_path / "result.json").unlink()
    again = [sys.executable, *command(text, tmp_path, *TINY, "--lr", "2", "--epochs", "2")]
    refused = subprocess.run(again, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "lr=1.0, not 2.0" in refused.stderr.replace("\n", " ")


def test_the_published_layout_is_read(tmp_path):
    torch.manual_seed(0)
    model = AWDLSTM(AWDLSTMConfig(11, embedding_size=4, hidden_size=6)).eval()
    published = {"encoder.weight": model.embedding.weight, "decoder.weight": model.embedding.weight.clone()}
    published["decoder.bias"] = model.decoder.bias
    for index, lstm in enumerate(model.lstms):
        published |= {f"rnns.{index}.module.{name}": value for name, value in lstm.named_parameters()}
        # Weight drop leaves a dropped copy beside the weights.
        published[f"rnns.{index}.module.weight_hh_l0_raw"] = lstm.weight_hh_l0
        published[f"rnns.{index}.module.weight_hh_l0"] = torch.zeros_like(lstm.weight_hh_l0)
    save_file({name: tensor.detach().contiguous() for name, tensor in published.items()}, tmp_path / "model.safetensors")
    tokens = torch.arange(8).view(4, 2)
    assert torch.equal(load_awd_lstm(tmp_path)(tokens)[0], model(tokens)[0])


def test_speed_is_told_of_outputs_that_were_checked(trained, tmp_path):
    command = [sys.executable, RECIPE.with_name("speed.py"), "--model", trained, "--output", tmp_path / "speed.json"]
    command += ["--ranks", "2", "3", "--steps", "5", "1", "--batch", "1", "3", "--seconds", "0.001"]
    subprocess.run([str(part) for part in command], env=ENVIRONMENT, check=True)
    result = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert len(result["rows"]) == 8
    for row in result["rows"]:
        assert set(row["candidates"]) == {
            *("PyTorch oneDNN", "PyTorch native"),
            *(f"{backend} rank {rank}" for backend in ("fused", "reference", "dense") for rank in (2, 3)),
        }
        assert all(one["error"] < 1e-5 for one in row["candidates"].values())
        times = {name: one["microseconds"] for name, one in row["candidates"].items()}
        dense = min(times["PyTorch oneDNN"], times["PyTorch native"])
        for name, ratios in row["faster"].items():
            assert ratios["fused"] == pytest.approx(dense / times[f"fused {name}"])
            plain = min(times[f"reference {name}"], times[f"dense {name}"])
            assert ratios["plain PyTorch"] == pytest.approx(dense / plain)


def test_speed_of_training_is_told_of_gradients_that_were_checked(trained, tmp_path):
    command = [sys.executable, RECIPE.with_name("speed.py"), "--model", trained, "--output", tmp_path / "speed.json"]
    command += ["--training", "--ranks", "2", "--steps", "5", "--batch", "3", "--seconds", "0.001"]
    subprocess.run([str(part) for part in command], env=ENVIRONMENT, check=True)
    rows = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["rows"]
    assert [row["scope"] for row in rows] == ["float32", "bfloat16"]
    for row, most in zip(rows, (1e-5, 5e-2), strict=True):
        assert all(0.0 < one["error"] < most for one in row["candidates"].values())
        times = {name: one["microseconds"] for name, one in row["candidates"].items()}
        dense = min(times["PyTorch oneDNN"], times["PyTorch native"])
        assert row["faster"]["rank 2"]["training"] == pytest.approx(dense / times["rank 2"])


def test_calibrated_and_quantised_cells_beside_the_papers(text, trained, tmp_path):
    methods = ("activation", "fisher", "int8", "pytorch-int8")
    command = [*SWEEP, "--methods", *methods, "--calibrate", "1200", "--targets", "hh", "--ranks", "2"]
    command += ["--model", trained, "--text", text, "--output", tmp_path]
    subprocess.run([str(part) for part in command], env=ENVIRONMENT, check=True)
    names = ("activation-hh-002", "dense", "fisher-hh-002", "int8", "pytorch-int8")
    assert list(cells(tmp_path)) == [f"{name}.json" for name in names]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    for name in ("activation-hh-002", "fisher-hh-002"):
        assert {site["rank"] for site in found[name]["sites"]} == {2}
        assert found[name]["config"]["calibration_tokens"] == 1200
        assert found[name]["parameters"] < found["dense"]["parameters"]
    matrices = sum(site.shape[0] * site.shape[1] for site in sl.find_sites(load_awd_lstm(trained)))
    assert found["pytorch-int8"]["bytes"] == found["dense"]["bytes"] - 3 * matrices
    for name in ("int8", "pytorch-int8"):
        assert found[name]["bytes"] < found["dense"]["bytes"]
        assert found[name]["loss"] == pytest.approx(found["dense"]["loss"], rel=0.02)
        assert found[name]["loss"] != found["dense"]["loss"]
    first = (tmp_path / "calibration.safetensors").stat().st_mtime_ns
    (tmp_path / "fisher-hh-002.json").unlink()
    subprocess.run([str(part) for part in command], env=ENVIRONMENT, check=True)
    assert (tmp_path / "calibration.safetensors").stat().st_mtime_ns == first
    again = json.loads((tmp_path / "fisher-hh-002.json").read_text(encoding="utf-8"))
    assert again["loss"] == found["fisher-hh-002"]["loss"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A text of 10,000 words, as Penn Treebank has."""
    folder = tmp_path_factory.mktemp("wide")
    for split, count in (("train", 9999), ("valid", 60), ("test", 60)):
        (folder / f"{split}.txt").write_text(" ".join(f"w{index}" for index in range(count)) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(("config", "millions"), [("ptb-13m", 13.1366), ("ptb-tensor-train", 12.0)])
def test_controls_are_as_large_as_what_they_are_compared_with(wide, tmp_path, config, millions):
    options = ("--config", config, "--streams", "2", "--bptt", "5", "--max-minutes", "0")
    told = subprocess.run(
        [sys.executable, *command(wide, tmp_path, *options)], env=ENVIRONMENT, check=True, capture_output=True, text=True
    )
    line = next(line for line in told.stdout.splitlines() if line.endswith(" parameters"))
    assert int(line.removesuffix(" parameters").replace(",", "")) / 1e6 == pytest.approx(millions, rel=1e-3)
