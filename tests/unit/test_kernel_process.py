"""The fused kernel in a process: memory, threads, forks and exit.

Dimensions: T time steps, B sequences, I input size, H hidden size, D directions.
"""

import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from kernels import assert_current, low_rank, needs_kernel

pytestmark = needs_kernel


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_modules_that_live_until_the_interpreter_exits_cause_no_warnings():
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEAK], check=True, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout + ended.stderr == ""


@torch.no_grad()
def test_an_input_that_shares_memory_with_numpy():
    module, array = low_rank(), np.random.default_rng(0).standard_normal((3, 2, 5), dtype=np.float32)
    assert_current(module, torch.from_numpy(array))
