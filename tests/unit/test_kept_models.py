"""Passes over batches leave a model, its mode, its state and the caller's batches as they were."""

import copy

import pytest
import torch
from torch import Tensor, nn

import slimlstm as sl
from slimlstm.bench import compare
from slimlstm.calibration.collect import mean_loss


class Model(nn.Module):
    """A model that carries a state from call to call, in one of several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(4, 8), nn.Linear(8, 3)
        self.start()

    def start(self) -> None:
        """Make the first state."""

    def carried(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the state before the first step."""

    def carry(self, x: Tensor, state: tuple[Tensor, Tensor]) -> None:
        """Keep the state after the last step."""

    def forward(self, x):
        y, state = self.lstm(x, self.carried(x))
        self.carry(x, state)
        return self.output(y)


class InAttributes(Model):
    def start(self):
        self.hidden = self.cell = torch.zeros(1, 2, 8)

    def carried(self, x):
        return self.hidden, self.cell

    def carry(self, x, state):
        self.hidden, self.cell = state[0].detach(), state[1].detach()


class InPrivateAttributes(Model):
    def start(self):
        self._state = None

    def carried(self, x):
        return self._state

    def carry(self, x, state):
        self._state = tuple(part.detach() for part in state)


class InAList(Model):
    def start(self):
        self.states = [(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))]

    def carried(self, x):
        return self.states[-1]

    def carry(self, x, state):
        self.states.append(tuple(part.detach() for part in state))


class InPlace(InAttributes):
    def start(self):
        self.hidden, self.cell = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)

    def carry(self, x, state):
        with torch.no_grad():
            self.hidden.copy_(state[0])
            self.cell.copy_(state[1])

    def carried(self, x):
        return self.hidden.clone(), self.cell.clone()


class InBuffers(Model):
    def start(self):
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        self.mean += (x.mean((0, 1)) - self.mean) / self.count
        return super().forward(x - self.mean)


MODELS = (InAttributes, InPrivateAttributes, InAList, InPlace, InBuffers)


def losses(model, batch):
    return model(batch).square()


def some_batches(count=6):
    torch.manual_seed(1)
    return [torch.randn(5, 2, 4) + 3 for _ in range(count)]


def refused(model, batches):
    model.unused = nn.LSTM(4, 4)
    with pytest.raises(sl.SlimLSTMError, match="no batch reached"):
        sl.compress_(model, sl.LowRank("fisher", keep=0.5), batches=batches, loss=losses)
    del model.unused


def stopped(model, batches):
    def interrupted(model, batch):
        if model(batch).shape and batch is not None and next(calls) == 4:
            raise KeyboardInterrupt
        return model(batch).square()

    calls = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        sl.calibrate(model, batches, interrupted)


PASSES = {
    "calibrate": lambda model, batches: sl.calibrate(model, batches, losses),
    "calibrate without a loss": sl.calibrate,
    "mean_loss": lambda model, batches: mean_loss(model, batches, losses),
    "measure_sensitivity": lambda model, batches: sl.measure_sensitivity(model, batches, losses),
    "find_smallest": lambda model, batches: sl.find_smallest(
        model, lambda m: float(losses(m, batches[0]).mean()), better="lower", at_most="90%", evaluations=3
    ),
    "compare": lambda model, batches: compare(model, copy.deepcopy(model), batches[0], seconds=0.01),
    "a refusal": refused,
    "an interrupt": stopped,
}


@pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_state_of_a_model_stays(kind, run):
    model, batches = kind().eval(), some_batches()
    before, numbers = copy.deepcopy(model), copy.deepcopy(batches)
    run(model, batches)
    assert all(torch.equal(*pair) for pair in zip(batches, numbers, strict=True))
    assert set(vars(model)) == set(vars(before))
    for _ in range(2):
        assert torch.equal(model(batches[0]), before(batches[0]))


COMPRESSED = {
    "int4 with inputs": (sl.Quantize("int4"), None),
    "activation, fitted again": (sl.LowRank("activation", rank=2), None),
    "fisher, fitted again": (sl.LowRank("fisher", rank=2), losses),
}


@pytest.mark.parametrize(("config", "loss"), COMPRESSED.values(), ids=COMPRESSED)
@pytest.mark.parametrize("kind", MODELS)
def test_a_compressed_model_starts_as_the_dense_one_did(kind, config, loss):
    """After the calls of calibration it computes what the same matrices do in a model that was never called."""
    model, batches = kind().eval(), some_batches()
    fresh = copy.deepcopy(model)
    report = sl.compress_(model, config, batches=batches, loss=loss)
    sl.compress_(fresh, sl.LowRank("svd", rank=2) if loss or report.sites[0].rank else config)
    fresh.load_state_dict(model.state_dict())
    for batch in batches[:2]:
        assert torch.equal(model(batch), fresh(batch))


def test_equal_weights_have_equal_losses():
    """Each model of a comparison carries a state of its own."""
    model, batches = InAttributes().eval(), some_batches()
    report = sl.compress_(model, sl.LowRank("fisher", rank=4, target="hh"), batches=batches, loss=losses, refit=0)
    assert mean_loss(model, batches, losses) == pytest.approx(report.loss_after, rel=1e-6)


def test_inputs_that_a_model_edits_are_the_same_in_every_pass():
    class Edits(Model):
        def forward(self, x):
            x -= 3
            return super().forward(x)

    model, batches = Edits().eval(), some_batches()
    numbers, plain = copy.deepcopy(batches), Model().eval()
    plain.load_state_dict(model.state_dict())
    for loss in (None, losses):
        found = sl.calibrate(model, batches, loss)
        expected = sl.calibrate(plain, [batch - 3 for batch in numbers], loss)
        for key, moments in found.sites.items():
            torch.testing.assert_close(moments.inputs, expected.sites[key].inputs)
    sl.compress_(model, sl.LowRank("fisher", rank=4), batches=batches, loss=losses)
    assert all(torch.equal(*pair) for pair in zip(batches, numbers, strict=True))


@pytest.mark.parametrize("mode", [True, False])
def test_a_loss_that_changes_the_mode(mode):
    model = Model().train(mode)

    def loss(model, batch):
        model.train(not mode)
        return losses(model, batch)

    sl.calibrate(model, some_batches(2), loss)
    assert {module.training for module in model.modules()} == {mode}
