"""The sweep over methods, targets and ranks: cells, clusters, kills, fine-tuning, calibration, plugins."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipe_helpers import ENVIRONMENT, RECIPES, assert_same, in_a_process, outcome, run_script

import slimlstm as sl
from slimlstm.demo.awd_lstm import load_awd_lstm

SWEEP = [RECIPES / "sweep.py", "--methods", "svd", "--ranks", "2", "3", "--streams", "4"]


def cells(output):
    """What a sweep has found so far: its files without times."""
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*.json"))}
    return {name: (entry["perplexity"], entry["parameters"]) for name, entry in found.items()}


def test_a_cluster_finds_what_one_machine_does_and_a_killed_sweep_goes_on(text, trained, tmp_path):
    from distributed import LocalCluster

    alone, shared = ([*SWEEP, "--model", trained, "--text", text, "--output", tmp_path / name] for name in ("one", "many"))
    process = subprocess.Popen(in_a_process(alone), env=ENVIRONMENT)
    until = time.monotonic() + 60.0
    while not (tmp_path / "one" / "dense.json").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the sweep ended before it could be killed"
    first = (tmp_path / "one" / "dense.json").stat().st_mtime_ns
    assert not run_script(*alone)
    assert (tmp_path / "one" / "dense.json").stat().st_mtime_ns == first
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        assert not run_script(*shared, "--scheduler", cluster.scheduler_address)
    assert len(cells(tmp_path / "one")) == 5
    assert cells(tmp_path / "many") == cells(tmp_path / "one")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_every_cell_of_a_sweep_is_fine_tuned_and_a_killed_one_goes_on(text, trained, tmp_path):
    tuning = "--optimizer asgd --lr 1 --epochs 1 --streams 4 --bptt 10 --checkpoint-seconds 0.1"
    options = ["--ranks", "2", "--targets", "hh", "--tune", tuning, "--model", trained, "--text", text]
    whole, parts = ([*SWEEP, *options, "--output", tmp_path / name] for name in ("one", "two"))
    assert not run_script(*whole)
    # Its own session, so that the program that tunes dies with it.
    process = subprocess.Popen(in_a_process(parts), env=ENVIRONMENT, start_new_session=True)
    until = time.monotonic() + 60.0
    while not (tmp_path / "two" / "dense" / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the sweep ended before it could be killed"
    assert not list((tmp_path / "two").glob("*.json"))
    assert not run_script(*parts)
    assert cells(tmp_path / "one").keys() == {"dense.json", "svd-hh-002.json"}
    assert cells(tmp_path / "two") == cells(tmp_path / "one")
    for cell in ("dense", "svd-hh-002"):
        found, expected = (outcome(tmp_path / name / cell) for name in ("two", "one"))
        for weights, *_ in (found, expected):
            del weights[Path("checkpoint.safetensors")]
        assert_same(found, expected)


def test_calibrated_and_quantised_cells_beside_the_papers(text, trained, tmp_path):
    methods = ("activation", "fisher", "fisher-auto", "int8", "pytorch-int8")
    command = [*SWEEP, "--methods", *methods, "--calibrate", "1200", "--targets", "hh", "--ranks", "2"]
    command += ["--model", trained, "--text", text, "--output", tmp_path]
    assert not run_script(*command)
    names = ("activation-hh-002", "dense", "fisher-auto-hh-002", "fisher-hh-002", "int8", "pytorch-int8")
    assert list(cells(tmp_path)) == [f"{name}.json" for name in names]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    for name in ("activation-hh-002", "fisher-hh-002"):
        assert {site["rank"] for site in found[name]["sites"]} == {2}
        assert found[name]["config"]["calibration_tokens"] == 1200
        assert found[name]["parameters"] < found["dense"]["parameters"]
    plan = found["fisher-auto-hh-002"]
    assert plan["bytes"] <= found["fisher-hh-002"]["bytes"]
    assert plan["loss"] < found["fisher-hh-002"]["loss"]
    assert {site["storage"] for site in plan["sites"]} != {None}
    matrices = sum(site.shape[0] * site.shape[1] for site in sl.find_sites(load_awd_lstm(trained)))
    assert found["pytorch-int8"]["bytes"] == found["dense"]["bytes"] - 3 * matrices
    for name in ("int8", "pytorch-int8"):
        assert found[name]["bytes"] < found["dense"]["bytes"]
        assert found[name]["loss"] == pytest.approx(found["dense"]["loss"], rel=0.02)
        assert found[name]["loss"] != found["dense"]["loss"]
    first = (tmp_path / "calibration.safetensors").stat().st_mtime_ns
    (tmp_path / "fisher-hh-002.json").unlink()
    assert not run_script(*command)
    assert (tmp_path / "calibration.safetensors").stat().st_mtime_ns == first
    again = json.loads((tmp_path / "fisher-hh-002.json").read_text(encoding="utf-8"))
    assert again["loss"] == found["fisher-hh-002"]["loss"]


TOY = """
import torch
from slimlstm.methods import Method, as_factors, register_method


def leading_columns(problem, rank, on_iteration=None):
    v = torch.eye(rank, problem.matrix.shape[1], dtype=problem.matrix.dtype)
    return as_factors(problem.matrix, problem.matrix[:, :rank].clone(), v)


register_method("leading-columns", Method(leading_columns))
"""


def test_a_method_from_a_plugin_is_swept(text, trained, tmp_path):
    """In other processes too, whose tables of methods are their own."""
    (tmp_path / "toy.py").write_text(TOY, encoding="utf-8")
    command = [SWEEP[0], "--plugin", "toy.py", "--methods", "leading-columns", "--ranks", "2", "--targets", "hh"]
    command += ["--streams", "4", "--jobs", "2", "--model", trained, "--text", text, "--output", tmp_path / "results"]
    subprocess.run(in_a_process(command), env=ENVIRONMENT, cwd=tmp_path, check=True)
    found = json.loads((tmp_path / "results" / "leading-columns-hh-002.json").read_text(encoding="utf-8"))
    assert {(site["method"], site["rank"]) for site in found["sites"]} == {("leading-columns", 2)}
    assert found["parameters"] < cells(tmp_path / "results")["dense.json"][1]


def test_a_method_from_a_plugin_and_a_calibrated_one_are_fine_tuned(text, trained, tmp_path):
    (tmp_path / "toy.py").write_text(TOY, encoding="utf-8")
    tuning = "--optimizer asgd --lr 1 --epochs 1 --streams 4 --bptt 10"
    command = [
        SWEEP[0],
        "--plugin",
        "toy.py",
        "--methods",
        "leading-columns",
        "fisher-auto",
        "--ranks",
        "2",
        "--targets",
        "hh",
    ]
    command += ["--calibrate", "1200", "--tune", tuning, "--model", trained, "--text", text, "--output", tmp_path / "tuned"]
    subprocess.run(in_a_process(command), env=ENVIRONMENT, cwd=tmp_path, check=True)
    names = ("dense", "fisher-auto-hh-002", "leading-columns-hh-002")
    assert list(cells(tmp_path / "tuned")) == [f"{name}.json" for name in names]
    rounded = sl.load(tmp_path / "tuned" / "fisher-auto-hh-002" / "compressed", load_awd_lstm(trained))
    assert any(site.storage for site in sl.find_sites(rounded))
