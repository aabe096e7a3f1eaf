"""The README's code runs, and its numbers are the stored ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slimlstm import cli, export_onnx

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(40, 64, num_layers=2, bidirectional=True)
        self.head = nn.Linear(128, 5)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def test_python_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"model": Tagger(), "fresh_dense_model": Tagger(), "dense_model": Tagger()}
    names["example_inputs"] = torch.randn(4, 2, 40)
    names["batches"] = [torch.randn(9, 4, 40) for _ in range(3)]
    compressed = names["model"]
    for code in blocks("python"):
        exec(code, names)  # noqa: S102 (the README's own lines)
    x = torch.randn(3, 2, 40)
    assert torch.equal(names["model"](x), compressed(x))
    assert "lstm.weight_hh_l1_reverse" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if line.startswith("slimlstm")]
)
def test_commands_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(Tagger().state_dict(), "model.safetensors")
    if "model.onnx" in line:
        export_onnx(Tagger(), torch.randn(4, 2, 40), "model.onnx")
    monkeypatch.setattr(sys, "argv", line.partition("#")[0].split())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert re.search(r"lstm\w*(\.weight_hh_l0| layer 0)", capsys.readouterr().out)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake (\w+)", README)
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_numbers_are_the_stored_ones():
    command = [sys.executable, str(ROOT / "recipes" / "readme.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
