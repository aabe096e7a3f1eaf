"""Streaming: one step at a time with a carried state, for layers and for a cell in your own loop."""

import torch
from torch import nn

import slimlstm as sl
from slimlstm.bench import compare

torch.manual_seed(0)
dense = nn.LSTM(64, 256, num_layers=2)
layers = sl.LowRankLSTM.from_dense(dense)
sl.compress_(nn.ModuleDict({"layers": layers}), sl.LowRank(rank=32, storage="int8"))

stream, state, steps = torch.randn(100, 1, 64), None, []
with torch.no_grad():
    for x in stream:
        out, state = layers(x[None], state)  # [1, B, H], (h, c)
        steps.append(out)
    at_once = layers(stream)[0]
error = float((torch.cat(steps) - at_once).abs().max())
print(f"100 steps one by one differ from all at once by {error:.1e}")
assert error < 1e-4
# Random weights lose much by truncation; trained ones lose little.
print("two layers, one step:", compare(dense, layers, stream[:1], threads=1, seconds=0.3))


class Detector(nn.Module):
    """A cell that is called step by step; returns a score [B] and the state."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(64, 256), nn.Linear(256, 1)

    def forward(self, x, state=None):
        h, c = self.cell(x, state)
        return self.head(h)[:, 0], (h, c)


detector = Detector()
sl.compress_(detector, sl.LowRank(rank=32))
assert isinstance(detector.cell, sl.LowRankLSTMCell)
state = None
with torch.no_grad():
    for x in stream:
        score, state = detector(x, state)
print(f"the cell's score after 100 steps: {float(score):.4f}")
