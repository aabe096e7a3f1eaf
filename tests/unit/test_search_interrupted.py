"""Searches that Ctrl-C ends at random moments: the model is as it was, and the best plan so far is on disk."""

import contextlib
import copy
import json
import signal
import threading
import time

import pytest
import torch
from torch import nn

import slimlstm as sl
from slimlstm.search import find_smallest

MOMENTS = 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, 2), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@contextlib.contextmanager
def interrupt_after(seconds):
    """Raises KeyboardInterrupt in the block, as Ctrl-C does, if it still runs then."""
    armed = True

    def interrupt(number, frame):
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def condition(model):
    """Everything about a model and PyTorch that a search must leave as it was."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    modes = [(type(m), m.training) for m in model.modules()]
    trained = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    switches = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().sum()
    return hooks, modes, trained, sorted(vars(model)), switches


@pytest.fixture(scope="module")
def search():
    """Searches with an output, and the time that one takes."""
    torch.manual_seed(0)
    net = Net().eval()
    batches, x = [torch.randn(6, 3, 8) for _ in range(5)], torch.randn(20, 4, 8)
    expected = net(x).detach()

    @torch.no_grad()
    def error(model):
        return float((model(x) - expected).norm() / expected.norm())

    def loss(model, batch):
        return (model(batch) - 0.1).square()

    def search(output, progress=None):
        options = {"batches": batches, "loss": loss, "evaluations": 6, "output": output, "progress": progress}
        return find_smallest(net, error, better="lower", at_most=0.1, **options)

    search(None)
    began = time.monotonic()
    search(None)
    return net, error, search, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread alone")
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_at_a_random_moment(search, tmp_path, moment):
    net, error, run, seconds = search
    output, accepted, found = tmp_path / "search.json", [], None
    state, before = copy.deepcopy(net.state_dict()), condition(net)
    fraction = float(torch.rand((), generator=torch.Generator().manual_seed(moment)))
    with contextlib.suppress(KeyboardInterrupt), interrupt_after(fraction * seconds):
        found = run(output, lambda trial, left: accepted.append(trial) if trial.accepted else None)
    assert condition(net) == before
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] in ([], ["search.json"])
    if accepted or found is not None:
        stored = json.loads(output.read_text(encoding="utf-8"))["best"]
        smallest = min(accepted, key=lambda trial: trial.bytes, default=None)
        assert smallest is None or stored["bytes"] <= smallest.bytes
        model = copy.deepcopy(net)
        calibration = sl.calibrate(net, [torch.randn(6, 3, 8)], lambda model, batch: model(batch).square())
        sl.compress_(model, sl.Plan.from_dict(stored["plan"]), calibration=calibration)
        assert error(model) < 1.0
    if found is not None:
        assert found.plan == sl.Plan.from_dict(stored["plan"])
        assert error(found.model) == pytest.approx(found.best.metric, rel=1e-5)
