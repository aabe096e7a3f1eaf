"""The fused kernel with weights in bfloat16 and int8.

Dimensions: T time steps, B sequences, I input size, H hidden size, D directions.
"""

import math

import pytest
import torch
from kernels import assert_current, by_reference, isa, low_rank, needs_kernel  # noqa: F401
from torch import nn

from slimlstm import LowRank, Quantize, compress_
from slimlstm.demo.model import embedded_model, held_out_tokens
from slimlstm.errors import SlimLSTMError
from slimlstm.methods import KERNEL_FORMATS, rounded
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.masks import apply_mask
from slimlstm.ops import packing

pytestmark = needs_kernel


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, -3])
@pytest.mark.parametrize(("storage", "bound"), [("bfloat16", 2e-6), ("int8", 0.02)])
@pytest.mark.parametrize("hidden", [1, 7, 33, 129])
@pytest.mark.parametrize("how", ["dense", "factored", "projected"])
@torch.no_grad()
def test_rounded_weights(how, hidden, storage, bound, threads, monkeypatch):
    if how == "projected" and hidden == 1:
        pytest.skip("the projection needs at least two units")
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
    """Return an int8 module for inputs and states over three orders of magnitude, and their ranges [H].

    The weights compensate for the ranges.
    """
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
def test_int8_is_accurate_for_inputs_of_any_range(how, hidden, batch, threads, monkeypatch):
    """One step, so that the states have the given range. With eight bits alone the error is a tenth and more."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    module, ranges = of_a_wide_range(how, hidden)
    outputs = module.proj_size or hidden
    x, h0 = torch.randn(1, batch, hidden) * ranges, torch.randn(1, batch, outputs) * ranges[:outputs]
    inputs = x, (h0, torch.randn(1, batch, hidden))
    output, (h, c) = module(*inputs)
    truth = by_reference(module, x.double(), (h0.double(), inputs[1][1].double()))
    # The input of a projection is always rounded to eight bits.
    bound = 0.03 if how == "projected" else 0.02
    for ours, theirs in ((output, truth["output"]), (h, truth["h_n"]), (c, truth["c_n"])):
        assert (ours - theirs).norm() <= bound * theirs.norm()


@torch.no_grad()
def test_int8_logits_differ_from_the_reference_only_by_rounded_inputs(monkeypatch):
    """The difference that the documentation of ``slimlstm.ops`` states."""
    model = embedded_model()
    compress_(model, Quantize("int8"))
    tokens = held_out_tokens()[:280].view(8, 35).t()

    def logits(backend: str) -> torch.Tensor:
        for module in model.modules():
            if isinstance(module, LowRankLSTM):
                module.backend = backend
        return model(tokens)[0]

    def difference() -> float:
        packing.forget()
        return float((logits("fused") - exact).norm() / exact.norm())

    exact = logits("reference")
    assert 1e-4 < difference() < 4e-3
    gains = packing._gains
    # Large enough for fifteen bits everywhere, and small enough for no more.
    monkeypatch.setattr(packing, "_gains", lambda directions: [1500.0 if gain else 0.0 for gain in gains(directions)])
    assert 1e-6 < difference() < 3e-5, "with fifteen bits for all inputs"


LARGE = [1e2, 1e4, 1e5, 1.7e9, 3e38]


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("threads", [1, -2])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (Quantize("int8"), {}),
        (Quantize("int4"), {"bidirectional": True}),
        (Quantize("int8"), {"proj_size": 5}),
        (LowRank(rank=8, storage="int8"), {}),
    ],
    ids=["int8", "int4", "projected", "factors"],
)
def test_one_feature_that_is_much_larger_than_the_others(config, options, threads, size, monkeypatch):
    """Fifteen bits of the largest feature do not hold the others. The weights of the large one are zero."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = nn.Sequential(nn.LSTM(16, 32, **options)).eval()
    for name, parameter in model[0].named_parameters():
        if name.startswith("weight_ih"):
            parameter.data[:, 0] = 0.0
    compress_(model, config)
    x = torch.randn(9, 6, 16)
    x[..., 0] = size
    found, expected = model(x)[0], model[0].to_dense()(x)[0]
    assert (found - expected).norm() <= 0.02 * expected.norm()


@torch.no_grad()
def test_a_clipping_layer_takes_features_of_very_different_sizes():
    module = LowRankLSTM(16, 32, cell_clip=0.5).eval()
    module.weight_ih_l0[:, 0] = 0.0
    compress_(nn.Sequential(module), Quantize("int8"))
    x = torch.randn(9, 6, 16)
    x[..., 0] = 1e6
    found = module(x)[0]
    module.backend = "reference"
    torch.testing.assert_close(found, module(x)[0])


@pytest.mark.usefixtures("isa")
@torch.no_grad()
def test_int8_results_do_not_depend_on_other_sequences_of_the_batch():
    module, ranges = of_a_wide_range("dense", 33)
    quiet, loud = 1e-3 * torch.randn(5, 1, 33), torch.randn(5, 1, 33) * ranges
    for x in (quiet, loud):
        alone, _ = module(x)
        for index, beside in enumerate(([x, loud, quiet], [loud, x, quiet], [quiet, quiet, x])):
            found = module(torch.cat(beside, 1))[0][:, index : index + 1]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("storage", KERNEL_FORMATS)
@torch.no_grad()
def test_rounded_weights_are_packed_exactly(storage):
    """The inputs are exact in every storage, so that only weights are rounded, and these are rounded already."""
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
def test_rounding_keeps_nan_and_zero():
    for storage in KERNEL_FORMATS:
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


def test_masked_weights_are_rounded():
    module, mask = LowRankLSTM(5, 33), torch.rand(4 * 33, 33) < 0.3
    apply_mask(module, "weight_hh_l0", mask)
    before = module.weight_hh_l0.detach().clone()
    module.store("weight_hh_l0", "int8")
    assert torch.equal(module.weight_hh_l0, rounded(before, "int8"))
    assert not module.weight_hh_l0[~mask].any()


def test_impossible_storages_are_refused():
    with pytest.raises(SlimLSTMError, match="only float32 weights can be kept in int8"):
        low_rank().double().store("weight_hh_l0", "int8")
    computed = low_rank()
    nn.utils.parametrizations.weight_norm(computed, "weight_hh_l0_u")
    with pytest.raises(SlimLSTMError, match="weight_hh_l0_u is computed from several parameters"):
        computed.store("weight_hh_l0", "int8")
    with pytest.raises(SlimLSTMError, match="no storage is called 'int9'"):
        low_rank().store("weight_hh_l0", "int9")
    with pytest.raises(SlimLSTMError, match="no matrix is called 'bias'"):
        low_rank().store("bias", "int8")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("storage", ["int8", "int6", "int5", "int4", "int3"])
@pytest.mark.parametrize("hidden", [7, 33, 129])
@torch.no_grad()
def test_the_kernel_holds_low_bit_weights_without_loss(hidden, storage):
    """An input of a single 1 is exact in int8, so only the weights could be inexact."""
    module = LowRankLSTM(hidden, hidden).eval()
    module.weight_hh_l0.zero_()
    for name in module.matrix_shapes:
        module.store(name, storage)
    assert module.kernel_format("weight_ih_l0") == "int8"
    x = torch.eye(hidden)[None]
    truth = by_reference(module, x.double())["output"]
    module.backend = "fused"
    assert (module(x)[0] - truth).norm() <= 1e-6 * truth.norm()


def in_bits(monkeypatch, bits: int) -> None:
    """Make the kernel pack int8 weights in so many bits, where they fit."""
    monkeypatch.setattr(packing, "_least_in_four_bits", lambda _: 0 if bits == 4 else math.inf)
    packing.forget()


def packed_bytes(module: LowRankLSTM) -> int:
    return packing.packed_layer(module.layers()[0]).layer.bytes()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, -3])
@pytest.mark.parametrize(("steps", "batch"), [(5, 1), (5, 2), (3, 7), (2, 30)])
@pytest.mark.parametrize(("storage", "hidden"), [("int4", 40), ("int4", 129), ("int3", 65)])
@pytest.mark.parametrize("how", ["dense", "factored", "projected"])
@torch.no_grad()
def test_four_bits_give_the_same_results_as_eight(how, storage, hidden, steps, batch, threads, monkeypatch):
    """Inputs of wide ranges, in one of two calls, take remainders too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    module, ranges = of_a_wide_range(how, hidden)
    for name in module.matrix_shapes:
        module.store(name, storage)
    x = torch.randn(steps, batch, hidden)
    found = {}
    for bits in (8, 4):
        in_bits(monkeypatch, bits)
        found[bits] = [*module(x * 1e-3)[1], module(x * ranges)[0]]
    assert all(map(torch.equal, found[8], found[4]))


@pytest.mark.usefixtures("isa")
@torch.no_grad()
def test_four_bits_take_half_the_memory_where_they_hold_the_weights(monkeypatch):
    module = LowRankLSTM(128, 64).eval()
    for storage, fits in (("int4", True), ("int3", True), ("int5", False), ("int8", False)):
        for name in module.matrix_shapes:
            nn.init.normal_(getattr(module, name))
            module.store(name, storage)
        sizes = []
        for bits in (8, 4):
            in_bits(monkeypatch, bits)
            sizes.append(packed_bytes(module))
        assert sizes == [256 * 192, 256 * 99 if fits else 256 * 192]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e-42])
@torch.no_grad()
def test_unusual_weights_in_four_bits(value, monkeypatch):
    module = LowRankLSTM(64, 64, backend="fused").eval()
    for name in module.matrix_shapes:
        module.store(name, "int4")
    module.weight_hh_l0[3] = value
    module.weight_ih_l0[:] = value if value == 0 else module.weight_ih_l0
    found = []
    for bits in (8, 4):
        in_bits(monkeypatch, bits)
        found.append(module(torch.ones(2, 2, 64))[0])
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("instructions", "hidden", "storage"),
    [("avx512_vnni", 128, "int8"), ("avx512_vnni", 512, "int4"), ("avx2", 128, "int4")],
)
def test_four_bits_are_read_where_they_are_faster(instructions, hidden, storage):
    module = LowRankLSTM(hidden, hidden, backend="fused").eval()
    for name in module.matrix_shapes:
        module.store(name, "int8")
    assert packing._packed_storages([module.direction("_l0")], instructions) == [storage, storage]
