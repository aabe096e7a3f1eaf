"""Models that cannot be compressed right are refused in words before anything changes."""

import functools

import pytest
import torch
from one_lstm import (
    H,
    Model,
    every_config,
    normed_factor,
    pruned_factor,
    snapshot,
    x,
)
from torch import nn

from slimlstm import LowRank, SlimLSTMError, compress_, find_sites


class BoundMethod(Model):
    def __init__(self):
        super().__init__()
        self.step = self.lstm.forward


class Called(nn.LSTM):
    def __call__(self, *inputs):
        output, state = super().__call__(*inputs)
        return 2 * output, state


class Flat(nn.LSTM):
    @property
    def _flat_weights(self):
        return [2 * getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value):
        pass


class Permuted(nn.LSTM):
    def permute_hidden(self, hx, permutation):
        return tuple(2 * state for state in super().permute_hidden(hx, permutation))


class Helped(nn.LSTM):
    def initial(self, batch):
        return torch.zeros(1, batch, H), torch.zeros(1, batch, H)


class Helper:
    def initial(self, batch):
        return torch.zeros(1, batch, H), torch.zeros(1, batch, H)


class Mixed(nn.LSTM, Helper):
    pass


class Named(nn.LSTM):
    """Has an attribute that means something else on a LowRankLSTM."""

    ranks = (1, 2)


def tied_inside():
    model = Model(functools.partial(nn.LSTM, bidirectional=True))
    model.lstm.weight_hh_l0_reverse = model.lstm.weight_hh_l0
    return model


def compiled():
    model = Model()
    model.lstm = torch.compile(model.lstm, backend="eager")
    return model


def patched():
    model = Model()
    own = model.lstm.forward
    model.lstm.forward = lambda x: own(2 * x)
    return model


def state_dict_hook():
    model = Model()
    model.lstm.register_state_dict_pre_hook(lambda module, prefix, keep: None)
    return model


def load_hook():
    model = Model()
    model.lstm.register_load_state_dict_pre_hook(lambda *arguments: None)
    return model


class WeightDrop(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.module = nn.LSTM(*sizes)
        raw = self.module.weight_hh_l0
        del self.module.weight_hh_l0
        self.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))

    def forward(self, *inputs):
        self.module.weight_hh_l0 = self.weight_hh_l0_raw.clone()
        return self.module(*inputs)


class Normed(WeightDrop):
    def forward(self, *inputs):
        output, state = super().forward(*inputs)
        return torch.nn.functional.layer_norm(output, (H,)), state


class Flipped(WeightDrop):
    def forward(self, x):
        return super().forward(x.flip(0))


class Alone(WeightDrop):
    def forward(self, x):
        return super().forward(x)[0], None


class Forgetful(WeightDrop):
    def forward(self, x, state=None):
        return super().forward(x)


class Twice(WeightDrop):
    def forward(self, *inputs):
        super().forward(*inputs)
        return super().forward(*inputs)


def with_dropped_hook():
    model = Model(WeightDrop)
    model.lstm.module.register_forward_hook(lambda module, inputs, outputs: outputs)
    with torch.no_grad():
        model(x())
    return model


def distributed(kind):
    """A model inside an imitation of one of PyTorch's wrappers, which need a process group."""
    wrapper = type(
        kind, (nn.Module,), {"__module__": "torch.nn.parallel.distributed", "forward": lambda self, x: self.module(x)}
    )

    def make():
        model = wrapper()
        model.module = Model()
        return model

    return make


def sharded():
    model = Model()
    mark = type("FSDPModule", (), {"__module__": "torch.distributed.fsdp"})
    model.__class__ = type("FSDPModel", (mark, Model), {})
    return model


NO_MASK = "a mask on the product would not last"
REFUSED = {
    "bound method": (BoundMethod, "forward of 'lstm' is stored as a bound method"),
    "compiled": (compiled, r"'lstm\._orig_mod' is wrapped by torch\.compile"),
    "DistributedDataParallel": (distributed("DistributedDataParallel"), "inside DistributedDataParallel, whose reducer"),
    "FullyShardedDataParallel": (distributed("FullyShardedDataParallel"), "inside FullyShardedDataParallel"),
    "fully_shard": (sharded, "inside FSDPModule"),
    "patched forward": (patched, "forward of 'lstm' was replaced on the instance"),
    "__call__": (lambda: Model(Called), "'lstm' is a Called, whose __call__ would be lost"),
    "_flat_weights": (lambda: Model(Flat), "whose _flat_weights would be lost"),
    "permute_hidden": (lambda: Model(Permuted), "whose permute_hidden would be lost"),
    "helper method": (lambda: Model(Helped), "whose initial would be lost"),
    "mixin": (lambda: Model(Mixed), "whose initial would be lost"),
    "taken attribute": (lambda: Model(Named), "has an attribute ranks of its own"),
    "tied inside": (tied_inside, "weight_hh_l0_reverse and weight_hh_l0 of 'lstm' are one parameter"),
    "state_dict hook": (state_dict_hook, "hooks on its state_dict"),
    "load_state_dict hook": (load_hook, "hooks on its state_dict"),
    **{
        f"weight drop that is {kind.__name__}": (lambda kind=kind: Model(kind), "does more than call it")
        for kind in (Normed, Flipped, Alone, Forgetful, Twice)
    },
    "hook below weight drop": (with_dropped_hook, "the LSTM inside 'lstm' has hooks"),
    "pruned factor": (pruned_factor, f"weight_hh_l0_u of 'lstm' is no parameter but computed by a hook|{NO_MASK}"),
    "parametrized factor": (normed_factor, f"weight_hh_l0_v of 'lstm' is parametrized|{NO_MASK}"),
}


@every_config
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_words_before_anything_changes(make, message, config):
    model = make().eval()
    assert {site.problem is None for site in find_sites(model)} == {False}
    before = snapshot(model)
    with pytest.raises(SlimLSTMError, match=message):
        compress_(model, config())
    assert snapshot(model) == before


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_distributed_tensors_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), Model()
        for name, parameter in list(model.lstm.named_parameters()):
            spread = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()]))
            setattr(model.lstm, name, spread)
        with pytest.raises(SlimLSTMError, match="parameters of 'lstm' are distributed tensors; compress the model"):
            compress_(model, LowRank(rank=2))
        assert type(model.lstm) is nn.LSTM
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("strict", [True, False])
def test_dense_weights_for_a_factored_matrix_are_refused(strict):
    model, dense = Model(), Model().state_dict()
    compress_(model, LowRank(rank=2, target="hh"))
    with pytest.raises(RuntimeError, match=r"lstm\.weight_hh_l0 is dense in the state dict but factored in the model"):
        model.load_state_dict(dense, strict=strict)
    model.load_state_dict(model.state_dict())
