"""A language model that the recipe stored: the command reads, compresses and times it without any data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_helpers import ENVIRONMENT, RECIPES, TINY, run, run_script

COMMAND = Path(sys.executable).with_name("slimlstm")
TEXT = "a b c d e f g h\nh g f e d c b a\n" * 60


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The folder ``models/tiny`` of a training that went on from its weights, after the runs and their text are gone.

    Each run is stored twice, as one is whose weights are stored before its end.
    """
    place = tmp_path_factory.mktemp("stored")
    for split in ("train", "valid", "test"):
        (place / "text").mkdir(exist_ok=True)
        (place / "text" / f"{split}.txt").write_text(TEXT, encoding="utf-8")
    options = ["--text", place / "text", "--name", "tiny", "--models", place / "models"]
    more = ["--optimizer", "adamw", "--first-epoch", "1", "--start", place / "models" / "tiny"]
    for name, epochs, start in (("run", 1, []), ("more", 3, more)):
        run(place / "text", place / name, *TINY, *start, "--epochs", epochs)
        for _ in range(2):
            assert not run_script(RECIPES / "store_model.py", "--model", place / name, *options)
        for path in (place / name).rglob("*"):
            if path.is_file():
                path.unlink()
    for path in (place / "text").iterdir():
        path.unlink()
    return place / "models" / "tiny"


def slimlstm(folder, *arguments):
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("SLIMLSTM")}
    call = [COMMAND, *map(str, arguments), "--json"]
    found = subprocess.run(call, env=environment, cwd=folder, capture_output=True, check=False, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_the_folder_tells_of_the_training_and_what_rounding_costs(stored):
    written = json.loads((stored / "training.json").read_text(encoding="utf-8"))
    assert written["perplexity"].keys() == {"before", "after"}
    assert written["perplexity"]["after"]["test"] == pytest.approx(written["perplexity"]["before"]["test"], rel=0.05)
    assert written["bytes"] == sum(path.stat().st_size for path in stored.glob("*.safetensors")) > 0
    assert written["training"]["result"]["perplexity"]
    assert [entry["epoch"] for entry in written["training"]["log"]] == [1, 2]
    (before,) = written["training"]["earlier"]
    assert [entry["epoch"] for entry in before["log"]] == [0]
    assert {path.suffix for path in stored.iterdir()} == {".safetensors", ".json", ".txt", ".md"}


def test_inspect_lists_its_matrices(stored, tmp_path):
    shapes = {site["site"]: site["shape"] for site in slimlstm(tmp_path, "inspect", stored)["sites"]}
    assert shapes.keys() == {f"lstms.{layer}.weight_{kind}_l0" for layer in range(3) for kind in ("ih", "hh")}
    assert shapes["lstms.1.weight_hh_l0"] == [48, 12]


def test_compress_makes_it_smaller_and_bench_times_both(stored, tmp_path):
    report = slimlstm(tmp_path, "compress", stored, "--rank", "2", "--storage", "int8", "-o", "small")
    assert all(site["rank"] == 2 for site in report["sites"])
    assert report["lstm"]["bytes_after"] < report["lstm"]["bytes_before"]
    short = ("--steps", "3", "--batch", "1")
    for how in (("--rank", "2"), ("--compressed", tmp_path / "small")):
        layers = slimlstm(tmp_path, "bench", stored, *how, *short)["layers"]
        assert [layer["name"] for layer in layers] == [f"lstms.{index} layer 0" for index in range(3)]
        assert all("slimlstm compressed" in layer["candidates"] for layer in layers)
