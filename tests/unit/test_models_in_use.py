"""Models that hold histories, labels beside inputs, interrupts: verbs work or leave everything as it was."""

import copy
import random
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from one_lstm import (
    IN,
    B,
    Carrying,
    H,
    Model,
    Tied,
    snapshot,
    squares,
    x,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import slimlstm
from slimlstm import LowRank, LowRankLSTM, Prune, Quantize, Report, SlimLSTMError, calibrate, compress_, load, save
from slimlstm.calibration.collect import mean_loss
from slimlstm.calibration.observe import forwards_replaced
from slimlstm.modules.graphs import copy_model
from slimlstm.modules.modes import evaluation_mode
from slimlstm.modules.state import kept_state
from slimlstm.search import find_smallest
from slimlstm.tuning.training import prepared


class Holding(nn.Module):
    """Holds the state of its last call in a tuple, a list and a dictionary."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(IN, H), nn.Linear(H, 3)
        self.hidden, self.outputs, self.cache = None, [None], {}

    def forward(self, x):
        out, self.hidden = self.lstm(x)
        self.outputs[0] = self.cache["last"] = out[-1]
        return self.head(out)


def used():
    model = Holding()
    model(x()).sum().backward()
    model.outputs.append(model.outputs)
    return model


HELD = {
    "compress_": lambda folder: compress_(used(), LowRank(rank=2)),
    "calibrate": lambda folder: calibrate(used(), [x()], squares),
    "fisher": lambda folder: compress_(used(), LowRank("fisher", keep=0.3), batches=[x(), x()], loss=squares),
    "find_smallest": lambda folder: find_smallest(used(), lambda model: 1.0, better="lower", evaluations=2),
    "copy_model": lambda folder: copy_model(used()),
    "save and load": lambda folder: (
        compress_(model := used(), LowRank(rank=2)),
        save(model, folder),
        load(folder, used()),
    ),
}


@pytest.mark.parametrize("verb", HELD.values(), ids=HELD)
def test_models_that_hold_tensors_with_a_history(verb, tmp_path):
    verb(tmp_path / "folder")


class Trainer:
    def __init__(self):
        self.methods = []


def with_proxies(trainer):
    """Return a model whose modules hold weak proxies, as Lightning's do, and one module that it holds unregistered."""
    model = Model()
    model.trainer = weakref.proxy(trainer)
    model.lstm.held = {"trainers": [weakref.proxy(trainer)]}
    model.lstm.trainer = weakref.proxy(trainer)
    vars(model.lstm)["owner"] = model
    trainer.methods.append(model.lstm.forward)
    return model


PROXIES = {
    "find_sites": lambda make, folder: slimlstm.find_sites(make()),
    "int8": lambda make, folder: compress_(make(), Quantize("int8")),
    "prune": lambda make, folder: compress_(make(), Prune(keep=0.5)),
    "fisher": lambda make, folder: compress_(make(), LowRank("fisher", rank=2), batches=[x(), x()], loss=squares),
    "find_smallest": lambda make, folder: find_smallest(make(), lambda model: 1.0, better="lower", evaluations=2),
    "save and load": lambda make, folder: (
        compress_(model := make(), LowRank(rank=2)),
        save(model, folder),
        load(folder, make()),
    ),
}


@pytest.mark.parametrize("verb", PROXIES.values(), ids=PROXIES)
@pytest.mark.parametrize("alive", [True, False])
def test_weak_proxies_are_left_alone(verb, alive, tmp_path):
    kept = []

    def make():
        kept.append(Trainer())
        model = with_proxies(kept[-1])
        if not alive:
            kept.clear()
        return model

    verb(make, tmp_path / "folder")


def test_modules_that_an_lstm_holds_unregistered_stay_so():
    model = with_proxies(trainer := Trainer())
    proxy, names = model.lstm.trainer, [name for name, _ in model.named_modules()]
    compress_(model, LowRank(rank=2))
    assert [name for name, _ in model.named_modules()] == names
    assert vars(model.lstm)["owner"] is model
    assert model.lstm.trainer is proxy
    copied = copy_model(model)
    assert copied.lstm.trainer is proxy
    assert copied.trainer.methods is trainer.methods


def test_calibration_leaves_no_history_behind():
    model = Holding()
    calibrate(model, [x()], squares)
    assert (model.hidden, model.outputs, model.cache) == (None, [None], {})
    copy.deepcopy(model)


LOCKED = {
    "find_smallest": lambda make, folder: find_smallest(make(), lambda model: 1.0, better="lower", evaluations=2),
    "load": lambda make, folder: (compress_(model := make(), LowRank(rank=2)), save(model, folder), load(folder, make())),
}


@pytest.mark.parametrize("verb", LOCKED.values(), ids=LOCKED)
def test_what_cannot_be_copied_is_refused_in_words(verb, tmp_path):
    def make():
        model = Model()
        model.lock = threading.Lock()
        return model

    with pytest.raises(SlimLSTMError, match=r"the model cannot be copied \(cannot pickle .*lock.*\); take what"):
        verb(make, tmp_path / "folder")


def test_batches_of_inference_mode():
    with torch.inference_mode():
        given = [x(), x()]
    model = nn.Sequential(nn.Linear(IN, IN), Model())
    expected = calibrate(model, [batch.clone() for batch in given], squares)
    assert calibrate(model, given, squares).loss == expected.loss
    compress_(model, LowRank("fisher", rank=2), batches=given, loss=squares)


class Counting:
    """A loss that adds the number of batches it has seen, as a state."""

    def __init__(self):
        self.seen = 3

    def __call__(self, model, batch):
        self.seen += 1
        return model(batch)[0].square() + self.seen

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def sensitivity_of(model, given, loss):
    return slimlstm.measure_sensitivity(model, given, loss)


PASSES = {
    "calibrate": calibrate,
    "mean_loss": mean_loss,
    "measure_sensitivity": sensitivity_of,
    "int8": lambda model, given, loss: compress_(model, Quantize("int8"), batches=given, loss=loss),
    "fisher": lambda model, given, loss: compress_(model, LowRank("fisher", rank=2), batches=given, loss=loss),
    "calibrated": lambda model, given, loss: compress_(
        model, LowRank("fisher", rank=2), batches=given, loss=loss, calibration=calibrate(model, given, loss)
    ),
    "auto": lambda model, given, loss: compress_(
        model, LowRank("fisher", bytes=900, storage="auto"), batches=given, loss=loss
    ),
}


@pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)
def test_every_pass_starts_from_the_state_that_a_loss_was_given_in(run):
    torch.manual_seed(0)
    loss, given = Counting(), [x() for _ in range(5)]
    found = run(nn.Sequential(nn.LSTM(IN, H)), given, loss)
    assert loss.seen == 3
    if isinstance(found, Report):
        assert 6 < found.loss_before < 7
        assert abs(found.measured_rise) < 1


COMPILED = {
    "whole": lambda model: torch.compile(model, backend="eager"),
    "in place": lambda model: model.compile(backend="eager") or model,
    "a part": lambda model: nn.Sequential(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("used", [False, True])
def test_compiled_models_are_calibrated_as_written(compiled, used):
    model = Model()
    expected = calibrate(model, [x()], squares).sites["lstm.weight_hh_l0"]
    model = compiled(model)
    if used:
        model(x())
    (found,) = (
        moments for key, moments in calibrate(model, [x()], squares).sites.items() if key.endswith("lstm.weight_hh_l0")
    )
    assert torch.equal(found.inputs, expected.inputs)
    assert torch.equal(found.gradients, expected.gradients)
    report = compress_(model, LowRank("fisher", rank=2), batches=[x(), x()], loss=squares)
    assert report.loss_after is not None


class Checkpointing(nn.Module):
    """Runs its LSTM under activation checkpointing, or plainly."""

    def __init__(self, lstm, use_reentrant):
        super().__init__()
        self.lstm, self.head, self.use_reentrant = lstm, nn.Linear(IN, IN), use_reentrant

    def forward(self, x):
        h = self.head(x)
        if self.use_reentrant is None:
            return self.lstm(h)[0]
        return checkpoint(lambda y: self.lstm(y)[0], h, use_reentrant=self.use_reentrant)


CHECKPOINTED = {
    "dense": lambda: nn.LSTM(IN, H),
    "factors": lambda: LowRankLSTM(IN, H, ranks={"weight_hh_l0": 2}),
    "both ways": lambda: LowRankLSTM(IN, H, ranks={"weight_hh_l0": 2}, bidirectional=True),
    "projected": lambda: LowRankLSTM(IN, H, ranks={"weight_hh_l0": 2}, proj_size=3),
}


@pytest.mark.parametrize("make", CHECKPOINTED.values(), ids=CHECKPOINTED)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_under_activation_checkpointing(make, use_reentrant, training):
    model, gradients = Checkpointing(make(), None).train(training), []
    for kind in (None, use_reentrant):
        model.use_reentrant = kind
        model.zero_grad()
        model(x()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["dense", "factors"])
def test_calibration_under_activation_checkpointing(name):
    model = Checkpointing(CHECKPOINTED[name](), None)
    expected = calibrate(model, [x(), x()], squares)
    model.use_reentrant = False
    found = calibrate(model, [x(), x()], squares)
    for key, moments in expected.sites.items():
        assert torch.equal(found.sites[key].inputs, moments.inputs)
        assert torch.equal(found.sites[key].gradients, moments.gradients)
    model.use_reentrant = True
    with pytest.raises(SlimLSTMError, match="use_reentrant=False"):
        calibrate(model, [x()], squares)


class Frozen(dict):
    def __setitem__(self, key, value):
        raise TypeError("frozen")


class FrozenList(list):
    def __setitem__(self, index, value):
        raise TypeError("frozen")


def test_what_did_not_change_is_not_assigned_again():
    model = Holding()
    model.frozen = [Frozen(a=1, b=torch.ones(2)), FrozenList([torch.ones(2), "b", None])]
    model.cache["inside"] = Frozen(a=1)
    calibrate(model, [x()], squares)
    assert model.cache == {"inside": Frozen(a=1)}


COPIED = {
    "LSTM": lambda: nn.LSTM(IN, H),
    "LowRankLSTM": lambda: LowRankLSTM(IN, H, ranks={"weight_ih_l0": 2}),
    "LSTMCell": lambda: nn.LSTMCell(IN, H),
}


@pytest.mark.parametrize("make", COPIED.values(), ids=COPIED)
@pytest.mark.parametrize("grad", [True, False])
def test_a_pruned_module_that_has_run_can_be_copied(make, grad):
    model = nn.Sequential(make()).eval()
    inputs = x()[0] if isinstance(model[0], nn.LSTMCell) else x()
    with torch.set_grad_enabled(grad):
        model(inputs)
        compress_(model, Prune(keep=0.5, target="hh"))
        expected = model(inputs)[0]
        found = copy.deepcopy(model)(inputs)[0]
    assert torch.equal(found, expected)


def test_labels_beside_inputs_are_refused_without_a_loss():
    with pytest.raises(SlimLSTMError, match="a batch gives 2 arguments, which the model does not take"):
        calibrate(Model(), [(x(), torch.zeros(B))])
    with pytest.raises(SlimLSTMError, match="a batch gives the arguments x, labels"):
        calibrate(Model(), [{"x": x(), "labels": torch.zeros(B)}])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
@pytest.mark.parametrize("kind", ["input", "state"])
def test_other_dtypes_than_the_weights_are_refused(dtype, kind):
    lstm, cell = LowRankLSTM(IN, H).eval(), slimlstm.LowRankLSTMCell(IN, H).eval()
    inputs, state = x(), torch.zeros(1, B, H)
    inputs, state = (inputs.to(dtype), state) if kind == "input" else (inputs, state.to(dtype))
    with pytest.raises(SlimLSTMError, match=f"an input or state is {dtype}, but the weights are torch.float32"):
        lstm(inputs, (state, state))
    with pytest.raises(SlimLSTMError, match=f"an input or state is {dtype}, but the weights are torch.float32"):
        cell(inputs[0], (state[0], state[0]))


# E and H. Any exception leaves everything as it was.

BATCH = x()
SOURCE = str(Path(slimlstm.__file__).parent)


class Interrupter:
    """Raises KeyboardInterrupt at one line of slimlstm's source, counted over a run; None only counts."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def interrupted_model():
    model = nn.ModuleDict({"a": Model(), "b": Model(Carrying), "c": Tied()})
    model["a"].eval()
    model["b"].lstm.register_forward_hook(lambda module, inputs, outputs: outputs)
    return model


def interrupted_loss(model, batch):
    return sum(part(batch).square().mean(-1) for part in model.values())


def run_compression(model):
    compress_(model, LowRank("fisher", keep=0.3, storage="int8"), batches=[BATCH, 2 * BATCH], loss=interrupted_loss)


BLOCKS = {
    "evaluation mode": evaluation_mode,
    "kept state": kept_state,
    "observed": lambda model: forwards_replaced([(model["b"].lstm, model["c"])]),
    "trained": lambda model: prepared(model, {"scale": model["b"].lstm.scale}),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_an_interrupt_at_any_line_of_a_block_leaves_everything_as_it_was(block):
    def run(model):
        with block(model):
            model["b"].hidden = 1

    with Interrupter(None) as counted:
        run(interrupted_model())
    for point in range(1, counted.lines + 1):
        model = interrupted_model()
        before, hidden = snapshot(model), vars(model["b"]).get("hidden")
        flags = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(KeyboardInterrupt), Interrupter(point):
            run(model)
        assert snapshot(model) == before, point
        assert [parameter.requires_grad for parameter in model.parameters()] == flags, point
        assert block is not kept_state or vars(model["b"]).get("hidden") is hidden, point


@pytest.mark.slow
def test_an_interrupt_leaves_everything_as_it_was():
    with Interrupter(None) as counted:
        run_compression(interrupted_model())
    points = random.Random(0).sample(range(1, counted.lines), settings.default.max_examples)  # noqa: S311
    for point in points:
        model = interrupted_model()
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt), Interrupter(point):
            run_compression(model)
        assert snapshot(model) == before, point


def test_a_loss_that_fails_on_the_compressed_model_leaves_everything_as_it_was():
    model = Model()
    before = snapshot(model)

    def loss(model, batch):
        if isinstance(model.lstm, LowRankLSTM):
            raise RuntimeError("out of memory")
        return squares(model, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        compress_(model, LowRank(rank=2), batches=[BATCH], loss=loss)
    assert snapshot(model) == before


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("config", [LowRank(rank=2), Quantize("int8")])
def test_marks_and_hooks_of_parameters(config, register):
    """New parameters carry the attributes of the old ones, and the report names the hooks that they lack."""
    model = Model()
    for parameter in model.parameters():
        parameter.no_weight_decay = True
        getattr(parameter, register)(lambda value: None)
    report = compress_(model, config)
    assert all(parameter.no_weight_decay for parameter in model.parameters())
    named = [note.partition(" ")[0] for note in report.notes if "had hooks on its gradient" in note]
    assert named == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert not any("hooks" in note for note in compress_(Model(), config).notes)


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_hh_l0"])
def test_parametrized_weights_are_plain_in_the_copy(name):
    """A parametrization other than a mask ends, and the report says so."""
    model = Model()
    parametrize.register_parametrization(model.lstm, name, nn.Tanh())
    expected = getattr(model.lstm, name).detach().clone()
    report = compress_(model, LowRank(rank=2, target="ih"))
    assert torch.equal(getattr(model.lstm, name), expected)
    assert any("parametrization of its weights ends here" in note for note in report.notes)
