"""Modules that run the fused kernel, and the outputs that they should have; shared by the tests of the kernel.

Dimensions: T time steps, B sequences, I input size, H hidden size, D directions.
"""

from copy import deepcopy

import pytest
import torch
from helpers import Problem, assert_near, factors_of

from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.ops import native, packing

needs_kernel = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
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
    """Return the outputs of a copy of the module in float64, by the reference."""
    exact = deepcopy(module).double()
    exact.backend = "reference"
    output, (h, c) = exact(*inputs)
    return {"output": output, "h_n": h, "c_n": c}


def assert_current(module: LowRankLSTM, x: torch.Tensor) -> None:
    """Assert that the module computes with its current weights."""
    output, (h, c) = module(x)
    assert_near({"output": output, "h_n": h, "c_n": c}, by_reference(module, x.double()))
