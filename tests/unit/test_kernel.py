"""The fused kernel against the reference, for each instruction set, and all that could make it stale, leak or fall.

Dimensions: T time steps, B sequences, I input size, H hidden size, D directions.
"""

import gc
import logging
import math
import os
import pickle
import platform
import resource
import shutil
import subprocess
import sys
import threading
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Problem, assert_near, factors_of, problems
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimlstm import ops
from slimlstm.errors import SlimLSTMError
from slimlstm.methods import STORAGES, rounded
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.masks import apply_mask
from slimlstm.ops import fused, native, operator, packing, reference
from slimlstm.ops.weights import Direction, flat

needs_kernel = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
pytestmark = needs_kernel
INSTRUCTION_SETS = native.instruction_sets()


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request, monkeypatch):
    monkeypatch.setenv("SLIMLSTM_ISA", request.param)
    packing.forget()
    yield request.param
    packing.forget()


def compressed(problem: Problem, backend: str) -> LowRankLSTM:
    lstm = problem.lstm(torch.float32)
    module = LowRankLSTM.from_dense(lstm, factors_of(lstm, problem.ranks)).eval()
    module.backend = backend
    return module


def low_rank(hidden: int = 33, backend: str = "fused", **settings) -> LowRankLSTM:
    ranks = {"weight_ih_l0": min(4, hidden), "weight_hh_l0": max(1, hidden // 8)}
    return LowRankLSTM(5, hidden, ranks=ranks, backend=backend, **settings).eval()


def by_reference(module: LowRankLSTM, *inputs):
    """What a copy of the module computes in float64."""
    exact = deepcopy(module).double()
    exact.backend = "reference"
    output, (h, c) = exact(*inputs)
    return {"output": output, "h_n": h, "c_n": c}


def assert_current(module: LowRankLSTM, x: torch.Tensor) -> None:
    """The module computes what its weights say now."""
    output, (h, c) = module(x)
    assert_near({"output": output, "h_n": h, "c_n": c}, by_reference(module, x.double()))


@torch.no_grad()
def check(problem: Problem, threads: int = 1) -> None:
    module, inputs = compressed(problem, "fused"), problem.inputs(torch.float32)
    exact = deepcopy(module).double()
    exact.backend = "reference"
    truth = problem.call(exact, {name: value.double() for name, value in inputs.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        assert_near(problem.call(module, inputs), truth)


@pytest.mark.usefixtures("isa")
@settings(max_examples=150)
@given(problem=st.booleans().flatmap(problems))
def test_every_variant_is_the_reference(problem):
    check(problem)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, 4, -2, -3])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("batch", [1, 19])
@pytest.mark.parametrize("hidden", [7, 129])
def test_threads_and_chunks(hidden, batch, projected, threads):
    proj_size = hidden // 2 if projected else 0
    arguments = {"input_size": 70, "hidden_size": hidden, "proj_size": proj_size, "num_layers": 1}
    arguments |= {"bidirectional": True, "batch_first": False, "bias": True}
    ranks = {"weight_ih_l0": 20, "weight_hh_l0": min(17, proj_size or hidden)}
    for lengths, form in (((40,) * batch, "batched"), (tuple(range(40, 40 - batch, -1)), "sorted")):
        check(Problem(arguments, lengths, form, True, ranks), threads)
        check(Problem(arguments, lengths, form, True, {}), threads)


@pytest.mark.usefixtures("isa")
@torch.no_grad()
def test_gates_over_the_whole_range():
    """One unit, whose gates are the input: sigmoid and tanh at every magnitude, saturated and not."""
    values = torch.cat([torch.linspace(-100, 100, 4001), torch.logspace(-30, 30, 400), -torch.logspace(-30, 30, 400)])
    for gate in range(4):
        ih = torch.zeros(4, 1)
        ih[gate] = 1.0
        weights = Direction(ih, torch.zeros(4, 1), torch.full((4,), 0.3), torch.zeros(4), None)
        x, h0, c0 = values[None, :, None], torch.zeros(1, len(values), 1), torch.ones(1, len(values), 1)
        found = fused.layer(x, None, h0, c0, [weights])
        exact = Direction(ih.double(), torch.zeros(4, 1).double(), *(torch.full((4,), v).double() for v in (0.3, 0)), None)
        truth = reference.layer(x.double(), None, h0.double(), c0.double(), [exact])
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=3e-7)


@pytest.mark.usefixtures("isa")
@torch.no_grad()
def test_nan_is_kept_where_it_is():
    module = low_rank()
    x = torch.randn(3, 2, 5)
    x[1, 0, 2] = torch.nan
    output, (h, c) = module(x)
    assert output[0].isfinite().all()
    assert output[:, 1].isfinite().all()
    assert output[1:, 0].isnan().all()
    assert h[0, 0].isnan().all()
    assert c[0, 0].isnan().all()


@pytest.mark.usefixtures("isa")
@torch.no_grad()
def test_nothing_beside_the_tensors_is_touched():
    """Inputs and outputs between poisoned neighbours: none is read, none written."""
    for hidden in (1, 7, 33, 129):
        module = low_rank(hidden)
        memory = torch.full((3, 2 * 3 * 5), torch.nan)
        memory[1] = torch.randn(30)
        assert_current(module, memory[1].view(2, 3, 5))
        assert memory[0].isnan().all()
        assert memory[2].isnan().all()
        for size in (hidden + 1, 200 * hidden):
            # The allocator hands this memory out again, as outputs and as workspace.
            torch.full((size,), torch.nan)
        assert_current(module, torch.randn(2, 3, 5))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("batch", [0, 1])
@torch.no_grad()
def test_nothing_to_do(steps, batch):
    if steps and batch:
        pytest.skip("there is something to do")
    weights = low_rank().direction("_l0")
    h0, c0 = torch.randn(1, batch, 33), torch.randn(1, batch, 33)
    output, h, c = fused.layer(torch.zeros(steps, batch, 5), None, h0, c0, [weights])
    assert output.shape == (steps, batch, 33)
    assert torch.equal(h, h0)
    assert torch.equal(c, c0)


@torch.no_grad()
def test_inputs_of_any_strides():
    module = low_rank(batch_first=True)
    for x in (torch.randn(7, 3, 5).transpose(0, 1), torch.randn(3, 5, 7).transpose(1, 2), torch.randn(3, 7, 10)[..., ::2]):
        assert_current(module, x)
    assert_current(module, torch.randn(1, 1, 5).expand(3, 7, 5))


@torch.no_grad()
def test_weights_of_any_strides():
    module = low_rank()
    module.set_factors("weight_hh_l0", nn.Parameter(torch.randn(4, 132).T * 0.2), nn.Parameter(torch.randn(4, 66)[:, ::2]))
    assert_current(module, torch.randn(3, 2, 5))
    module.weight_hh_l0_v.data[2, 3] += 5.0
    assert_current(module, torch.randn(packing.FULL_CHECK_ROWS, 2, 5))


# ---- storages ----


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, -3])
@pytest.mark.parametrize(("storage", "bound"), [("bfloat16", 2e-6), ("int8", 0.02)])
@pytest.mark.parametrize("hidden", [1, 7, 33, 129])
@pytest.mark.parametrize("how", ["dense", "factored", "projected"])
@torch.no_grad()
def test_rounded_weights(how, hidden, storage, bound, threads, monkeypatch):
    if how == "projected" and hidden == 1:
        pytest.skip("there is nothing to project to")
    rank = None if how == "dense" else max(1, hidden // 8)
    ranks = {f"weight_{kind}_l0{end}": rank for kind in ("ih", "hh") for end in ("", "_reverse")} if rank else {}
    proj_size = hidden // 2 if how == "projected" else 0
    module = LowRankLSTM(hidden + 2, hidden, ranks=ranks, proj_size=proj_size, bidirectional=True).eval()
    for name in module.matrix_shapes:
        module.store(name, storage)
    x = torch.randn(20, 3, hidden + 2)
    truth = by_reference(module, x.double())
    module.backend = "fused"
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    output, (h, c) = module(x)
    for ours, theirs in ((output, truth["output"]), (h, truth["h_n"]), (c, truth["c_n"])):
        assert (ours - theirs).norm() <= bound * theirs.norm()


def of_a_wide_range(how: str, hidden: int) -> tuple[LowRankLSTM, torch.Tensor]:
    """Inputs and states over three orders of magnitude, which weights make up for; int8. The module and the ranges [H]."""
    ranks = {"weight_ih_l0": max(1, hidden // 4), "weight_hh_l0": max(1, hidden // 4)} if how == "factored" else {}
    module = LowRankLSTM(hidden, hidden, ranks=ranks, proj_size=hidden // 2 if how == "projected" else 0).eval()
    ranges = torch.logspace(-2, 1, hidden)
    for name, shape in module.matrix_shapes.items():
        matrix = getattr(module, f"{name}_v" if name in ranks else name)
        matrix.div_(ranges[: shape[1]])
        module.store(name, "int8")
    module.backend = "fused"
    return module, ranges


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, -3])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("hidden", [7, 33, 129])
@pytest.mark.parametrize("how", ["dense", "factored", "projected"])
@torch.no_grad()
def test_int8_bears_inputs_of_any_range(how, hidden, batch, threads, monkeypatch):
    """One step, so that the states are as given. With eight bits alone it is off by a tenth and more."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    module, ranges = of_a_wide_range(how, hidden)
    outputs = module.proj_size or hidden
    x, h0 = torch.randn(1, batch, hidden) * ranges, torch.randn(1, batch, outputs) * ranges[:outputs]
    inputs = x, (h0, torch.randn(1, batch, hidden))
    output, (h, c) = module(*inputs)
    truth = by_reference(module, x.double(), (h0.double(), inputs[1][1].double()))
    # What is projected next is no gate, and is rounded to eight bits whatever its range.
    bound = 0.03 if how == "projected" else 0.02
    for ours, theirs in ((output, truth["output"]), (h, truth["h_n"]), (c, truth["c_n"])):
        assert (ours - theirs).norm() <= bound * theirs.norm()


@pytest.mark.usefixtures("isa")
@torch.no_grad()
def test_int8_rounds_a_sequence_alike_whatever_is_beside_it():
    module, ranges = of_a_wide_range("dense", 33)
    quiet, loud = 1e-3 * torch.randn(5, 1, 33), torch.randn(5, 1, 33) * ranges
    for x in (quiet, loud):
        alone, _ = module(x)
        for index, beside in enumerate(([x, loud, quiet], [loud, x, quiet], [quiet, quiet, x])):
            found = module(torch.cat(beside, 1))[0][:, index : index + 1]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_rounding_is_that_of_the_kernel(storage):
    """Inputs that every storage holds exactly leave only the weights to be rounded, here those that are rounded already."""
    module = LowRankLSTM(3, 5)
    module.store("weight_ih_l0", storage)
    module.bias_ih_l0.zero_()
    module.bias_hh_l0.zero_()
    before = module.weight_ih_l0.clone()
    module.store("weight_ih_l0", storage)
    assert torch.equal(module.weight_ih_l0, before)
    module.backend = "fused"
    assert_current(module, torch.eye(3)[None])


@pytest.mark.usefixtures("isa")
@torch.no_grad()
def test_rounding_keeps_what_is_not_a_number_and_zeros():
    for storage in STORAGES:
        module = low_rank()
        for name in module.matrix_shapes:
            module.store(name, storage)
        for value in (torch.nan, torch.inf):
            x = torch.randn(3, 2, 5)
            x[1, 0, 2] = value
            output, _ = module(x)
            assert output[:, 1].isfinite().all()
            assert output[0].isfinite().all()
            assert value == torch.inf or output[1:, 0].isnan().all()
        assert module(torch.zeros(3, 2, 5))[0].isfinite().all()
        assert module(torch.full((3, 2, 5), 1e-42))[0].isfinite().all()


def test_masked_weights_are_rounded_where_they_are_kept():
    module, mask = LowRankLSTM(5, 33), torch.rand(4 * 33, 33) < 0.3
    apply_mask(module, "weight_hh_l0", mask)
    before = module.weight_hh_l0.detach().clone()
    module.store("weight_hh_l0", "int8")
    assert torch.equal(module.weight_hh_l0, rounded(before, "int8"))
    assert not module.weight_hh_l0[~mask].any()


def test_storages_refused():
    with pytest.raises(SlimLSTMError, match="only float32 weights can be kept in int8"):
        low_rank().double().store("weight_hh_l0", "int8")
    computed = low_rank()
    nn.utils.parametrizations.weight_norm(computed, "weight_hh_l0_u")
    with pytest.raises(SlimLSTMError, match="weight_hh_l0_u is computed from several parameters"):
        computed.store("weight_hh_l0", "int8")
    with pytest.raises(SlimLSTMError, match="no storage is called 'int4'"):
        low_rank().store("weight_hh_l0", "int4")
    with pytest.raises(SlimLSTMError, match="no matrix 'bias' to store"):
        low_rank().store("bias", "int8")


# ---- weights that change ----


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
    """The allocator likes to give memory that was just freed to the next who asks for as much."""
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
def test_changed_weights_are_packed_anew(change, steps):
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
def test_any_change_of_data_is_seen_by_long_calls():
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
    """They have no count of changes at all."""
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
def test_packed_weights_die_with_the_module():
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
def test_copies_pack_their_own():
    module, x = low_rank(), torch.randn(2, 1, 5)
    assert_current(module, x)
    for copy in (deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        copy.weight_hh_l0_u.mul_(2.0)
        assert_current(copy, x)
        assert_current(module, x)


# ---- refusals and choices ----


def test_gradients_are_refused_by_name_and_computed_by_auto():
    module = low_rank()
    with pytest.raises(SlimLSTMError, match="gradients are wanted"):
        module(torch.randn(2, 1, 5))
    module.backend = "auto"
    module(torch.randn(2, 1, 5))[0].sum().backward()
    assert module.weight_hh_l0_u.grad is not None


@pytest.mark.parametrize("give", ["x", "h0", "c0"])
def test_gradients_of_inputs_alone(give):
    module = low_rank(backend="auto").requires_grad_(False)
    x, h0, c0 = torch.randn(2, 1, 5), torch.zeros(1, 1, 33), torch.zeros(1, 1, 33)
    wanted = {"x": x, "h0": h0, "c0": c0}[give].requires_grad_()
    module(x, (h0, c0))[0].sum().backward()
    assert wanted.grad is not None


@torch.no_grad()
def test_other_dtypes_and_devices_are_refused():
    module = low_rank()
    with pytest.raises(SlimLSTMError, match=r"the input is torch\.float64"):
        module.double()(torch.randn(2, 1, 5).double())
    with pytest.raises(SlimLSTMError, match="the input is on meta"):
        module.float()(torch.randn(2, 1, 5, device="meta"))
    module.weight_hh_l0_u.data = module.weight_hh_l0_u.data.double()
    with pytest.raises(SlimLSTMError, match=r"takes float32 weights on the CPU, not Parameter of torch\.float64"):
        module(torch.randn(2, 1, 5))


@pytest.mark.parametrize(
    ("x", "h0", "c0", "sizes"),
    [
        ((3, 2, 6), (1, 2, 33), (1, 2, 33), None),
        ((3, 2, 5), (1, 2, 32), (1, 2, 33), None),
        ((3, 2, 5), (1, 2, 33), (1, 1, 33), None),
        ((3, 2, 5), (2, 2, 33), (2, 2, 33), None),
        ((6, 5), (1, 3, 33), (1, 3, 33), [2, 2, 2]),
        ((6, 5), (1, 3, 33), (1, 3, 33), [3, 1, 2]),
        ((6, 5), (1, 3, 33), (1, 3, 33), [3, 3, 0]),
        ((6, 5), (1, 3, 33), (1, 3, 33), [3, 2]),
    ],
)
@torch.no_grad()
def test_shapes_refused(x, h0, c0, sizes):
    sizes = None if sizes is None else torch.tensor(sizes)
    with pytest.raises(ValueError, match=r"do not fit a layer of 5 inputs|batch_sizes"):
        fused.layer(torch.zeros(x), sizes, torch.zeros(h0), torch.zeros(c0), [low_rank().direction("_l0")])


@torch.no_grad()
def test_weights_that_do_not_fit_are_refused():
    weights, states = low_rank().direction("_l0"), torch.zeros(1, 2, 33)
    wrong = [
        weights._replace(ih=torch.zeros(128, 5)),
        weights._replace(hh=(torch.zeros(132, 4), torch.zeros(3, 33))),
        weights._replace(bias_hh=torch.zeros(131)),
        weights._replace(hr=torch.zeros(33, 32)),
        weights._replace(hh=torch.zeros(132, 32)),
    ]
    for one in wrong:
        with pytest.raises(SlimLSTMError, match="do not fit each other"):
            fused.layer(torch.zeros(3, 2, 5), None, states, states, [one])


@torch.no_grad()
def test_states_of_another_dtype_are_refused():
    module = low_rank()
    with pytest.raises(SlimLSTMError, match="the states are not of the input's device and dtype"):
        module(torch.randn(3, 2, 5), (torch.zeros(1, 2, 33).double(), torch.zeros(1, 2, 33).double()))


@torch.no_grad()
def test_a_kernel_that_is_not_there(monkeypatch, caplog):
    monkeypatch.setattr(native, "missing", "the compiled kernel could not be imported (no compiler)")
    native.warn_missing.cache_clear()
    module, x = low_rank(), torch.randn(2, 1, 5)
    with pytest.raises(SlimLSTMError, match=r"cannot run: the compiled kernel could not be imported \(no compiler\)"):
        module(x)
    module.backend = "auto"
    with caplog.at_level(logging.WARNING, "slimlstm"):
        assert_current(module, x)
        module(x)
    assert [record.message for record in caplog.records] == [
        "running PyTorch's operators, which are slower: the compiled kernel could not be imported (no compiler)"
    ]
    with pytest.raises(SlimLSTMError, match="could not be imported"):
        native.instruction_set()


@torch.no_grad()
def test_an_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setenv("SLIMLSTM_ISA", "abacus")
    with pytest.raises(SlimLSTMError, match=r"SLIMLSTM_ISA is 'abacus', but this machine runs .*portable"):
        low_rank()(torch.randn(2, 1, 5))


@torch.no_grad()
def test_inference_chooses_the_kernel():
    module, x = low_rank(backend="auto"), torch.randn(2, 1, 5)
    choice = ops.choose(x, None, [module.direction("_l0")])
    assert choice.backend == "fused"
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.choose(x, None, [module.direction("_l0")]).backend != "fused"


@torch.no_grad()
def test_masked_weights_are_not_packed_at_every_call():
    class Half(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    module = low_rank(backend="auto")
    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0_u", Half())
    before = len(packing._cache)
    module(torch.randn(2, 1, 5))
    assert len(packing._cache) == before
    module.backend = "fused"
    module(torch.randn(2, 1, 5))


@torch.no_grad()
def test_traces_go_round_the_kernel():
    module, x = low_rank(backend="auto").requires_grad_(False), torch.randn(2, 3, 2, 5)
    expected = torch.stack([module(one)[0] for one in x])
    traced = torch.jit.trace(lambda one: module(one)[0], x[0], check_trace=False)
    torch.testing.assert_close(traced(x[1]), expected[1])


@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_compilers_see_one_operator_a_layer(bidirectional):
    module = LowRankLSTM(5, 33, 2, bidirectional=bidirectional, ranks={"weight_hh_l0": 4}).eval()
    module.store("weight_hh_l0", "int8")
    x, longer = torch.randn(3, 2, 5), torch.randn(9, 2, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    packed = len(packing._cache)
    compiled(x)
    assert len(packing._cache) == packed, "compiled calls find what was packed"
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2, max=100)},))
    assert [str(node.target) for node in exported.graph.nodes].count("slimlstm.layer.default") == 2
    torch.testing.assert_close(exported.module()(longer), module(longer))
    module.weight_hh_l1.mul_(2.0)
    torch.testing.assert_close(compiled(x), module(x))


@torch.no_grad()
def test_the_operator_keeps_the_rules_of_pytorch():
    weights = low_rank(bidirectional=True).requires_grad_(False)
    both = [weights.direction("_l0"), weights.direction("_l0_reverse")]
    states = torch.randn(2, 3, 33), torch.randn(2, 3, 33)
    for x, sizes in ((torch.randn(4, 3, 5), None), (torch.randn(6, 5), torch.tensor([3, 2, 1]))):
        weights = flat(both), ",".join(["float32"] * 4), [0.5, math.inf] * 2
        torch.library.opcheck(operator.layer, (x, sizes, *states, *weights))


@torch.no_grad()
def test_cells_run_the_kernel():
    cell = LowRankLSTMCell(5, 33, ranks={"weight_hh": 4})
    exact = deepcopy(cell).double()
    for shape in ((5,), (3, 5)):
        x = torch.randn(shape)
        h, c = cell(x)
        truth = exact(x.double(), (h.double(), c.double()))
        assert_near(dict(zip("hc", cell(x, (h, c)), strict=True)), dict(zip("hc", truth, strict=True)))
    assert any(cell.weight_hh_u.data_ptr() in packed.state for packed in packing._cache.values())


# ---- in the large ----


@torch.no_grad()
def test_memory_stays_constant():
    module, x = low_rank(), torch.randn(2, 1, 5)
    state = None
    for call in range(10_000):
        _, state = module(x, state)
        if call == 2_000:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000, "kilobytes"


@torch.no_grad()
def test_repacking_keeps_memory_constant():
    module, x = low_rank(256), torch.randn(2, 1, 5)
    for call in range(600):
        module.weight_hh_l0_u.mul_(1.0)
        module(x)
        if call == 200:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000, "kilobytes"


@pytest.mark.skipif(not shutil.which("g++") or platform.libc_ver()[0] != "glibc", reason="this takes g++ and glibc")
def test_warm_calls_allocate_nothing(tmp_path):
    root = Path(__file__).parents[2]
    sources = [root / "src/slimlstm/csrc" / f"{name}.cpp" for name in ("layer", "pack", "pool", "portable")]
    program = tmp_path / "allocations"
    command = ["g++", "-std=c++17", "-O1", "-pthread", f"-I{sources[0].parent}", root / "tests/allocations.cpp"]
    subprocess.run([*command, *sources, "-o", program], check=True)
    counts = subprocess.run([program], check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    assert set(counts) == {"100 0"}
    assert len(counts) == 24


def test_two_threads_at_once():
    modules = [low_rank(hidden) for hidden in (33, 129)]
    inputs = [torch.randn(steps, 2, 5) for steps in (1, 3, 60)]
    with torch.no_grad():
        expected = [[module(x)[0] for x in inputs] for module in modules]
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(100):
                for module, outputs in zip(modules, expected, strict=True):
                    for x, output in zip(inputs, outputs, strict=True):
                        if not torch.allclose(module(x)[0], output, rtol=1e-5, atol=1e-6):
                            wrong.append(x.shape)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, signal, torch
from slimlstm.modules.lstm import LowRankLSTM
torch.set_num_threads(2)
torch.manual_seed(0)
module = LowRankLSTM(64, 256, ranks={"weight_hh_l0": 64}, backend="fused").eval()
x = torch.randn(50, 8, 64)
with torch.no_grad():
    expected = module(x)[0]
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if torch.allclose(module(x)[0], expected, rtol=1e-5, atol=1e-6) else 1)
    assert torch.allclose(module(x)[0], expected, rtol=1e-5, atol=1e-6)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_fork():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


LEAK = """
import torch
from slimlstm.modules.lstm import LowRankLSTM
module = LowRankLSTM(5, 33, ranks={"weight_hh_l0": 4}).eval().requires_grad_(False)
x = torch.randn(2, 1, 5)
with torch.no_grad():
    module(x)
    traced = torch.jit.trace(module, x)
"""


def test_modules_that_live_until_the_interpreter_exits_cause_no_warnings():
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEAK], check=True, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout + ended.stderr == ""


@torch.no_grad()
def test_an_input_that_shares_memory_with_numpy():
    module, array = low_rank(), np.random.default_rng(0).standard_normal((3, 2, 5), dtype=np.float32)
    assert_current(module, torch.from_numpy(array))
