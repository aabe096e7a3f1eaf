"""ONNX: a compressed model as a plain file for ONNX Runtime, for any length and batch, with its state for streaming."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import slimlstm as sl


class Tagger(nn.Module):
    """Returns scores [T, B, 10] of features [T, B, 40], and the state after the last step."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(40, 128, num_layers=2)
        self.head = nn.Linear(128, 10)

    def forward(self, x, state):
        out, state = self.lstm(x, state)
        return self.head(out), state


torch.manual_seed(0)
model = Tagger().eval()
sl.compress_(model, sl.LowRank(rank=32))


def inputs(steps, batch):
    return torch.randn(steps, batch, 40), (torch.zeros(2, batch, 128), torch.zeros(2, batch, 128))


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tagger.onnx"
    print(sl.export_onnx(model, inputs(5, 2), path))  # axes of size 2 or more stay variable
    session = onnxruntime.InferenceSession(path)

x, (h, c) = inputs(60, 3)
names = [entry.name for entry in session.get_inputs()]
state, pieces = [h.numpy(), c.numpy()], []
for piece in x.split(20):  # a stream: every piece begins with the state after the piece before
    scores, *state = session.run(None, dict(zip(names, [piece.numpy(), *state], strict=True)))
    pieces.append(torch.from_numpy(scores))
with torch.no_grad():
    expected = model(x, (h, c))[0]
error = float((torch.cat(pieces) - expected).abs().max())
print(f"three pieces of 20 steps in ONNX Runtime differ from 60 steps in PyTorch by {error:.1e}")
assert error < 1e-4
