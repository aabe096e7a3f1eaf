"""Models that do more than copy numbers when they are loaded are loaded by their own ``load_state_dict``."""

import copy

import pytest
import torch
from torch import nn

import slimlstm as sl


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.output = nn.Embedding(20, 6), nn.LSTM(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.output(self.lstm(self.embedding(x))[0])


class ExtraState(Model):
    temperature = 1.0

    def get_extra_state(self):
        return torch.tensor(self.temperature)

    def set_extra_state(self, state):
        self.temperature = float(state)

    def forward(self, x):
        return super().forward(x) / self.temperature


class StateOfCopies(Model):
    def state_dict(self, *arguments, **named):
        return {name: tensor.detach().clone() for name, tensor in super().state_dict(*arguments, **named).items()}


class HookOfCopies(Model):
    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(
            lambda module, state, prefix, local: type(state)((name, value.clone()) for name, value in state.items())
        )


class Cache(Model):
    """A table that follows the embedding after every load."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(20, 6), persistent=False)
        self.refresh()
        self.register_load_state_dict_post_hook(lambda module, keys: module.refresh())

    def refresh(self):
        self.table = nn.functional.normalize(self.embedding.weight.detach())

    def forward(self, x):
        return self.output(self.lstm(self.table[x])[0])


class SameMemory(Model):
    def __init__(self) -> None:
        super().__init__()
        self.table = self.embedding.weight.data

    def forward(self, x):
        return self.output(self.lstm(self.table[x])[0])


class Versions(Model):
    """A module that reads state dictionaries of its first version otherwise."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, local_metadata, *rest):
        if local_metadata.get("version", 1) < 2:
            state[f"{prefix}output.bias"] = -state[f"{prefix}output.bias"]
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


class SizesOfData(Model):
    """A buffer whose size follows the data, as an observer's of quantisation-aware training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.scale = y.detach().abs().amax((0, 1))
        return y / self.scale

    def _load_from_state_dict(self, state, prefix, *rest):
        self.scale = torch.ones_like(state[f"{prefix}scale"])
        super()._load_from_state_dict(state, prefix, *rest)


class OneNumber(Model):
    """A buffer of many elements in the memory of one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(5))

    def forward(self, x):
        return super().forward(x) * self.scale


class MadeForInference(Model):
    def __init__(self) -> None:
        super().__init__()
        with torch.inference_mode():
            self.register_buffer("scale", torch.ones(5))

    def forward(self, x):
        return super().forward(x) * self.scale


KINDS = (
    Model, ExtraState, StateOfCopies, HookOfCopies, Cache, SameMemory, Versions, SizesOfData, OneNumber, MadeForInference
)  # fmt: skip


def trained(kind):
    """A model whose state differs from a fresh one's."""
    torch.manual_seed(1)
    model = kind()
    with torch.no_grad():
        model(torch.randint(20, (7, 4)))
    if kind is ExtraState:
        model.temperature = 7.0
    if kind in (OneNumber, MadeForInference):
        model.scale = torch.arange(1.0, 6)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_every_kind_computes_what_it_did(kind, dtype, tmp_path):
    model, x = trained(kind), torch.randint(20, (7, 4))
    if dtype is not None:
        model.to(dtype)
    if kind is Cache:
        model.refresh()
    sl.compress_(model, sl.LowRank("svd", rank=3))
    sl.save(model, tmp_path)
    torch.manual_seed(2)
    loaded = sl.load(tmp_path, kind().eval().to(dtype or torch.float32))
    with torch.no_grad():
        if kind is SameMemory and dtype is not None:  # conversion gave the embedding new memory in both models
            loaded.table = loaded.embedding.weight.data
            model.table = model.embedding.weight.data
        assert torch.equal(loaded(x), model(x))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


class Forgets(Model):
    def load_state_dict(self, state, *arguments, **named):
        state = {**state, "output.bias": torch.zeros(5)}
        return super().load_state_dict(state, *arguments, **named)


class Refuses(Model):
    def load_state_dict(self, state, *arguments, **named):
        raise RuntimeError("only on Sundays")


class KeepsDtype(StateOfCopies):
    """A state of copies, whose dtypes cannot be changed through it."""


REFUSED = {
    "other numbers": (Forgets, None, "output.bias has other numbers in the model after its load_state_dict"),
    "its own refusal": (Refuses, None, "load_state_dict refuses the tensors: .*only on Sundays"),
    "another dtype": (KeepsDtype, torch.bfloat16, "embedding.weight has other numbers .* torch.bfloat16"),
}


@pytest.mark.parametrize(("kind", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_keep_other_numbers_are_refused(kind, dtype, message, tmp_path):
    model = trained(Model)
    sl.compress_(model, sl.LowRank("svd", rank=3))
    sl.save(model.to(dtype or torch.float32), tmp_path)
    fresh = kind().eval()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(sl.SlimLSTMError, match=message):
        sl.load(tmp_path, fresh)
    assert isinstance(fresh.lstm, nn.LSTM)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_a_failure_in_the_middle_leaves_the_model(tmp_path):
    model = trained(Model)
    sl.compress_(model, sl.LowRank("svd", rank=3))
    sl.save(model, tmp_path)
    calls = iter(range(9))

    class Stops(Model):
        def load_state_dict(self, state, *arguments, **named):
            found = super().load_state_dict(state, *arguments, **named)
            if next(calls):
                raise KeyboardInterrupt
            return found

    fresh = Stops().eval()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(KeyboardInterrupt):
        sl.load(tmp_path, fresh)
    assert isinstance(fresh.lstm, nn.LSTM)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
