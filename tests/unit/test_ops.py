"""Every backend against PyTorch's own LSTM, and the choice between them.

Dimensions: T time steps, B sequences, H hidden size, r rank; see also ``helpers``.
"""

from copy import deepcopy

import pytest
import torch
from helpers import (
    BACKENDS,
    EXACT,
    Problem,
    assert_near,
    assert_same,
    factor_gradients,
    factors_of,
    problems,
    replaced,
    with_gradients,
)
from hypothesis import HealthCheck, given, settings
from kernels import needs_kernel
from torch.nn.utils.rnn import pack_padded_sequence

from slimlstm import ops
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.ops import elementwise, native
from slimlstm.ops.weights import Direction

every_backend = pytest.mark.parametrize("backend", BACKENDS)
# A problem has many sides: fewer examples meet hardly any bidirectional packed input with states.
thorough = settings(max_examples=4 * settings.default.max_examples)


def low_rank(problem: Problem, backend: str, dtype: torch.dtype = torch.float64) -> LowRankLSTM:
    lstm = problem.lstm(dtype)
    module = LowRankLSTM.from_dense(lstm, factors_of(lstm, problem.ranks))
    module.backend = backend
    return module


@every_backend
@thorough
@given(problem=problems(full_rank=True))
def test_full_rank_is_the_original(backend, problem):
    lstm, inputs = problem.lstm(), problem.inputs()
    expected = factor_gradients(with_gradients(lstm, inputs, problem.call), factors_of(lstm, problem.ranks))
    assert_same(with_gradients(low_rank(problem, backend), inputs, problem.call), expected, **EXACT)


@every_backend
@thorough
@given(problem=problems(full_rank=False))
def test_low_rank_is_an_lstm_with_the_product_of_the_factors(backend, problem):
    lstm, inputs = problem.lstm(), problem.inputs()
    factors = factors_of(lstm, problem.ranks)
    expected = factor_gradients(with_gradients(replaced(lstm, factors), inputs, problem.call), factors)
    assert_same(with_gradients(low_rank(problem, backend), inputs, problem.call), expected, **EXACT)


@every_backend
@given(problem=problems(full_rank=False))
def test_inference_computes_what_training_does(backend, problem):
    module, inputs = low_rank(problem, backend), problem.inputs()
    expected = {name: value.detach() for name, value in problem.call(module, inputs).items()}
    for inference in (torch.no_grad, torch.inference_mode):
        with inference():
            assert_same(problem.call(module, inputs), expected, **EXACT)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(problem=problems(full_rank=False))
def test_backends_agree_to_the_precision_of_the_dtype(backend, dtype, problem):
    module, inputs = low_rank(problem, backend, dtype), problem.inputs(dtype)
    exact = deepcopy(module).double()
    exact.backend = "reference"
    truth = with_gradients(exact, {name: value.double() for name, value in inputs.items()}, problem.call)
    results = with_gradients(module, inputs, problem.call)
    assert {value.dtype for value in results.values()} == {dtype}
    assert_near(results, truth)


@thorough
@given(problem=problems(full_rank=False, plain=True))
def test_the_training_backend_is_an_lstm_with_the_product_of_the_factors(problem):
    lstm, inputs = problem.lstm(), problem.inputs()
    factors = factors_of(lstm, problem.ranks)
    expected = factor_gradients(with_gradients(replaced(lstm, factors), inputs, problem.call), factors)
    assert_same(with_gradients(low_rank(problem, "training"), inputs, problem.call), expected, **EXACT)


@pytest.fixture
def training_by(request, monkeypatch):
    """Train by one of the implementations of a step."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "missing", "the test says so")
        return
    isa, _, per_step = request.param.partition(", ")
    monkeypatch.setenv("SLIMLSTM_ISA", isa)
    if per_step:
        monkeypatch.setattr(elementwise, "LARGEST_SMALL", 0)


every_step = pytest.mark.parametrize(
    "training_by",
    ["PyTorch", *(isa + way for isa in native.instruction_sets() for way in ("", ", by steps"))],
    indirect=True,
)


@every_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems(full_rank=False, plain=True))
@pytest.mark.slow
def test_the_training_backend_is_right_to_the_precision_of_the_dtype(training_by, dtype, autocast, problem):
    inputs = problem.inputs(dtype)
    exact = low_rank(problem, "reference", dtype).double()
    truth = with_gradients(exact, {name: value.double() for name, value in inputs.items()}, problem.call)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = with_gradients(low_rank(problem, "training", dtype), inputs, problem.call)
    values = {name: value for name, value in results.items() if name in ("output", "h_n", "c_n")}
    assert {value.dtype for value in values.values()} == {torch.bfloat16 if autocast else dtype}
    assert_near({name: value.bfloat16() if autocast else value for name, value in results.items()}, truth)


@every_step
@pytest.mark.parametrize("hidden", [1, 7, 33, 129])
@pytest.mark.parametrize("batch", [1, 7])
def test_the_training_backend_at_awkward_sizes(training_by, hidden, batch):
    ranks = {"weight_hh_l0": 3, "weight_ih_l0_reverse": 2} if hidden > 3 else {}
    module, x = LowRankLSTM(5, hidden, bidirectional=True, ranks=ranks, backend="training"), torch.randn(4, batch, 5)
    found, exact = [], deepcopy(module).double()
    exact.backend = "reference"
    for one, inputs in ((module, x), (exact, x.double())):
        output, (h, c) = one(inputs.requires_grad_())
        loss = output.sin().sum() + h.cos().sum() + c.square().sum()
        found.append([output, h, c, *torch.autograd.grad(loss, [inputs, *one.parameters()])])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


def test_the_training_backend_has_gradients_of_gradients():
    module, x = LowRankLSTM(5, 8, ranks={"weight_hh_l0": 2}, bidirectional=True), torch.randn(4, 2, 5, requires_grad=True)
    found = []
    for module.backend in ("training", "reference"):
        (d_x,) = torch.autograd.grad(module(x)[0].pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(d_x.sin().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_the_training_backend_passes_gradients_on_from_frozen_weights_and_last_states():
    module, x = LowRankLSTM(3, 8, ranks={"weight_hh_l0": 2}, backend="training"), torch.randn(5, 2, 3)
    module.requires_grad_(False)
    expected = torch.autograd.functional.jacobian(lambda x: sum(module(x)[1]), x)
    module.backend = "reference"
    torch.testing.assert_close(torch.autograd.functional.jacobian(lambda x: sum(module(x)[1]), x), expected)


@pytest.mark.parametrize("frozen", ["weight_hh_l0_u", "weight_hh_l0_v"])
def test_the_training_backend_leaves_a_frozen_factor_alone(frozen):
    module, x = LowRankLSTM(3, 8, ranks={"weight_hh_l0": 2}, backend="training"), torch.randn(5, 2, 3)
    module.get_parameter(frozen).requires_grad_(False)
    gradients = {}
    for module.backend in ("training", "reference"):
        module.zero_grad()
        module(x)[0].square().sum().backward()
        gradients[module.backend] = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert gradients["training"].pop(frozen) is gradients["reference"].pop(frozen) is None
    torch.testing.assert_close(gradients["training"], gradients["reference"])


@pytest.mark.parametrize(
    ("settings", "packed", "what"),
    [({}, True, "packed"), ({"proj_size": 4}, False, "a projection"), ({"cell_clip": 1.0}, False, "clipping")],
    ids=["packed", "projection", "clipping"],
)
def test_the_training_backend_refuses_what_it_cannot_do(settings, packed, what):
    x = torch.zeros(2, 1, 3)
    with pytest.raises(SlimLSTMError, match=f"cannot do {what}"):
        LowRankLSTM(3, 8, **settings, backend="training")(pack_padded_sequence(x, [2]) if packed else x)


@every_backend
def test_an_empty_batch_has_empty_outputs(backend):
    module = LowRankLSTM(3, 4, ranks={"weight_hh_l0": 2}, backend=backend)
    output, (h, c) = module(torch.zeros(2, 0, 3))
    assert (output.shape, h.shape, c.shape) == ((2, 0, 4), (1, 0, 4), (1, 0, 4))


@every_backend
@pytest.mark.parametrize("is_training", [True, False])
def test_no_steps_leave_the_states(backend, is_training):
    module = LowRankLSTM(3, 4, ranks={"weight_hh_l0": 2}, bidirectional=True, backend=backend).train(is_training)
    x, states = torch.zeros(0, 2, 3, requires_grad=True), (torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    output, (h, c) = module(x, states)
    output.sum().backward()
    assert (output.shape, x.grad.shape) == ((0, 2, 8), (0, 2, 3))
    assert torch.equal(h, states[0])
    assert torch.equal(c, states[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@every_backend
@given(problem=problems(full_rank=True))
def test_full_rank_is_the_original_on_a_gpu(backend, problem):
    lstm, module = problem.lstm(torch.float32), low_rank(problem, backend, torch.float32)
    inputs = problem.inputs(torch.float32)
    exact = {name: value.double() for name, value in inputs.items()}
    truth = factor_gradients(
        with_gradients(lstm.double(), exact, problem.call),
        {name: (u.double(), v.double()) for name, (u, v) in factors_of(problem.lstm(torch.float32), problem.ranks).items()},
    )
    # TensorFloat-32, which cuDNN uses unasked, keeps 10 bits of what it multiplies.
    with torch.backends.cudnn.flags(allow_tf32=False):
        on_gpu = {name: value.cuda() for name, value in inputs.items()}
        results = with_gradients(module.cuda(), on_gpu, problem.call)
    assert {value.device.type for value in results.values()} == {"cuda"}
    assert_near({name: value.cpu() for name, value in results.items()}, truth)


def test_an_unknown_backend_is_refused():
    module = LowRankLSTM(3, 4, backend="magic")
    with pytest.raises(SlimLSTMError, match="no backend is called 'magic'; use 'auto' or one of 'reference', 'dense'"):
        module(torch.zeros(2, 1, 3))


def chosen(steps: int, batch: int, hidden: int, rank: int | None, grad: bool = False, packed: bool = False) -> ops.Choice:
    matrix = (4 * hidden, hidden)
    hh = torch.zeros(matrix) if rank is None else (torch.zeros(matrix[0], rank), torch.zeros(rank, matrix[1]))
    if grad:
        (hh if rank is None else hh[0]).requires_grad_()
    x = torch.zeros(steps * batch, hidden) if packed else torch.zeros(steps, batch, hidden)
    sizes = torch.full((steps,), batch) if packed else None
    return ops.choose_backend(x, sizes, [Direction(torch.zeros(matrix), hh, None, None, None)], training=grad)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("case", "backend", "reason"),
    [
        ({"steps": 1, "batch": 1, "hidden": 256, "rank": None}, "dense", "hh is dense"),
        ({"steps": 1, "batch": 1, "hidden": 256, "rank": 32}, "reference", "rebuilding hh would cost more"),
        ({"steps": 1000, "batch": 1, "hidden": 256, "rank": 32}, "dense", "rebuilt once for 1000 steps"),
        # The activations of a large batch cost the loop more than its thin products save.
        ({"steps": 50, "batch": 256, "hidden": 256, "rank": 64}, "dense", "rebuilt once for 50 steps"),
        ({"steps": 200, "batch": 64, "hidden": 64, "rank": 16}, "dense", "rebuilt once for 200 steps"),
    ],
    ids=["dense hh", "one step", "long", "large batch", "long, large batch, small H"],
)
def test_choice(case, backend, reason, packed):
    choice = chosen(**case, packed=packed)
    assert (choice.backend, reason in choice.reason) == (backend, True), choice


def test_gradients_count_only_where_they_are_recorded():
    with torch.no_grad():
        assert chosen(1, 1, 256, 32, grad=True).backend == "reference"


@pytest.mark.parametrize(
    ("hidden", "rank", "low", "backend"),
    [
        (512, 64, False, "training"),
        (512, 400, False, "dense"),
        (256, 32, False, "dense"),
        (1150, None, False, "dense"),
        (1150, None, True, "training"),
        (400, None, True, "dense"),
    ],
    ids=["large", "hardly thinner", "small", "dense hh", "dense hh below float32", "smaller dense hh below float32"],
)
def test_choice_in_training_without_the_kernel(hidden, rank, low, backend, monkeypatch):
    monkeypatch.setattr(native, "missing", "the test says so")
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        assert chosen(7, 2, hidden, rank, grad=True).backend == backend
        assert chosen(7, 2, hidden, rank, grad=True, packed=True).backend == "dense"


@needs_kernel
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("hidden", "rank"), [(16, None), (16, 2), (1150, None), (1150, 64)])
def test_choice_in_training(hidden, rank, low):
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        assert chosen(7, 2, hidden, rank, grad=True).backend == "training"
        assert chosen(7, 2, hidden, rank, grad=True, packed=True).backend == "dense"


@needs_kernel
@pytest.mark.parametrize(
    ("steps", "hidden", "rank", "low", "backend"),
    [
        (300, 512, None, False, "dense"),
        (300, 512, 64, False, "training"),
        (300, 512, None, True, "training"),
        (300, 256, None, False, "training"),
        (100, 512, None, False, "training"),
    ],
    ids=["many inputs", "factors", "bfloat16", "small", "few inputs"],
)
def test_large_dense_matrices_train_in_onednn(steps, hidden, rank, low, backend):
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        assert chosen(steps, 2, hidden, rank, grad=True).backend == backend
        with torch.backends.mkldnn.flags(enabled=False):
            assert chosen(steps, 2, hidden, rank, grad=True).backend == "training"


def test_other_devices_get_dense():
    x, hh = torch.zeros(1, 1, 256, device="meta"), (torch.zeros(1024, 32), torch.zeros(32, 256))
    assert ops.choose_backend(x, None, [Direction(hh[0], hh, None, None, None)]) == ("dense", "the input is on meta")


@pytest.fixture
def ran(monkeypatch):
    """The backends that have run, in order."""
    names = []
    for name, backend in ops.BACKENDS.items():
        monkeypatch.setitem(
            ops.BACKENDS, name, lambda *args, name=name, backend=backend: names.append(name) or backend(*args)
        )
    return names


def test_auto_runs_what_was_chosen(ran, monkeypatch):
    monkeypatch.setattr(ops.fused.native, "missing", "there is no kernel")
    module = LowRankLSTM(5, 256, ranks={"weight_hh_l0": 32})
    with torch.no_grad():
        module(torch.zeros(1, 1, 5))
        module(torch.zeros(1000, 1, 5))
    module(torch.zeros(1, 1, 5))
    assert ran == ["reference", "dense", "dense"]
