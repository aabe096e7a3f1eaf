"""``export_onnx`` refuses inputs and names in words, and then writes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_files import INPUTS, lstm_parts, save
from torch import nn

from slimlstm import Quantize, SlimLSTMError
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.export import export_onnx
from slimlstm.search import shrink_onnx

pytest.importorskip("onnxscript", reason="PyTorch's exporter needs onnxscript")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
X = torch.zeros(5, 2, 4)


class Cast(nn.Module):
    """An LSTM whose outputs, or a convolution of them, have another dtype."""

    def __init__(self, dtype, convolves=False):
        super().__init__()
        self.lstm, self.dtype = nn.LSTM(4, 8), dtype
        self.conv = nn.Conv1d(8, 3, 1).to(dtype) if convolves else nn.Identity()

    def forward(self, x):
        y = self.lstm(x.float())[0].to(self.dtype)
        return self.conv(y.mT).float() if isinstance(self.conv, nn.Conv1d) else y


REFUSED = {
    "an input in bfloat16": (lambda: Cast(torch.float32), X.bfloat16(), "an example input is of torch.bfloat16"),
    "an input in float8": (lambda: Cast(torch.float32), X.to(torch.float8_e5m2), "an example input is of torch.float8"),
    "a named input": (lambda: Cast(torch.float32), {"x": X.bfloat16()}, "an example input is of torch.bfloat16"),
    "an output in bfloat16": (lambda: Cast(torch.bfloat16), X, "ONNX Runtime cannot run the file"),
    "an LSTM in float16": (lambda: nn.LSTM(4, 8).half(), X.half(), "not torch.float16; convert the model first"),
    "an operator that the engine lacks": (
        lambda: Cast(torch.bfloat16, convolves=True),
        X,
        "ONNX Runtime cannot load the file: .*; nothing was written",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_dtypes_that_cannot_be_checked(name, tmp_path):
    make, inputs, message = REFUSED[name]
    with pytest.raises(SlimLSTMError, match=message):
        export_onnx(make(), inputs, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


NAMES = {
    ".": "no name of a file",
    "folder.onnx": "a folder; name one",
    "..": "no name",
    "taken/model.onnx": "is a file and no",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", ["export_onnx", "compress_onnx", "shrink_onnx", "export", "compress", "shrink"])
def test_names_of_outputs_are_checked_first(door, name, tmp_path, monkeypatch, run):
    """The model, the file and the runs are not even looked at."""
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "taken").write_text("mine")
    node, weights = lstm_parts(np.random.default_rng(0))
    file = save(tmp_path / "model.onnx", [node], weights, node.output)
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 5, 2, INPUTS), np.float32))
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    for work in ("slimlstm.onnx.export.trace", "slimlstm.cli.export.language_model", "slimlstm.onnx.compress.find_lstms"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("work began"))
    calls = {
        "export_onnx": lambda: export_onnx(nn.LSTM(4, 8), X, name),
        "compress_onnx": lambda: compress_onnx(file, Quantize("int8"), name),
        "shrink_onnx": lambda: shrink_onnx(file, name, [{}]),
    }
    words = {
        "export": ["export", "model", "-o", name],
        "compress": ["compress", str(file), "-o", name, "--storage", "int8"],
        "shrink": ["shrink", str(file), "-o", name, "--inputs", "x.npz"],
    }
    if door in calls:
        with pytest.raises(SlimLSTMError, match=NAMES[name] if Path(name).suffix else "no name of a file"):
            calls[door]()
    elif door != "compress" or Path(name).suffix:  # the command also writes a folder
        status, _, err = run(*words[door])
        assert (status, "Traceback" in err, err.startswith("slimlstm: ")) == (1, False, True), err
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
