"""Packed weights: packed once, again after every change, and freed with their module.

Dimensions: T time steps, B sequences, I input size, H hidden size, D directions.
"""

import gc
import pickle
from copy import deepcopy

import pytest
import torch
from kernels import assert_current, low_rank, needs_kernel
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
@pytest.mark.parametrize("steps", [1, packing.FULL_CHECK_ROWS], ids=["short", "long"])
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


@torch.no_grad()
def test_long_calls_detect_any_change_of_data():
    module, x = low_rank(), torch.randn(packing.FULL_CHECK_ROWS, 1, 5)
    for parameter in module.parameters():
        for index in (0, parameter.numel() // 2, parameter.numel() - 1):
            assert_current(module, x)
            parameter.data.view(-1)[index] += 0.5
            assert_current(module, x)


@torch.no_grad()
def test_forget():
    module, x = low_rank(), torch.randn(1, 1, 5)
    assert_current(module, x)
    for index in range(20):
        module.weight_hh_l0_u.data.view(-1)[index * 7 + 3] += 0.5
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
    for copy in (deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        copy.weight_hh_l0_u.mul_(2.0)
        assert_current(copy, x)
        assert_current(module, x)
