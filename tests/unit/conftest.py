"""Run the command in this process, on a small AWD-LSTM."""

import json
import sys

import pytest
import torch
from command import CONFIG, RANKS, TEXT, WORDS
from safetensors.torch import save_file
from torch import nn

from slimlstm import cli
from slimlstm.demo import tour as demo
from slimlstm.demo.awd_lstm import AWDLSTM


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: its exit status and what it wrote to standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["slimlstm", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def run_json(run):
    """What a command gives with --json, which has to be all of its standard output."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    def run_json(*arguments):
        status, out, err = run(*arguments, "--json")
        assert status == 0, err
        return json.loads(out, parse_constant=refuse)

    return run_json


@pytest.fixture
def folder(tmp_path):
    """An AWD-LSTM as it is stored, its vocabulary beside it, and a text."""
    folder = tmp_path / "dense"
    folder.mkdir()
    state = AWDLSTM(CONFIG).state_dict()
    del state["decoder.weight"]
    save_file(state, folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def tiny_demo(monkeypatch):
    """The tour over a small untrained model and random text: the model and the text that it is measured on."""
    model, tokens = AWDLSTM(CONFIG).eval(), torch.randint(len(WORDS), (800,))
    # Logits of any size, so that perplexities differ visibly.
    nn.init.normal_(model.embedding.weight)
    monkeypatch.setattr(demo, "RANKS", RANKS)
    monkeypatch.setattr(demo, "embedded_model", lambda: model)
    monkeypatch.setattr(demo, "held_out_tokens", lambda: tokens)
    monkeypatch.setattr(demo, "_TOKENS", 400)
    monkeypatch.setattr(demo, "_STEPS", 8)
    monkeypatch.setattr(demo, "_LATENCY_SECONDS", 0.005)
    return model, tokens[:400]
