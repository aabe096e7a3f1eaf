"""Packed weights: packed once, again after every change, and freed with their module.

Dimensions: T time steps, B sequences, I input size, H hidden size, D directions.
"""

import gc
import pickle
from copy import copy, deepcopy

import pytest
import torch
from kernels import assert_current, isa, low_rank, needs_kernel  # noqa: F401
from torch import nn

from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.ops import packing

pytestmark = needs_kernel


def step_of(optimizer, **arguments):
    def change(module):
        with torch.enable_grad():
            module.backend = "dense"
            module(torch.randn(3, 2, 5))[0].sum().backward()
            module.backend = "fused"
        optimizer(module.parameters(), **arguments).step()

    return change


def in_place(module):
    module.weight_hh_l0_u[3, 1] += 0.5


def load(module):
    module.load_state_dict(low_rank().state_dict())


def load_by_assignment(module):
    module.load_state_dict(low_rank().state_dict(), assign=True)


def assign_data(module):
    module.weight_hh_l0_u.data = torch.randn(132, 4)


def assign_data_back_and_forth(module):
    """The allocator tends to reuse memory that was just freed for a request of the same size."""
    module.weight_hh_l0_u.data = torch.randn(132, 4)
    module.weight_hh_l0_u.data = torch.randn(132, 4)


def copy_into_data(module):
    module.weight_hh_l0_u.data.copy_(torch.randn(132, 4))


def prune_data(module):
    data = module.weight_ih_l0_u.data
    data.mul_(data.abs() > data.abs().quantile(0.2))


def fill_forget_bias_data(module):
    module.bias_hh_l0.data[33:66].fill_(1.0)


def through_numpy(module):
    module.weight_ih_l0_v.detach().numpy()[:] *= 2.0


def fewer_ranks(module):
    module.set_factors("weight_hh_l0", module.weight_hh_l0_u.detach()[:, :2], module.weight_hh_l0_v.detach()[:2])


def narrower_data(module):
    module.weight_hh_l0_u.data = module.weight_hh_l0_u.data[:, :2]
    module.weight_hh_l0_v.data = module.weight_hh_l0_v.data[:2]


def new_parameter(module):
    module.weight_hh_l0_u = nn.Parameter(torch.randn(132, 4))


def exchange(module):
    u, v = module.weight_ih_l0_u, module.weight_hh_l0_u
    module.weight_ih_l0_u, module.weight_hh_l0_u = v, u


def move_and_back(module):
    module.double().mul = None
    module.float()


def to_vector_and_back(module):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(module.parameters()) * 0.5, module.parameters())


@pytest.mark.parametrize(
    "change",
    [
        *(step_of(torch.optim.SGD, lr=0.5, foreach=foreach) for foreach in (False, True)),
        *(step_of(torch.optim.Adam, lr=0.1, **how) for how in ({"foreach": False}, {"foreach": True}, {"fused": True})),
        in_place,
        load,
        load_by_assignment,
        assign_data,
        assign_data_back_and_forth,
        copy_into_data,
        prune_data,
        fill_forget_bias_data,
        through_numpy,
        fewer_ranks,
        narrower_data,
        new_parameter,
        exchange,
        move_and_back,
        to_vector_and_back,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("steps", [1, 256], ids=["short", "long"])
@torch.no_grad()
def test_changed_weights_are_packed_again(change, steps):
    module, x = low_rank(), torch.randn(steps, 1, 5)
    assert_current(module, x)
    for _ in range(2):
        before = [parameter.clone() for parameter in module.parameters()]
        change(module)
        if change not in (exchange, move_and_back):
            after = list(module.parameters())
            assert any(
                a.shape != b.shape or not torch.equal(a, b) for a, b in zip(after, before, strict=True)
            ) or change in (
                fewer_ranks,
                narrower_data,
                fill_forget_bias_data,
                prune_data,
            )
        assert_current(module, x)


def by_data(module, index):
    module.weight_hh_l0_u.data.view(-1)[index] += 0.5


def by_loop(module, index):
    for parameter in module.parameters():
        parameter.data.view(-1)[index % parameter.numel()] += 0.5


def by_numpy(module, index):
    module.weight_hh_l0_u.detach().numpy().reshape(-1)[index] += 0.5


def by_dlpack(module, index):
    torch.from_dlpack(module.weight_hh_l0_u.detach()).view(-1)[index] += 0.5


def by_dictionary(module, index):
    module._parameters["bias_ih_l0"].data[index % 132] += 0.5


def by_state_dict(module, index):
    module.state_dict()["weight_hh_l0_u"].numpy().reshape(-1)[index] += 0.5


def by_apply(module, index):
    module.apply(lambda inner: by_data(inner, index))


def by_getattr(module, index):
    getattr(module, "bias_ih_l0").data[index % 132] += 0.5


def by_shallow_copy(module, index):
    by_data(copy(module), index)


def begun(generator):
    next(generator)
    return generator


# Each returns something that can be edited at any later time, and how.
HELD = {
    "parameter": lambda module: module.weight_hh_l0_u,
    "data": lambda module: module.weight_hh_l0_u.data,
    "view": lambda module: module.weight_hh_l0_u.detach()[1:].T,
    "NumPy": lambda module: torch.from_numpy(module.weight_hh_l0_u.detach().numpy()),
    "DLPack": lambda module: torch.from_dlpack(module.weight_hh_l0_u.detach()),
    "list": lambda module: list(module.parameters()),
    "optimizer": lambda module: torch.optim.SGD(module.parameters()).param_groups[0]["params"],
    "generator": lambda module: [begun(module.parameters())],
    "state_dict": lambda module: list(module.state_dict().values()),
    "dictionary": lambda module: module._parameters,
    "shallow copy": lambda module: copy(module).weight_hh_l0_u,
    "direction": lambda module: module.direction("_l0"),
    "layers": lambda module: module.layers()[0],
}


def tensor_in(held):
    while not isinstance(held, torch.Tensor):
        held = next(iter(held.values() if isinstance(held, dict) else held))
    return held


@pytest.mark.parametrize(
    "edit",
    [by_data, by_loop, by_numpy, by_dlpack, by_dictionary, by_state_dict, by_apply, by_getattr, by_shallow_copy],
    ids=lambda edit: edit.__name__,
)
@pytest.mark.parametrize("grad", [False, True])
def test_every_edit_of_one_element_is_seen(edit, grad):
    module, x = low_rank(), torch.randn(2, 1, 5)
    with torch.set_grad_enabled(grad):
        for index in (0, 17, 131 * 4 + 3):
            for _ in range(3):
                module(x)
            edit(module, index)
            assert_current(module, x)


WHOLE = {
    "sign": lambda values: values.neg_(),
    "half": lambda values: values.mul_(0.5),
    "power of two": lambda values: values.mul_(2.0**-10),
    "signs of every other row": lambda values: values[::2].neg_(),
    "every eighth bit": lambda values: values.view(torch.int32).add_(0x01010101),
    "order of rows": lambda values: values.copy_(values.flip(0)),
    "order of halves": lambda values: values.copy_(values.roll(len(values) // 2, 0)),
    "order of columns": lambda values: values.copy_(values.roll(4, 1)),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("edit", WHOLE.values(), ids=WHOLE)
@torch.no_grad()
def test_every_edit_of_a_whole_matrix_is_seen(edit):
    """A change that is the same for all numbers cancels in plain sums, if their count has enough factors of two."""
    for size in (16, 32, 64, 256):
        module, x = LowRankLSTM.from_dense(nn.LSTM(size, size)), torch.randn(2, 1, size)
        for values in (module.weight_ih_l0.data, module.weight_hh_l0.detach().numpy()):
            for _ in range(3):
                module(x)
            edit(torch.as_tensor(values))
            assert_current(module, x)


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
@torch.no_grad()
def test_edits_through_what_was_taken_long_ago_are_seen(hold):
    module, x = low_rank(), torch.randn(2, 1, 5)
    module(x)
    held = hold(module)
    for _ in range(3):
        module(x)
    tensor = tensor_in(held).data.view(-1) if tensor_in(held).is_contiguous() else tensor_in(held).data[0]
    for _ in range(2):
        tensor[3] += 0.5
        assert_current(module, x)


FOREIGN = {
    "NumPy": torch.from_numpy,
    "DLPack": torch.from_dlpack,
    "buffer": lambda numbers: torch.frombuffer(numbers.data, dtype=torch.float32).view(numbers.shape),
}


@pytest.mark.parametrize("wrap", FOREIGN.values(), ids=FOREIGN)
@torch.no_grad()
def test_edits_of_memory_that_was_never_pytorchs_are_seen(wrap):
    module, x = low_rank(), torch.randn(2, 1, 5)
    numbers = module.weight_hh_l0_u.numpy().copy()
    module.weight_hh_l0_u = nn.Parameter(wrap(numbers))
    for _ in range(3):
        module(x)
    numbers[7, 1] += 0.5
    assert_current(module, x)


@torch.no_grad()
def test_edits_of_memory_that_processes_share_are_seen():
    module, x = low_rank().share_memory(), torch.randn(2, 1, 5)
    for _ in range(3):
        module(x)
    assert module._is_exposed


@pytest.mark.parametrize("take", HELD.values(), ids=HELD)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.slow
def test_weights_are_not_compared_where_nobody_can_have_edited_them(take, grad):
    module, x = low_rank(), torch.randn(2, 1, 5)
    with torch.set_grad_enabled(grad):
        module(x)
        held = take(module)
        kept = module(x)
        assert module._is_exposed
        del held
        gc.collect()
        for _ in range(2):
            kept = module(x)
            assert not module._is_exposed
    del kept


@torch.no_grad()
def test_forget():
    module, x = low_rank(), torch.randn(1, 1, 5)
    assert_current(module, x)
    packing.forget()
    assert_current(module, x)


def test_weights_made_in_inference_mode():
    """Tensors of inference mode have no counter of changes."""
    with torch.inference_mode():
        module, x = low_rank(), torch.randn(1, 1, 5)
        assert_current(module, x)
        module.weight_hh_l0_u.view(-1)[5] += 0.5
        assert_current(module, x)
        module.weight_hh_l0_u.data = torch.randn(132, 4)
        assert_current(module, x)


@torch.no_grad()
def test_unchanged_weights_are_packed_once(monkeypatch):
    made = []
    packed = packing.PackedLayer
    monkeypatch.setattr(packing, "PackedLayer", lambda *args: made.append(1) or packed(*args))
    module = LowRankLSTM(5, 33, 2, bidirectional=True, ranks={"weight_hh_l0": 4}, backend="fused").eval()
    for steps in (1, 40, 3, 1):
        module(torch.randn(steps, 2, 5))
    assert len(made) == 2


@torch.no_grad()
def test_packed_weights_are_freed_with_the_module():
    gc.collect()
    before = len(packing._cache)
    modules = [low_rank() for _ in range(3)]
    for module in modules:
        module(torch.randn(2, 1, 5))
    assert len(packing._cache) == before + 3
    del modules, module
    gc.collect()
    assert len(packing._cache) == before


@torch.no_grad()
def test_copies_pack_their_own_weights():
    module, x = low_rank(), torch.randn(2, 1, 5)
    assert_current(module, x)
    for other in (deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        other.weight_hh_l0_u.mul_(2.0)
        assert_current(other, x)
        assert_current(module, x)
