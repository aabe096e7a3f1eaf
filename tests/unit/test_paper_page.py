"""The page about the reproduction: its tables, its verdicts, and results that no clean commit made."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest

from paper.page.document import CLAIMS, Document
from paper.page.results import ResultFolder
from paper.page.sources import Sources
from paper.page.tables import write_tables
from slimlstm import SlimLSTMError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path):
    """Made-up results of everything that the page shows, beside stored ones on Penn Treebank."""
    folder = tmp_path / "results"
    shutil.copytree(ROOT / "results" / "ptb_untuned", folder / "ptb_untuned", ignore=shutil.ignore_patterns("*int8*"))
    shutil.copy(ROOT / "results" / "dirty.json", folder)
    origin = {"provenance": {"commit": "abc", "processor": "a processor"}}
    control = {"perplexity": {"valid": 9.0, "test": 170.25}, "parameters": 12_000_000, "epochs": 8}
    control["config"] = {"optimizer": "adamw", "lr": 0.001}
    cell = {"perplexity": 70.0, "parameters": 20_000_000}
    trained = {
        **{"sizes": {"embedding_size": 400, "hidden_size": 650}, "parameters": 30_000_000, "epochs": 5, "seconds": 600.0},
        "config": {"corpus": "wikitext-2", "optimizer": "adamw", "dtype": "bfloat16", "dropout": 0.5, "device": "cpu"},
    }
    matrices = [
        (method, target, rank) for method in ("svd", "semi-nmf", "prune") for target in ("hh", "ih") for rank in (10, 50)
    ]
    numbers = {"l1": 1.0, "l1_std": 0.5, "l1_spread": 2.0, "nuclear": 3.0, "layer": 0}
    norms = {
        "rows": [
            {"method": method, "target": target, "rank": rank, **numbers}
            for method, target, rank in [("dense", "hh", 0), ("dense", "ih", 0), *matrices]
        ],
        "spectra": [
            {"target": target, "layer": 0, "singular_values": [2.0, 1.0], "energy": {"10": 0.25}} for target in ("hh", "ih")
        ],
    }
    speed = {
        "scope": "layers",
        **{"steps": 35, "batch": 20, "faster": {"rank 10": {"fused": 3.5, "plain PyTorch": 1.75}}},
    }
    task = {"label": "subset: 10 of 20 pairs", "limit": None, "metric": "accuracy"}
    of_task = {
        f"task_snli/{cell[0]}{'' if cell[0] == 'dense' else f'-{cell[1]}-{cell[2]:03d}'}-seed{seed}": {
            **{**task, "method": cell[0], "target": cell[1], "rank": cell[2], "seed": seed},
            **{"scores": {"accuracy": score + seed}, "examples": 100},
            "parameters": {"model": {"before": 100, "after": 100 if cell[0] == "dense" else 75}},
            "seconds": {"compress": 200.0, "evaluate": 400.0, "seeds": 2},
        }
        for cell, score in {
            ("dense", "none", 0): 79.0,
            ("svd", "hh", 4): 59.0,
            ("svd", "hh", 8): 69.0,
            ("svd", "ih", 4): 39.0,
            ("prune", "hh", 4): 64.0,
            ("prune", "hh", 8): 72.0,
        }.items()
        for seed in (0, 2)
    }
    paper_tuned = {"dense": 64.0, "svd-hh-010": 63.5, "prune-hh-010": 65.0}
    over_seeds = {**task, "scores": {"accuracy": {"mean": 80.0, "standard_deviation": 1.41}}}
    over_seeds["seeds"] = [{"seed": seed, "seconds": 1800.0} for seed in (0, 2)]
    elmo = {
        **{"options": {"lstm": {"dim": 512, "projection_dim": 128}}, "parameters": {"bilm": 3_000_000}, "epochs": 3},
        **{"config": {"corpus": ["wikitext-2"], "device": "cpu"}, "tokens": 2_000_000, "vocabulary": 33_000},
        **{"seconds": 600.0, "perplexity": {"valid": 150.0}},
    }
    for name, result in {
        **of_task,
        "task_snli/trained-elmo": over_seeds,
        "task_snli/latency": {
            part: {"svd, hh, 4": {"milliseconds": [1.0, 2.0, 3.0], "faster": 2.5, "parameters": {"after": 1_500_000}}}
            for part in ("elmo", "model")
        },
        "elmo_trained": elmo,
        "elmo_norms": norms,
        "ptb_untuned/int8": {**cell, "bytes": 36_000_000},
        "ptb_controls/ptb-tensor-train": control,
        "ptb_speed": {"rows": [speed]},
        "wikitext2_untuned/dense": {"perplexity": 66.0, "parameters": 30_000_000},
        "wikitext2_untuned/svd-hh-010": cell,
        "wikitext2_untuned/svd-ih-010": {**cell, "perplexity": 90.0},
        "wikitext2_untuned/fisher-ih-400": {**cell, "parameters": 30_000_000},
        "wikitext2_untuned/fisher-auto-hh-010": {**cell, "perplexity": 67.0, "bytes": 80_000_000},
        "wikitext2_trained": trained,
        "wikitext2_curve/result": {**trained, "epochs": 2, "perplexity": {"valid": 205.0, "test": 195.5}},
        **{
            f"wikitext2_fine_tuned/{name}": {
                **{**cell, "perplexity": {"test": perplexity}, "epochs": 1},
                "config": {"optimizer": "asgd", "lr": 5.0, "dropout": 0.6},
            }
            for name, perplexity in {**paper_tuned, "fisher-auto-hh-010": 62.5}.items()
        },
        "wikitext2_norms": norms,
    }.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result | origin), encoding="utf-8")
    epochs = [
        {"epoch": epoch, "train_loss": math.log(500.0), "valid_perplexity": valid, "averaged": averaged, "seconds": seconds}
        for epoch, valid, averaged, seconds in ((0, 310.25, False, 300.0), (1, 205.0, True, 630.0))
    ]
    log = folder / "wikitext2_curve" / "log.jsonl"
    log.write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs), encoding="utf-8")
    return folder


def sources_of(results, tmp_path, **options):
    printed = json.loads((ROOT / "results" / "printed.json").read_text(encoding="utf-8"))
    return Sources(ResultFolder(results, **options), printed, tmp_path / "paper", "paper")


def page_of(results, tmp_path, **options):
    return Document(sources_of(results, tmp_path, **options), heatmaps=tmp_path).text()


def test_tables_have_the_numbers_of_the_results(results, tmp_path):
    lines = page_of(results, tmp_path).splitlines()
    for line in (
        "| TT-LSTM | 8 epochs, adamw 0.001 | 12.00M | 48.0 | 170.25 | 12M | 168.6 |",
        "| int8, this library |  | 20.00M | 36.0 | 70.00 |  |  |",
        "| LSTM layers | 35 | 20 | 10 | 3.50x | 1.75x | 2.13x |",
        "| 1 | 500.0 | 310.2 | last | 5 |",
        "| 2 | 500.0 | 205.0 | averaged | 10 |",
        "| target | rank | MB | svd | fisher | fisher-auto | svd, tuned | fisher, tuned | fisher-auto, tuned |",
        "| hh | 10 | 80.0 | 70.00 |  | 67.00 | 63.50 |  | 62.50 |",
        # (70 - 66) / 66 of the perplexity for a third of the parameters; where none is saved there is no E(r).
        "| svd | hh | 10 | 20.00M | 70.00 | 99.92 | 0.182 | 62.49 |",
        "| svd | hh | 10 | 63.50 |  | -0.057 |  |",
        "| fisher | ih | 400 | 30.00M | 70.00 |  |  |  |",
        # (80 - 60) / 80 and (80 - 70) / 80 for a quarter of the parameters: 1 and 0.5, mean 0.75.
        "| svd | hh | 60.00 | 70.00 | 70.00 | 65.00 | 0.75 | 87.27 | 88.46 | 88.46 | 88.18 | 0.01 |",
        "| SNLI | ESIM + ELMo | svd, hh, 4 | 1.50M | 2.00 | 2.50x |",
        "| svd | ih | 40.00 |  | 40.00 | 40.00 | 2.00 | 78.15 | 88.48 | 88.48 | 86.77 | 0.06 |",
    ):
        assert line in lines
    assert sum(line.startswith("| svd | hh | 50 |") for line in lines) == 1, "no row for cells neither printed nor run"


def test_verdicts_count_comparisons(results, tmp_path):
    page = page_of(results, tmp_path)
    assert "\n    - WikiText-2: **holds** (1 of 1 comparison)\n    - SNLI: **holds** (1 of 1 comparison)\n" in page
    # At a score of four fifths on a hundred examples the standard error is four.
    assert "SNLI: **does not hold** (0 of 1 comparison); below the score's standard error of 4.00: 1 of 2" in page
    assert "WikiText-2: **holds in part** (1 of 2 comparisons)" in page
    assert "    - WikiText-2: not measured; fine-tuned **holds** (1 of 1 comparison)" in page.splitlines()


def test_the_claims_come_first_as_one_table(results, tmp_path):
    lines = page_of(results, tmp_path).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    assert lines[first - 2] == "## The claims, from our numbers alone"
    assert lines[first] == "| claim | Penn Treebank | WikiText-2 | SNLI | ELMo |"
    rows = [line.strip("| ").split(" | ") for line in lines[first + 2 : first + 7]]
    assert [row[0] for row in rows] == list(CLAIMS)
    assert rows[0][2:] == ["holds", "holds", "-"]
    assert rows[4] == [rows[4][0], "not measured", "holds in part", "-", "-"]


def test_commands_have_the_sum_of_their_hours(results, tmp_path):
    lines = page_of(results, tmp_path).splitlines()
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (results / "ptb_untuned").glob("*.json")]
    hours = sum(sum(one["seconds"].values()) for one in found if "seconds" in one) / 3600
    (line,) = (line for line in lines if line.startswith("| `recipes/sweep.py` |"))
    assert line.endswith(f"| {hours:.1f} |")
    assert "a processor" in line
    (norms,) = (line for line in lines if line.startswith("| `recipes/norms.py` |"))
    assert norms == "| `recipes/norms.py` | a processor | 2 | - |"
    # Twelve cells of 600 s for two seeds at once, and two trainings of half an hour.
    (tasks,) = (line for line in lines if line.startswith("| `recipes/tasks.py` |"))
    assert tasks == "| `recipes/tasks.py` | a processor | 14 | 2.0 |"


def test_trainings_are_described(results, tmp_path):
    page = page_of(results, tmp_path)
    baseline = "ESIM + ELMo 80.00 ± 1.41 (printed 88.5). Means of 2"
    assert f"accuracy %. Trained on 10 of 20 pairs. Not compressed: {baseline}" in page
    assert (
        "- ELMo: 3.00M parameters (512 cells, projected to 128; the paper's: 4096 and 512), trained on wikitext-2" in page
    )
    assert (
        "Fine-tuned, 2 of 48 cells have been run, each for 1 epoch by averaged SGD (rate 5) with dropout at 0.6 of "
        "the published rates.\n" in page
    )
    assert "in 10 minutes on cpu (a processor). Its test perplexity is 195.50." in page
    assert "has 30.00M parameters (embedding 400, hidden 650; the paper's: 400, 1150) and was trained" in page
    assert "on wikitext-2 for 5 epochs by AdamW with one cycle in bfloat16, with dropout at 0.5" in page
    assert "10 minutes on cpu (a processor). It has a test perplexity of 66.00" in page


def test_a_training_that_went_on_from_stored_weights_has_all_its_epochs(results, tmp_path):
    path = results / "wikitext2_trained.json"
    trained = json.loads(path.read_text(encoding="utf-8"))
    trained["config"]["first_epoch"] = 4
    path.write_text(json.dumps(trained), encoding="utf-8")
    page = page_of(results, tmp_path)
    assert "for 9 epochs by AdamW with one cycle in bfloat16. The last 5 had dropout at 0.5 of the published rates" in page
    assert "and took 10 minutes on cpu (a processor). It has a test perplexity of 66.00" in page


def test_missing_results_are_named(results, tmp_path):
    lines = page_of(results, tmp_path).splitlines()
    assert (
        "- Not run: hh as SVD factors of rank 10, fine-tuned; int8, PyTorch's dynamic quantisation; a smaller dense "
        "AWD-LSTM; SST-5; SQuAD v1.1." in lines
    )
    missing = "run; missing, of the 12 that the paper prints: semi-nmf hh 10, semi-nmf hh 400, semi-nmf ih 10"
    assert sum(missing in line for line in lines) == 1
    shutil.rmtree(results / "wikitext2_untuned")
    assert any(line.startswith("- Not run: WikiText-2; hh as") for line in page_of(results, tmp_path).splitlines())


def test_every_part_writes_its_tables_and_pictures(results, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Sources, "draw", lambda _sources, function, name, *_data, **_options: drawn.append(name))
    sources = sources_of(results, tmp_path)
    Document(sources, heatmaps=tmp_path).write_parts()
    pictures = ["ptb-perplexity", "wikitext2-perplexity", "wikitext2-norms", "wikitext2-spectra", "elmo-norms"]
    assert sorted(drawn) == sorted([*pictures, "elmo-spectra"])
    assert {path.name for path in sources.pictures.iterdir()} == {
        f"{name}.{ending}" for name in ("ptb", "wikitext2", "task-snli") for ending in ("csv", "tex")
    }


def store(folder, name, commit):
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"perplexity": 66.0, "provenance": {"commit": commit}}), encoding="utf-8")
    return path


@pytest.mark.parametrize("commit", ["0123456789ab-dirty", None])
def test_results_that_no_clean_commit_made_are_refused(commit, tmp_path):
    path = store(tmp_path, "ptb_untuned/dense", commit)
    with pytest.raises(SlimLSTMError, match=r"dense.json names the commit .*, not a clean one.*--allow-dirty"):
        ResultFolder(tmp_path).load("ptb_untuned/dense")
    allowed = ResultFolder(tmp_path, allow_dirty=True)
    assert allowed.load("ptb_untuned/dense")["perplexity"] == 66.0
    assert allowed.marked
    # Old ones are known by their content: a result that is made again with uncommitted changes is refused, too.
    known = {"ptb_untuned/dense.json": hashlib.sha256(path.read_bytes()).hexdigest()}
    (tmp_path / "dirty.json").write_text(json.dumps(known), encoding="utf-8")
    old = ResultFolder(tmp_path)
    assert old.load("ptb_untuned/dense")
    assert old.marked
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(SlimLSTMError, match="not a clean one"):
        ResultFolder(tmp_path).load("ptb_untuned/dense")


def test_a_result_of_a_clean_commit_is_not_marked(tmp_path):
    store(tmp_path, "ptb_untuned/dense", "0123456789ab")
    folder = ResultFolder(tmp_path)
    assert folder.load("ptb_untuned/dense")
    assert (folder.commits, folder.marked) == ({"0123456789ab"}, False)
    assert folder.load("ptb_untuned/none") is None


def test_marks_follow_the_numbers_of_old_results(results, tmp_path):
    path = results / "ptb_untuned" / "svd-ih-010.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["provenance"]["commit"] += "-dirty"
    path.write_text(json.dumps(stored), encoding="utf-8")
    known = {"ptb_untuned/svd-ih-010.json": hashlib.sha256(path.read_bytes()).hexdigest()}
    (results / "dirty.json").write_text(json.dumps(known), encoding="utf-8")
    page = page_of(results, tmp_path)
    assert f"| svd | ih | 10 | 15.39M | {stored['perplexity']:.2f} † | 462.19 |" in page
    assert page.count("† The checkout had uncommitted changes") == 1
    (results / "dirty.json").unlink()
    with pytest.raises(SlimLSTMError, match="names the commit"):
        page_of(results, tmp_path)
    assert "| svd | ih | 10 | 15.39M | " in page_of(results, tmp_path, allow_dirty=True)


def test_csv_has_plain_numbers_and_latex_daggers(tmp_path):
    write_tables(tmp_path, "table", ("method", "perplexity"), [("svd", "58.30 †"), ("dense", None)], left=1)
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == "method,perplexity\nsvd,58.30\ndense,\n"
    assert "svd & 58.30$^\\dagger$ \\\\\n" in (tmp_path / "table.tex").read_text(encoding="utf-8")
