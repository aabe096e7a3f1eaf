"""The fused kernel against the reference, for each instruction set.

Dimensions: T time steps, B sequences, I input size, H hidden size, D directions.
"""

from copy import deepcopy

import pytest
import torch
from helpers import Problem, assert_near, problems
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import assert_current, compressed, isa, low_rank, needs_kernel  # noqa: F401
from torch import nn

from slimlstm.ops import fused, reference
from slimlstm.ops.weights import Direction

pytestmark = needs_kernel


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
@settings(max_examples=4 * settings.default.max_examples)
@given(problem=st.booleans().flatmap(problems))
def test_every_variant_is_the_reference(problem):
    check(problem)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, 4, -2, -3])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("batch", [1, 19])
@pytest.mark.parametrize("hidden", [7, 129])
@pytest.mark.slow
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
    """With one unit whose gates are the input, sigmoid and tanh are tested at every magnitude."""
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
def test_nan_stays_in_its_sequence():
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
def test_memory_beside_the_tensors_is_neither_read_nor_written():
    for hidden in (1, 7, 33, 129):
        module = low_rank(hidden)
        memory = torch.full((3, 2 * 3 * 5), torch.nan)
        memory[1] = torch.randn(30)
        assert_current(module, memory[1].view(2, 3, 5))
        assert memory[0].isnan().all()
        assert memory[2].isnan().all()
        for size in (hidden + 1, 200 * hidden):
            # The allocator reuses this memory for outputs and workspace.
            torch.full((size,), torch.nan)
        assert_current(module, torch.randn(2, 3, 5))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("batch", [0, 1])
@torch.no_grad()
def test_empty_inputs(steps, batch):
    if steps and batch:
        pytest.skip("not empty")
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
    assert_current(module, torch.randn(256, 2, 5))
