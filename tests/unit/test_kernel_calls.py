"""What the fused kernel refuses, when it is chosen, and how compilers see it.

Dimensions: T time steps, B sequences, I input size, H hidden size, D directions.
"""

import logging
from copy import deepcopy

import pytest
import torch
from helpers import assert_near
from kernels import assert_current, low_rank, needs_kernel
from torch import nn

from slimlstm import ops
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.ops import fused, native, operator, packing

pytestmark = needs_kernel


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
def test_inputs_and_states_of_wrong_shapes_are_refused(x, h0, c0, sizes):
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
    with pytest.raises(SlimLSTMError, match=r"an input or state is torch\.float64, but the weights are torch\.float32"):
        module(torch.randn(3, 2, 5), (torch.zeros(1, 2, 33).double(), torch.zeros(1, 2, 33).double()))


@torch.no_grad()
def test_a_missing_kernel(monkeypatch, caplog):
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
def test_an_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("SLIMLSTM_ISA", "abacus")
    with pytest.raises(SlimLSTMError, match=r"SLIMLSTM_ISA is 'abacus', but this machine runs only .*portable"):
        low_rank()(torch.randn(2, 1, 5))


@torch.no_grad()
def test_inference_chooses_the_kernel():
    module, x = low_rank(backend="auto"), torch.randn(2, 1, 5)
    choice = ops.choose_backend(x, None, [module.direction("_l0")])
    assert choice.backend == "fused"
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.choose_backend(x, None, [module.direction("_l0")]).backend != "fused"


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
def test_traces_do_not_contain_the_kernel():
    module, x = low_rank(backend="auto").requires_grad_(False), torch.randn(2, 3, 2, 5)
    expected = torch.stack([module(one)[0] for one in x])
    traced = torch.jit.trace(lambda one: module(one)[0], x[0])
    torch.testing.assert_close(traced(x[1]), expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_compilers_record_one_operator_for_each_layer(bidirectional):
    module = LowRankLSTM(5, 33, 2, bidirectional=bidirectional, ranks={"weight_hh_l0": 4}).eval()
    module.store("weight_hh_l0", "int8")
    x, longer = torch.randn(3, 2, 5), torch.randn(9, 2, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    packed = len(packing._cache)
    compiled(x)
    assert len(packing._cache) == packed, "compiled calls reuse packed weights"
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2, max=100)},))
    assert [str(node.target) for node in exported.graph.nodes].count("slimlstm.layer.default") == 2
    torch.testing.assert_close(exported.module()(longer), module(longer))
    module.weight_hh_l1.mul_(2.0)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True])
def test_the_operator_passes_the_checks_of_pytorch(gradients):
    module = low_rank(bidirectional=True, bias=False).requires_grad_(gradients)
    both = [module.direction(end)._replace(cell_clip=0.5) for end in ("_l0", "_l0_reverse")]
    states = torch.randn(2, 3, 33), torch.randn(2, 3, 33, requires_grad=gradients)
    for x, sizes in ((torch.randn(4, 3, 5), None), (torch.randn(6, 5, requires_grad=gradients), torch.tensor([3, 2, 1]))):
        torch.library.opcheck(operator.layer, (x, sizes, *states, *operator.arguments(both)))


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
