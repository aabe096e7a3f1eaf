"""Fine-tuning: a model that was compressed too far recovers by learning from the dense model."""

import copy

import torch
from torch import nn

import slimlstm as sl
from slimlstm.tuning import distillation


class Forecaster(nn.Module):
    """Predicts the next value at every step of series [B, T]; returns predictions [B, T]."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 64, batch_first=True), nn.Linear(64, 1)

    def forward(self, series):
        return self.head(self.lstm(series[:, :, None])[0])[:, :, 0]


def waves():
    """Return sums [32, 61] of two sines with random periods and phases."""
    period, phase = 8 + 24 * torch.rand(2, 32, 1), 6.3 * torch.rand(2, 32, 1)
    return (6.3 * torch.arange(61) / period + phase).sin().sum(0)


def losses(model, series):
    return (model(series[:, :-1]) - series[:, 1:]).square()


@torch.no_grad()
def metric(model):
    return float(losses(model, held_out).mean())


torch.manual_seed(0)
held_out, batches = waves(), [waves() for _ in range(40)]
dense = Forecaster()
sl.finetune(dense, batches, losses, steps=150, lr=1e-2)  # finetune trains dense models too

small = copy.deepcopy(dense)
sl.compress_(small, sl.LowRank(rank=4, target="hh"))
before = metric(small)
# The dense model's outputs are the targets. They are no logits, so there is no temperature.
teach = distillation(dense, lambda model, series: model(series), temperature=None)
history = sl.finetune(small, batches, teach, steps=100, lr=3e-3, validate=metric, validations=4)
sl.compress_(small, sl.Quantize("bfloat16"))  # after training, so that weights are rounded only once
print("error on held-out series, by steps:", {step: round(error, 4) for step, error in history.validations})
print(f"dense {metric(dense):.4f}, compressed {before:.4f}, tuned and rounded {metric(small):.4f}")
assert metric(small) < before
