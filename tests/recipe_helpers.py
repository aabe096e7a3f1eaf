"""Runs of recipes/language_model.py on a tiny text, and what they leave behind."""

import gc
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE = RECIPES / "language_model.py"
TINY = ("--embedding", "8", "--hidden", "12", "--streams", "4", "--bptt", "10")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def in_a_process(command):
    """Return the words with which the operating system runs a script and its arguments."""
    return [sys.executable, *map(str, command)]


def run_script(path, *arguments):
    """Run a script on one thread in this process, since most run for less time than Python needs to start.

    Returns:
        The message or number that the script passed to ``sys.exit``, or None.
    """
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        torch.set_num_threads(1)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        finally:
            torch.set_num_threads(threads)
            gc.collect()  # releases the script's locks
    return None


def command(text, output, *options):
    return [RECIPE, "--text", text, "--output", output, *options]


def run(text, output, *options):
    assert not run_script(*command(text, output, *options))
    return log_of(output)


def log_of(output):
    """The epochs without their seconds."""
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def outcome(output):
    """Everything that a run leaves behind, without times."""
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    # A file that replaces another one has part of its digest in its name.
    names = {
        path: Path(re.sub(r"-[0-9a-f]{16}(?=\.)", "", str(path.relative_to(output))))
        for path in output.rglob("*.safetensors")
        if not path.name.startswith(".")  # A killed run may leave a draft.
    }
    weights = {name: load_file(path) for path, name in names.items()}
    assert len(weights) == len(names)
    return weights, log_of(output), result["perplexity"], (output / "vocab.txt").read_text(encoding="utf-8")


def assert_same(found, expected):
    assert found[1:] == expected[1:]
    assert found[0].keys() == expected[0].keys()
    for name, tensors in expected[0].items():
        assert found[0][name].keys() == tensors.keys()
        assert not [key for key, tensor in tensors.items() if not torch.equal(found[0][name][key], tensor)]


def run_and_kill(text, output, *options):
    """Kill the run as soon as it has written a checkpoint, during an epoch or at its end."""
    process = subprocess.Popen(in_a_process(command(text, output, *options)), env=ENVIRONMENT)
    until = time.monotonic() + 60.0
    while not (output / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (output / "result.json").exists()
