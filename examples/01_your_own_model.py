"""Your own model: train it as usual, compress it in one call, save it and load it again."""

import tempfile

import torch
from torch import nn

import slimlstm as sl


class Forecaster(nn.Module):
    """Predicts the next value at every step of series [B, T]; returns predictions [B, T]."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, 1)

    def forward(self, series):
        return self.head(self.lstm(series[:, :, None])[0])[:, :, 0]


def waves():
    """Return sums [32, 61] of two sines with random periods and phases."""
    period, phase = 8 + 24 * torch.rand(2, 32, 1), 6.3 * torch.rand(2, 32, 1)
    return (6.3 * torch.arange(61) / period + phase).sin().sum(0)


def losses(model, series):
    return (model(series[:, :-1]) - series[:, 1:]).square()


torch.manual_seed(0)
model = Forecaster()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(150):
    optimizer.zero_grad()
    losses(model, waves()).mean().backward()
    optimizer.step()
del optimizer  # it would go on training the old weights

held_out, batches = waves(), [waves() for _ in range(8)]
with torch.no_grad():
    before = losses(model, held_out).mean()
report = sl.compress_(model, sl.LowRank("fisher", keep=0.1), batches=batches, loss=losses)
print(report)
with torch.no_grad():
    print(f"error of the forecast: {before:.4f} before, {losses(model, held_out).mean():.4f} after")

with tempfile.TemporaryDirectory() as folder:
    sl.save(model, folder)
    loaded = sl.load(folder, Forecaster())
assert torch.equal(loaded(held_out), model(held_out))
