"""Choosing a rank: by energy, by a budget of bytes, or by a limit of your own metric."""

import copy

from torch.nn.functional import cross_entropy

import slimlstm as sl
from slimlstm.demo.model import embedded_model, held_out_tokens
from slimlstm.evaluate import perplexity

model, tokens = embedded_model(), held_out_tokens()
text, held_out = tokens[:2800].view(4, 10, 70), tokens[6000:7000]
batches = [piece.t() for piece in text]  # [T, B]


def losses(model, batch):
    return cross_entropy(model(batch[:-1])[0].flatten(0, 1), batch[1:].flatten(), reduction="none")


def metric(model):
    return perplexity(model, held_out).perplexity


# The ranks that preserve 90% of the energy, the sum of squared singular values, of every matrix.
report = sl.compress_(copy.deepcopy(model), sl.LowRank(energy=0.9))
print("ranks at 90% of the energy:", {site.key: site.rank for site in report.sites})

# One budget for all matrices is spent where it reduces the loss most; the report compares predicted and measured loss.
calibration = sl.calibrate(model, batches, losses)
report = sl.compress_(
    copy.deepcopy(model), sl.LowRank("fisher", bytes=3_000_000), batches=batches, loss=losses, calibration=calibration
)
print("ranks in 3 MB:", {site.key: site.rank for site in report.sites})
print(report.loss_note)

# The smallest model found whose perplexity is at most 5% worse, with at most seven evaluations of the metric.
found = sl.find_smallest(
    model,
    metric,
    better="lower",
    at_most="5%",
    batches=batches,
    loss=losses,
    calibration=calibration,
    evaluations=7,
    metric_name="perplexity",
)
print(found)
assert found.best.metric <= 1.05 * found.dense.metric
