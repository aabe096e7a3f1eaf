"""A model with one LSTM, and a snapshot of everything that a verb could change."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from slimlstm import LowRank, Prune, Quantize, compress_

IN, H, T, B = 6, 16, 5, 2

CONFIGS = {
    "low rank": lambda: LowRank(rank=2),
    "int8": lambda: Quantize("int8"),
    "pruned": lambda: Prune(keep=0.2),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def x(size=IN):
    torch.manual_seed(1)
    return torch.randn(T, B, size)


class Model(nn.Module):
    """One LSTM, called by the name ``lstm``."""

    def __init__(self, lstm=None):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(IN, H) if lstm is None else lstm(IN, H)

    def forward(self, x):
        return self.lstm(x)[0]


class Tied(Model):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(IN, 4 * H)
        self.head.weight = self.lstm.weight_ih_l0


class Carrying(nn.LSTM):
    """An LSTM with an attribute, a class constant, a buffer, a parameter and a submodule, but no code."""

    family = "recurrent"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.tag = "encoder"
        self.register_buffer("h_init", torch.full((1, 1, H), 0.1))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.scale = nn.Parameter(torch.ones(3))
        self.norm = nn.LayerNorm(H)


def snapshot(model):
    """Everything that a verb could change: objects, classes, modes, hooks, numbers, random state and modes of PyTorch."""
    modules = {
        name: (id(module), type(module), module.training, *hooks_of(module)) for name, module in model.named_modules()
    }
    tensors = {
        name: (id(value), value.dtype, value.detach().clone().nan_to_num(0).tolist(), value.grad)
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    return modules, tensors, modes, torch.get_rng_state().tolist()


def hooks_of(module):
    return [len(value) for name, value in sorted(vars(module).items()) if name.endswith("_hooks")], vars(module).get(
        "forward"
    )


# A. The new module is what runs.


def factored():
    model = Model()
    compress_(model, LowRank(rank=4))
    return model


def pruned_factor():
    model = factored()
    prune.l1_unstructured(model.lstm, "weight_hh_l0_u", 0.5)
    return model


def normed_factor():
    model = factored()
    parametrizations.weight_norm(model.lstm, "weight_hh_l0_v")
    return model


def squares(model, batch):
    return model(batch).square().mean(-1)
