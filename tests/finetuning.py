"""A small model with dropout and a buffer, its batches and losses, for tests of fine-tuning."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn.functional import mse_loss

import slimlstm as sl

INPUTS, HIDDEN, OUTPUTS = 5, 6, 3


class Tagger(nn.Module):
    """x [T, B, I] to [T, B, OUTPUTS], with dropout and with a buffer that training changes."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, HIDDEN)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(HIDDEN, OUTPUTS)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, state=None):
        self.calls += self.training
        y, state = self.lstm(x, state)
        return self.head(self.dropout(y)), state


METHODS = {"factors": sl.LowRank(rank=2), "masks": sl.Prune(rank=2)}


def taggers(method="factors"):
    """A dense model and the compressed one."""
    torch.manual_seed(1)
    dense = Tagger().eval()
    with torch.no_grad():
        for parameter in dense.lstm.parameters():
            parameter.mul_(3.0)
    model = deepcopy(dense)
    sl.compress_(model, METHODS[method])
    return dense, model


def tagger():
    return taggers()[1]


def some_batches(count=4, size=3):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(7, size, INPUTS, generator=generator) for _ in range(count)]


def outputs(model, batch):
    return model(batch)[0]


def squares(model, batch):
    """A loss on labels: each output is to be an input."""
    return mse_loss(outputs(model, batch), batch[..., :OUTPUTS])


def value_of(model):
    return sum(float(squares(model, batch)) for batch in some_batches())


class Carried:
    """A loss that carries the model's state from batch to batch."""

    def __init__(self):
        self.state = None

    def __call__(self, model, batch):
        found, state = model(batch, self.state)
        self.state = tuple(tensor.detach() for tensor in state)
        return mse_loss(found, batch[..., :OUTPUTS])

    def state_dict(self):
        return {"state": self.state}

    def load_state_dict(self, state_dict):
        self.state = state_dict["state"]


def drawn_batches(epoch):
    """Three batches, drawn only when they are asked for."""
    for _ in range(3):
        yield torch.randn(7, 3, INPUTS) + 0.1 * epoch


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_state(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


RUN = {"steps": 11, "lr": 3e-2, "validate": value_of, "validations": 4}


def other_weights():
    model = tagger()
    with torch.no_grad():
        model.lstm.weight_hh_l0_u.mul_(1.01)
    return model
