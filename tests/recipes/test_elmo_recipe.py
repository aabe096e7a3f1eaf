"""The program that trains ELMo's language model: it learns both ways, and survives kill -9."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from recipe_helpers import ENVIRONMENT, RECIPES, in_a_process, run_script
from safetensors.torch import load_file

from paper.characters import characters_of
from paper.elmo_files import load_bilm
from slimlstm import SlimLSTMError

pytest.importorskip("h5py")
RECIPE = RECIPES / "elmo.py"
OPTIONS = ("--size", "tiny", "--tokens", "60", "--lr", "0.02", "--dropout", "0", "--epochs", "4")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences in which every word follows from the one before, and from the one behind."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    for split, lines in (("train", 300), ("valid", 30)):
        starts = torch.randint(7, (lines,), generator=generator).tolist()
        sentences = [" ".join(f"w{(start + step) % 7}" for step in range(6)) + " ." for start in starts]
        (folder / f"{split}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return folder


def command(text, output, *options):
    return [RECIPE, "--text", text, "--output", output, *OPTIONS, *options]


def outcome(output):
    log = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for entry in log:
        entry.pop("seconds")
    checkpoint = load_file(output / "checkpoint.safetensors")
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    return checkpoint, log, result["perplexity"]


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    assert not run_script(*command(text, output, "--samples", "5"))
    return output


def test_training_learns_the_text_both_ways(trained):
    """What is not known is the first word, one of 7, in one of 8 predictions: 0.24 nats a prediction, and no more."""
    losses = [entry["valid_loss"] for entry in outcome(trained)[1]]
    assert losses[-1] < losses[0]
    assert losses[-1] < 0.6


def test_the_result_is_an_official_model(trained):
    activations, _ = load_bilm(trained)(characters_of([["w1", "w2"]]))
    assert activations.shape == (3, 1, 2, 32)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_run_ends_with_the_same_files(text, trained, tmp_path):
    parts = command(text, tmp_path, "--samples", "5", "--checkpoint-seconds", "0")
    process = subprocess.Popen(in_a_process(parts), env=ENVIRONMENT)
    until = time.monotonic() + 60.0
    while not (tmp_path / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not run_script(*command(text, tmp_path, "--samples", "5"))
    found, expected = outcome(tmp_path), outcome(trained)
    assert found[1:] == expected[1:]
    assert not [name for name, tensor in expected[0].items() if not torch.equal(found[0][name], tensor)]


def test_another_setting_is_refused(text, trained, tmp_path):
    assert not run_script(*command(text, tmp_path, "--max-minutes", "0"))
    with pytest.raises(SlimLSTMError, match="seed=1, not 2; use that setting, or name another output folder"):
        run_script(*command(text, tmp_path, "--seed", "2"))
