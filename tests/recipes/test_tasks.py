"""The recipe that trains task models and compresses the ELMo inside."""

import json

import pytest
import torch
from paper_helpers import MODELS, as_file, bilm, examples, made
from recipe_helpers import RECIPES, run_script
from safetensors.torch import load_file

from paper import task_data
from paper.elmo_files import save_bilm
from paper.tasks import losses, predictions, scores
from slimlstm import SlimLSTMError

RECIPE = RECIPES / "tasks.py"


@pytest.mark.parametrize("task", MODELS)
def test_ten_examples_are_learnt_by_heart(task):
    model, batches = made(task, has_elmo=False)
    (batch,) = batches(examples(task), 1000)
    assert len(batch.examples) == 10
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        loss = losses(model.train(), batch).mean()
        if loss < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = scores(predictions(model.eval(), batch), [batch])
    assert found.get("accuracy", found.get("exact_match")) == 100.0


GRID = ("--ranks", 2, "--methods", "svd", "prune", "fisher", "--targets", "hh", "--calibration", 6)


def run(task, workplace, *options, elmo=True):
    """Run the recipe on the workplace's data, and return the folder of results."""
    output = workplace / f"results-{task}"
    command = [RECIPE, "--task", task, "--data", workplace / task, "--output", output, "--runs", workplace / "runs"]
    command += ["--batch", 8, "--lr", 0.01, "--epochs", 2, "--seeds", 1, 2, *options]
    command += ["--elmo", workplace / "elmo"] if elmo else []
    assert not run_script(*command)
    return output


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Made-up data for every task and a tiny ELMo."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in MODELS:
        (folder / task).mkdir()
        for split in task_data.SOURCES[task]:
            content = as_file(task, examples(task, 24))
            (folder / task / (split + task_data.FORMATS[task].ending)).write_text(content, encoding="utf-8")
    save_bilm(bilm(), folder / "elmo")
    return folder


@pytest.fixture(scope="module")
def trained(workplace):
    return run("sst5", workplace, *GRID)


def test_the_recipe_trains_and_fills_its_table(trained):
    names = ["dense", "svd-hh-002", "prune-hh-002", "fisher-hh-002"]
    expected = [f"{name}-seed{seed}.json" for name in names for seed in (1, 2)]
    assert sorted(path.name for path in trained.iterdir()) == sorted([*expected, "trained-elmo.json"])
    summary = read(trained / "trained-elmo.json")
    accuracies = [seed["scores"]["accuracy"] for seed in summary["seeds"]]
    assert summary["scores"]["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert summary["label"] == "own data: 24 sentences, with the phrases of over three tokens in them 24 examples"
    for seed, accuracy_of_seed in zip((1, 2), accuracies, strict=True):
        assert read(trained / f"dense-seed{seed}.json")["scores"]["accuracy"] == pytest.approx(accuracy_of_seed)
        for name in names[1:]:
            cell = read(trained / f"{name}-seed{seed}.json")
            # Four matrices [4H, P] = [40, 6] become factors, or as many weights.
            assert cell["parameters"]["elmo"]["before"] - cell["parameters"]["elmo"]["after"] == 4 * (240 - 2 * 46)
            assert cell["parameters"]["model"]["before"] == summary["seeds"][0]["parameters"]["model"]
            assert {site["method"] for site in cell["sites"]} == {cell["method"]}
            assert all("_lstms." in site["key"] for site in cell["sites"])
            assert cell["provenance"]["torch"] == torch.__version__


def test_what_is_there_is_not_made_again(workplace, trained):
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*-seed*.json")}
    (trained / "svd-hh-002-seed2.json").unlink()
    run("sst5", workplace, *GRID)
    after = {path: path.stat().st_mtime_ns for path in trained.glob("*-seed*.json")}
    assert before.keys() == after.keys()
    assert [path.name for path in before if before[path] != after[path]] == ["svd-hh-002-seed2.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--lr", 0.02), "is of a run with lr=0.01, not 0.02"), ((*GRID, "--limit", 5), "is of a run with limit=None, not 5")],
)
def test_a_run_with_other_settings_is_not_taken_for_this_one(workplace, trained, options, message):
    with pytest.raises(SlimLSTMError, match=message):
        run("sst5", workplace, *options)


def test_a_run_that_was_ended_goes_on_to_the_same_end(workplace, trained, tmp_path):
    """Ended after its first step and, going on, after its second."""
    runs = tmp_path / "runs"
    for minutes in (0, 0, 5):
        assert not list(runs.glob("*/seed-1/result.json"))
        run("sst5", workplace, "--runs", runs, "--seeds", 1, "--max-minutes", minutes)
    (folder,) = runs.glob("*/seed-1")
    (expected,) = (workplace / "runs").glob("*elmo/seed-1")
    found, whole = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert not [name for name, tensor in whole.items() if not torch.equal(found[name], tensor)]
    assert not [name for name in whole if "bilm" in name]
    logs = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in (folder, expected)]
    for one, other in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


@pytest.mark.parametrize("task", ["snli", "squad"])
def test_the_other_tasks_run_from_end_to_end(workplace, task):
    output = run(task, workplace, "--seeds", 1, "--epochs", 1, "--limit", 7, *GRID)
    cell, summary = read(output / "fisher-hh-002-seed1.json"), read(output / "trained-elmo.json")
    unit = task_data.FORMATS[task].unit
    examined = {"snli": 7, "squad": 8}[task]  # whole paragraphs of two questions
    assert cell["limit"] == f"first {examined} of own data: 24 {unit}"
    assert cell["label"] == summary["label"]
    assert cell["label"].startswith(f"own data: 24 {unit}")
    assert ("held out" in cell["label"]) == (task == "squad")
    assert set(cell["scores"]) == set(summary["scores"]) == {"snli": {"accuracy"}, "squad": {"f1", "exact_match"}}[task]


def test_a_model_without_elmo_is_trained_beside(workplace):
    summary = read(run("squad", workplace, "--seeds", 2, "--epochs", 1, elmo=False) / "trained-plain.json")
    assert summary["seeds"][0]["parameters"]["elmo"] == 0
    assert summary["config"]["elmo"] == "none"


def test_latency_is_told_with_backends(workplace, trained):
    found = read(run("sst5", workplace, "--ranks", 2, "--targets", "hh", "--latency") / "latency.json")
    assert list(found["elmo"]) == list(found["model"]) == ["dense", "dense, kernel", "svd, hh, 2"]
    assert found["elmo"]["dense"]["faster"] == 1.0
    assert found["elmo"]["dense"]["backends"] == {"nn.LSTM": 4}
    assert found["model"]["svd, hh, 2"]["backends"] in (
        {"fused": 4, "nn.LSTM": 2},
        {"dense": 4, "nn.LSTM": 2},
        {"reference": 4, "nn.LSTM": 2},
    )
    assert all(row["rounding_error"] < 1e-4 for part in ("elmo", "model") for row in found[part].values())
