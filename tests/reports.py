"""A report with every part, and a search beside it, for tests of its page."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributions import Categorical

from slimlstm import LowRank, compress_


@dataclass(frozen=True)
class Tried:
    label: str
    bytes: int
    metric: float
    accepted: bool
    latency: float | None = None


@dataclass(frozen=True)
class Trials:
    dense: Tried
    trials: list[Tried]
    best: Tried | None
    limit: str = "perplexity at most 51.4"
    worst: float | None = 51.4
    metric_name: str = "perplexity"
    higher_is_better: bool = False


class Characters(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 12)
        self.lstm = nn.LSTM(12, 24, num_layers=2)
        self.output = nn.Linear(24, 16)

    def forward(self, x):
        return self.output(self.lstm(self.embedding(x))[0])


def trials(**changes):
    """A search with an accepted, a refused, a chosen and a failed plan."""
    best = Tried("fisher int8, keep 0.5", 1_900_000, 51.0, True, 1.5e-3)
    others = [
        Tried("int8", 3_650_000, 50.4, True, 2e-3),
        Tried("svd <0.25>", 980_000, 71.0, False, 1.1e-3),
        Tried("int3", 400_000, float("inf"), False, 1.0e-3),
    ]
    return Trials(
        **{"dense": Tried("dense", 14_389_248, 50.36, True, 6e-3), "trials": [best, *others], "best": best} | changes
    )


def report_with_everything():
    """A report with factors, spectra, predictions and measured losses, and a search."""
    batches = [torch.randint(16, (5, 4)) for _ in range(3)]
    report = compress_(
        Characters().eval(),
        LowRank("fisher", rank=4, storage="int8"),
        batches=batches,
        loss=lambda model, batch: Categorical(logits=model(batch)),
    )
    return replace(report, loss_before=2.5, loss_after=2.5 + 1.1 * report.predicted_rise), trials()
