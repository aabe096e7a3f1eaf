"""The smallest or largest keep that a metric allows."""

import copy

import pytest
import torch
from torch import nn

import slimlstm as sl
from slimlstm.search import find_keep


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(24, 24)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def distance(model, dense):
    """How far the recurrent matrices are from the dense ones, which falls as more is kept."""
    lstm = model.lstm if isinstance(model.lstm, nn.LSTM) else model.lstm.to_dense()
    return sum(float((a - b).detach().norm()) for a, b in zip(lstm.parameters(), dense.lstm.parameters(), strict=True))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("evaluations", [3, 6, 9])
def test_the_smallest_keep_that_is_good_enough(net, evaluations):
    before, tried = copy.deepcopy(net.state_dict()), []
    limit = 0.5 * distance(_compressed(net, 0.01), net)
    config = find_keep(
        net,
        sl.LowRank(rank=3),
        lambda model: distance(model, net),
        limit,
        evaluations=evaluations,
        progress=lambda keep, value: tried.append((keep, value)),
    )
    assert len(tried) == evaluations
    assert (config.keep, config.rank) == (min(keep for keep, value in tried if value <= limit), None)
    # Between this keep and the largest that was refused lies where the limit is met, within the promised factor.
    refused = max(keep for keep, value in tried if value > limit)
    assert refused < config.keep <= refused * 100 ** (2.0 ** -(evaluations - 1)) * (1 + 1e-9)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_largest_keep_within_a_budget(net):
    config = find_keep(net, sl.LowRank(keep=1.0), parameters, 0.4 * parameters(net), largest=True, evaluations=8)
    assert (
        parameters(_compressed(net, config.keep)) <= 0.4 * parameters(net) < parameters(_compressed(net, 1.3 * config.keep))
    )


def test_what_cannot_be_found(net):
    for limit, largest, seen in ((-1.0, False, "keep=1.0"), (0.0, True, "keep=0.01")):
        with pytest.raises(sl.SlimLSTMError, match=f"even {seen} does not bring the metric to"):
            find_keep(net, sl.LowRank(keep=1.0), parameters, limit, largest=largest)
    with pytest.raises(sl.SlimLSTMError, match="two evaluations"):
        find_keep(net, sl.LowRank(keep=1.0), parameters, 1.0, evaluations=1)
    with pytest.raises(sl.SlimLSTMError, match="two evaluations"):
        find_keep(net, sl.LowRank(keep=1.0), parameters, 1.0, smallest_keep=0.0)


def _compressed(net, keep):
    model = copy.deepcopy(net)
    sl.compress_(model, sl.LowRank(keep=keep))
    return model
