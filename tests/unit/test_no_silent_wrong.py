"""Strangers' models in unusual states: the new module is what runs, and it has everything that the old one had.

Every table is one law. A new case is a new row.
"""

import copy
import functools

import pytest
import torch
from one_lstm import (
    IN,
    Carrying,
    H,
    Model,
    Tied,
    every_config,
    x,
)
from torch import nn

import slimlstm
from slimlstm import LowRank, LowRankLSTM, SlimLSTMError, compress_


class InList(Model):
    def __init__(self):
        super().__init__()
        self.rnns = [self.lstm]

    def forward(self, x):
        for rnn in self.rnns:
            x = rnn(x)[0]
        return x


class InDict(Model):
    def __init__(self):
        super().__init__()
        self.by_name = {"rnn": {"deeper": self.lstm}}

    def forward(self, x):
        return self.by_name["rnn"]["deeper"](x)[0]


class InTuple(Model):
    def __init__(self):
        super().__init__()
        self.pair = (self.lstm, None)

    def forward(self, x):
        return self.pair[0](x)[0]


class InClosure(Model):
    def __init__(self):
        super().__init__()
        lstm = self.lstm
        self.step = lambda x: lstm(x)[0]

    def forward(self, x):
        return self.step(x)


class InPartial(Model):
    def __init__(self):
        super().__init__()
        self.step = functools.partial(self.lstm)

    def forward(self, x):
        return self.step(x)[0]


class InObject(Model):
    def __init__(self):
        super().__init__()
        self.other = type("Other", (), {})()
        self.other.lstm = self.lstm

    def forward(self, x):
        return self.other.lstm(x)[0]


def compiled_inside():
    model = Model()
    model.lstm.compile(backend="eager")
    return model


def compiled_whole():
    return torch.compile(Model(), backend="eager")


def compiled_and_run():
    model = compiled_whole().eval()
    with torch.no_grad():
        model(x())
    return model


def own_forward_stored():
    model = Model()
    model.lstm.forward = model.lstm.forward
    return model


def with_hook():
    model = Model()
    model.lstm.register_forward_hook(lambda module, inputs, outputs: (2 * outputs[0], outputs[1]))
    return model


def doubled(model):
    """A plain model's outputs where a hook doubles them."""
    return lambda x: 2 * model(x)


RUNS = {
    "plain": (Model, None),
    "in a list": (InList, None),
    "in nested dictionaries": (InDict, None),
    "in a tuple": (InTuple, None),
    "in a closure": (InClosure, None),
    "in a partial": (InPartial, None),
    "in an object": (InObject, None),
    "compiled in place": (compiled_inside, None),
    "whole model compiled": (compiled_whole, None),
    "whole model compiled and run": (compiled_and_run, None),
    "its own forward stored on it": (own_forward_stored, None),
    "hooked": (with_hook, doubled),
}


@every_config
@pytest.mark.parametrize(("make", "change"), RUNS.values(), ids=RUNS)
def test_the_compressed_module_is_what_runs(make, change, config):
    model, plain = make().eval(), Model().eval()
    with torch.no_grad():
        dense = model(x())
        compress_(model, config())
        compress_(plain, config())
        expected = (change or (lambda model: model))(plain)(x())
        after = model(x())
    assert not torch.equal(after, dense)
    torch.testing.assert_close(after, expected)


@every_config
def test_a_model_that_is_an_lstm_is_compressed_in_place(config):
    torch.manual_seed(0)
    model, plain = nn.LSTM(IN, H).eval(), Model().eval()
    compress_(model, config())
    compress_(plain, config())
    with torch.no_grad():
        torch.testing.assert_close(model(x())[0], plain(x()))


def test_a_matrix_tied_to_another_layer_is_named_in_the_report():
    report = compress_(Tied(), LowRank(rank=2, target="both"))
    assert any("lstm.weight_ih_l0 was one parameter with head.weight" in note for note in report.notes)
    assert not compress_(Model(), LowRank(rank=2, target="both")).notes


def test_an_optimizer_that_holds_replaced_weights_is_named_in_the_report():
    model, other = Model(), Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert not compress_(other, LowRank(rank=2)).notes
    assert any(
        "an optimizer (SGD) holds weights that were replaced" in note for note in compress_(model, LowRank(rank=2)).notes
    )
    del optimizer


# B. What an LSTM carries beside its weights.


@every_config
def test_attributes_buffers_parameters_and_submodules_are_carried_over(config):
    model = Model(Carrying)
    before = dict(model.lstm.named_parameters())
    keys = {key for key in model.state_dict() if "weight_" not in key and "bias_" not in key}
    compress_(model, config())
    lstm = model.lstm
    assert (lstm.tag, lstm.family, lstm.h_init.shape, lstm.scratch.shape) == ("encoder", "recurrent", (1, 1, H), (2,))
    assert lstm.scale is before["scale"]
    assert isinstance(lstm.norm, nn.LayerNorm)
    assert keys <= model.state_dict().keys()
    assert "lstm.scratch" not in model.state_dict()


@every_config
def test_backward_hooks_are_carried_over(config):
    model, seen = Model(), []
    handle = model.lstm.register_full_backward_hook(lambda module, inputs, outputs: seen.append(1))
    compress_(model, config())
    model(x().requires_grad_()).sum().backward()
    assert seen == [1]
    handle.remove()
    model(x().requires_grad_()).sum().backward()
    assert seen == [1]


def test_masks_on_biases_are_carried_over():
    model = Model()
    slimlstm.modules.masks.apply_mask(model.lstm, "bias_hh_l0", torch.zeros(4 * H, dtype=torch.bool))
    compress_(model, LowRank(rank=2))
    assert not model.lstm.bias_hh_l0.any()


READ = {
    "weight_hh_l0": lambda lstm: [lstm.weight_hh_l0],
    "weight_ih_l0_reverse": lambda lstm: [lstm.weight_ih_l0_reverse],
    "bias_ih_l0": lambda lstm: [lstm.bias_ih_l0],
    "all_weights": lambda lstm: [weight for weights in lstm.all_weights for weight in weights],
    "_flat_weights": lambda lstm: lstm._flat_weights,
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
@pytest.mark.parametrize("projection", [0, 4])
def test_dense_weights_are_readable(read, projection):
    dense = nn.LSTM(IN, H, bidirectional=True, proj_size=projection)
    model = nn.ModuleList([copy.deepcopy(dense)])
    compress_(model, LowRank(rank=4, target="both"))
    assert isinstance(model[0], LowRankLSTM)
    found, expected = read(model[0]), read(model[0].to_dense())
    assert [value.shape for value in found] == [value.shape for value in read(dense)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model[0].mode == dense.mode
    assert model[0]._flat_weights_names == dense._flat_weights_names
    assert model[0]._all_weights == dense._all_weights


@pytest.mark.parametrize("value", [torch.zeros(4 * H, H), nn.Parameter(torch.zeros(4 * H, H)), None])
def test_factored_matrices_cannot_be_set(value):
    lstm = LowRankLSTM(IN, H, ranks={"weight_hh_l0": 2})
    with pytest.raises(SlimLSTMError, match="weight_hh_l0 is the product of weight_hh_l0_u and weight_hh_l0_v"):
        lstm.weight_hh_l0 = value
