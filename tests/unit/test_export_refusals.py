"""What ``export_onnx`` refuses in words, and that nothing is written then."""

import pytest
import torch
from torch import nn

from slimlstm import SlimLSTMError
from slimlstm.onnx.export import export_onnx

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


@pytest.mark.parametrize("name", REFUSED)
def test_dtypes_that_cannot_be_checked(name, tmp_path):
    make, inputs, message = REFUSED[name]
    with pytest.raises(SlimLSTMError, match=message):
        export_onnx(make(), inputs, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
