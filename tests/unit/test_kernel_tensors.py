"""Tensors that a pointer does not describe, and numbers that formats cannot hold: right, or refused in words."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from slimlstm import LowRank, LowRankLSTM, Prune, Quantize, SlimLSTMError, compress_
from slimlstm.methods.semi_nmf import semi_nmf
from slimlstm.methods.svd import svd
from slimlstm.methods.weighted import WeightedSVD
from slimlstm.ops.native import missing

IN, H, T, B = 6, 8, 3, 2

pytestmark = pytest.mark.skipif(bool(missing), reason="the kernel is not compiled")


def pair(**settings):
    torch.manual_seed(0)
    dense = nn.LSTM(IN, H, **settings).eval()
    return dense, LowRankLSTM.from_dense(dense).eval()


def negated(*shape):
    """A view with the negative bit, as ``.conj().imag`` gives it."""
    return torch.randn(*shape, dtype=torch.complex64).conj().imag


STATES = {
    "input": lambda: (negated(T, B, IN), None),
    "states": lambda: (torch.randn(T, B, IN), (negated(1, B, H), negated(1, B, H))),
    "one state": lambda: (torch.randn(T, B, IN), (torch.zeros(1, B, H), negated(1, B, H))),
    "not contiguous": lambda: (negated(B, T, IN).transpose(0, 1), None),
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_negated_views_have_their_own_numbers(make):
    dense, ours = pair()
    x, states = make()
    with torch.no_grad():
        torch.testing.assert_close(ours(x, states)[0], dense(x, states)[0])


def test_negated_weights_are_refused():
    _, ours = pair()
    ours.weight_ih_l0.data = negated(4 * H, IN)
    with torch.no_grad(), pytest.raises(SlimLSTMError, match="a weight is a negated view"):
        ours(torch.randn(T, B, IN))


def test_tangents_are_computed():
    dense, ours = pair()
    x, direction, step = torch.randn(T, B, IN), torch.randn(T, B, IN), 1e-3
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, direction))[0]).tangent
    with torch.no_grad():
        expected = (dense(x + step * direction)[0] - dense(x - step * direction)[0]) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_batch_sizes_of_other_integers(dtype):
    dense, ours = pair()
    packed = pack_padded_sequence(torch.randn(T, B, IN), torch.tensor([T, 1]))
    other = PackedSequence(packed.data, packed.batch_sizes.to(dtype))
    with torch.no_grad():
        torch.testing.assert_close(ours(other)[0].data, dense(packed)[0].data)


def test_very_wide_int8_matrices_do_not_overflow():
    """All inputs of one sign, and more columns than 32 bits can sum."""
    width = 140_000
    lstm = LowRankLSTM(width, 1).eval()
    with torch.no_grad():
        lstm.weight_ih_l0.fill_(1e-6)
    model = nn.ModuleList([lstm])
    compress_(model, Quantize("int8"))
    x = torch.ones(1, 1, width)
    with torch.no_grad():
        found = model[0](x)[0]
        expected = model[0].to_dense().eval()(x)[0]
    torch.testing.assert_close(found, expected)


INFINITE = {
    "input": lambda x, h: (x, None),
    "state": lambda x, h: (torch.zeros_like(x), (h, torch.zeros_like(h))),
}


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("make", INFINITE.values(), ids=INFINITE)
def test_infinite_inputs_saturate_as_in_pytorch(make, value, storage):
    _, ours = pair()
    model = nn.ModuleList([ours])
    if storage:
        compress_(model, Quantize(storage))
    dense = model[0].to_dense().eval()
    x, h = torch.randn(T, B, IN), torch.randn(1, B, H)
    x[0, 0, 1] = h[0, 1, 2] = value
    with torch.no_grad():
        (found, _), (expected, _) = model[0](*make(x, h)), dense(*make(x, h))
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0.05, atol=0.02)


SCALES = [1e-320, 1e-200, 1e-30, 1.0, 1e30, 1e200]


@pytest.mark.parametrize("inputs", SCALES)
@pytest.mark.parametrize("gradients", [None, *SCALES])
def test_weighted_factors_are_finite_for_moments_of_any_size(inputs, gradients):
    torch.manual_seed(0)
    w, roots = torch.randn(12, 8), (torch.randn(30, 8).double(), torch.randn(30, 12).double())
    a, g = (root.T @ root / 30 for root in roots)
    expected = WeightedSVD(w, a, None if gradients is None else g).factors(3)
    found = WeightedSVD(w, a * inputs, None if gradients is None else g * gradients).factors(3)
    torch.testing.assert_close(found.u @ found.v, expected.u @ expected.v, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("solver", [svd, semi_nmf])
def test_factors_are_finite_for_weights_of_any_size(solver, scale):
    torch.manual_seed(0)
    w = torch.randn(12, 8)
    found = solver(scale * w, 8)
    torch.testing.assert_close((found.u @ found.v) / scale, w, rtol=0.1, atol=0.3)


NO_THREADS = """
import resource, torch, slimlstm
torch.set_num_threads(1)
lstm = slimlstm.LowRankLSTM(256, 512).eval()
x = torch.randn(64, 8, 256)
with torch.no_grad():
    expected = lstm(x)[0]
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), used + (4 << 20)))
    for _ in range(3):
        torch.set_num_threads(8)
        found = lstm(x)[0]
        torch.set_num_threads(1)  # PyTorch's own operators end the process without more threads
        assert torch.equal(found, expected)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
@pytest.mark.slow
def test_without_more_threads_the_present_ones_do_the_work():
    """A thread needs room for its stack, which the limit on memory denies."""
    subprocess.run([sys.executable, "-c", NO_THREADS], check=True, timeout=60)


@pytest.mark.parametrize("config", [Prune(keep=0.5), LowRank(rank=2), Quantize("int8")], ids=["masks", "factors", "int8"])
def test_a_compressed_module_that_has_run_can_be_copied(config):
    _, ours = pair()
    model = nn.Sequential(ours)
    with torch.no_grad():
        model(torch.randn(T, B, IN))
        compress_(model, config)
        x = torch.randn(T, B, IN)
        expected = model(x)[0]
        assert torch.equal(copy.deepcopy(model)(x)[0], expected)
