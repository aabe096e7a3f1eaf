"""The fused kernel with gradients on: outputs of the kernel, gradients of the plain path.

Dimensions: T time steps, B sequences, I input size, H hidden size.
"""

from copy import deepcopy

import pytest
import torch
from helpers import Problem, assert_near, factors_of, problems, with_gradients
from hypothesis import given, settings
from kernels import low_rank, needs_kernel
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

from slimlstm.bench import explain
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.lstm import LowRankLSTM

pytestmark = needs_kernel


def with_backend(module: LowRankLSTM, backend: str, dtype: torch.dtype = torch.float32) -> LowRankLSTM:
    copied = deepcopy(module).to(dtype)
    copied.backend = backend
    return copied


def gradients_of(module: nn.Module, x: torch.Tensor, *more: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of all inputs and weights for a nonlinear function of all outputs."""
    x, *more = (tensor.detach().requires_grad_() for tensor in (x, *more))
    output, (h, c) = module(x, tuple(more) or None)
    loss = output.sin().sum() + h.cos().sum() + c.square().sum()
    return list(torch.autograd.grad(loss, [x, *more, *module.parameters()]))


@settings(max_examples=2 * settings.default.max_examples)
@given(problem=problems(full_rank=False))
def test_gradients_are_those_of_the_plain_path(problem: Problem):
    lstm, inputs = problem.lstm(torch.float32), problem.inputs(torch.float32)
    module = LowRankLSTM.from_dense(lstm, factors_of(lstm, problem.ranks)).eval()
    module.backend = "fused"
    exact = {name: value.double() for name, value in inputs.items()}
    truth = with_gradients(with_backend(module, "reference", torch.float64), exact, problem.call)
    assert_near(with_gradients(module, inputs, problem.call), truth)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_clipped_layers(packed):
    module = LowRankLSTM(5, 12, 2, proj_size=4, ranks={"weight_hh_l0": 2}, cell_clip=0.1, proj_clip=0.05).eval()
    nn.utils.vector_to_parameters(3 * nn.utils.parameters_to_vector(module.parameters()), module.parameters())
    x = torch.randn(6, 3, 5)
    given = pack_padded_sequence(x, [6, 4, 1]) if packed else x
    gradients = {}
    for backend in ("fused", "reference"):
        copied = with_backend(module, backend)
        output, (h, c) = copied(given)
        loss = (output.data if packed else output).sin().sum() + h.sum() + c.sum()
        gradients[backend] = torch.autograd.grad(loss, list(copied.parameters()))
    assert float(c.detach().abs().max()) == pytest.approx(0.1)
    torch.testing.assert_close(gradients["fused"], gradients["reference"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_int8_has_the_outputs_of_the_kernel_and_the_gradients_of_the_plain_path(layers):
    module = LowRankLSTM(5, 33, layers, bidirectional=True, ranks={"weight_hh_l0": 4}).eval()
    for name in module.matrix_shapes:
        module.store(name, "int8")
    x = torch.randn(7, 3, 5)
    output, _ = module(x)
    with torch.no_grad():
        assert torch.equal(module(x)[0], output)
    plain = with_backend(module, "reference")
    assert not torch.equal(plain(x)[0], output)
    inputs, weights = [x.requires_grad_()], torch.randn_like(output)
    found = torch.autograd.grad((module(x)[0] * weights).sum(), inputs + list(module.parameters()))
    expected = torch.autograd.grad((plain(x)[0] * weights).sum(), inputs + list(plain.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        # A second layer gets slightly other inputs, the outputs of the kernel.
        assert (ours - theirs).norm() <= (1e-5 if layers == 1 else 0.05) * theirs.norm()


def test_evaluation_takes_the_kernel_while_gradients_are_on():
    module, x = low_rank(backend="auto"), torch.randn(4, 2, 5)
    (found,) = explain(module, x).layers
    assert (found.backend, found.reason) == ("fused", "the kernel for evaluation on the CPU")
    (found,) = explain(module.train(), x).layers
    assert (found.backend, found.reason[:36]) == ("training", "the module is in training mode and g")
    (found,) = explain(LowRankLSTMCell(5, 8).eval(), x[0]).layers
    assert found.backend == "fused"
    (found,) = explain(LowRankLSTMCell(5, 8).train(), x[0]).layers
    assert found.backend == "reference"


def test_the_kernel_refuses_to_train_by_name():
    module = low_rank().train()
    with pytest.raises(SlimLSTMError, match="cannot run: the module is in training mode and gradients are on"):
        module(torch.randn(2, 1, 5))
    with torch.no_grad():
        module(torch.randn(2, 1, 5))


def test_cells():
    cell = LowRankLSTMCell(5, 33, ranks={"weight_hh": 4}).eval()
    x, h, c = torch.randn(3, 5), torch.randn(3, 33), torch.randn(3, 33)
    found = []
    for training in (False, True):
        inputs = [tensor.detach().requires_grad_() for tensor in (x, h, c)]
        outputs = cell.train(training)(inputs[0], (inputs[1], inputs[2]))
        assert ("_Layer" in str(outputs[0].grad_fn.next_functions)) == (not training)
        loss = sum(output.sin().sum() for output in outputs)
        found.append(torch.autograd.grad(loss, [*inputs, *cell.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("give", ["x", "h0", "c0", "weight_hh_l0_v"])
def test_one_gradient_alone(give):
    module = low_rank().requires_grad_(False)
    x, h0, c0 = torch.randn(2, 1, 5), torch.randn(1, 1, 33), torch.randn(1, 1, 33)
    leaf = {"x": x, "h0": h0, "c0": c0}.get(give, module.weight_hh_l0_v).requires_grad_()
    found = [torch.autograd.grad(module(x, (h0, c0))[0].sum(), leaf)[0] for module.backend in ("fused", "reference")]
    torch.testing.assert_close(*found)


def test_inputs_that_are_computed_from_each_other():
    """The gradient of x counts the path through the states once."""
    module, x = low_rank(), torch.randn(4, 2, 5, requires_grad=True)
    found = []
    for backend in ("fused", "reference"):
        module.backend = backend
        h0 = x.sum((0, 2))[None, :, None].expand(1, 2, 33)
        found.append(torch.autograd.grad(module(x, (h0, h0.sin()))[0].square().sum(), x, create_graph=True)[0].detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients():
    module, x = LowRankLSTM(5, 8, 2, ranks={"weight_hh_l0": 2}).eval(), torch.randn(4, 2, 5, requires_grad=True)
    found = []
    for module.backend in ("fused", "reference"):
        (d_x,) = torch.autograd.grad(module(x)[0].pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(d_x.sin().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_forward_mode():
    module, x, direction = LowRankLSTM(5, 8, ranks={"weight_hh_l0": 2}).eval(), torch.randn(4, 2, 5), torch.randn(4, 2, 5)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0], x)
    expected = torch.tensordot(jacobian, direction, 3)
    with forward_ad.dual_level():
        output = module(forward_ad.make_dual(x, direction))[0]
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected)
        with torch.no_grad():
            assert forward_ad.unpack_dual(module(forward_ad.make_dual(x, direction))[0]).tangent is not None
    torch.testing.assert_close(torch.func.jvp(lambda x: module(x)[0], (x,), (direction,))[1], expected)


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobians(vectorize):
    module, x = LowRankLSTM(5, 8, ranks={"weight_hh_l0": 2}).eval(), torch.randn(4, 2, 5)
    expected = torch.autograd.functional.jacobian(lambda x: with_backend(module, "reference")(x)[0], x)
    found = torch.autograd.functional.jacobian(lambda x: module(x)[0], x, vectorize=vectorize)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.jacrev(lambda x: module(x)[0])(x), expected)


def test_weights_changed_before_the_backward_pass_are_an_error():
    module, x = low_rank(), torch.randn(4, 2, 5)
    output, _ = module(x)
    with torch.no_grad():
        module.weight_hh_l0_u.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_empty_batches():
    module = low_rank()
    module(torch.zeros(3, 0, 5))[0].sum().backward()
    assert not module.weight_hh_l0_u.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_compilers_compute_gradients(bidirectional):
    torch.compiler.reset()  # tests share one limit of recompilations
    module = LowRankLSTM(5, 33, 2, bidirectional=bidirectional, ranks={"weight_hh_l0": 4}).eval()
    x = torch.randn(3, 2, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients_of(compiled, x), gradients_of(module, x))
    states = torch.randn(2 + 2 * bidirectional, 2, 33), torch.randn(2 + 2 * bidirectional, 2, 33)
    torch.testing.assert_close(gradients_of(compiled, x, *states), gradients_of(module, x, *states))


def test_exported_programs_compute_gradients():
    module, x = low_rank(backend="auto"), torch.randn(3, 2, 5)
    exported = torch.export.export(module, (x,)).module()
    given = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = [torch.autograd.grad(one(x)[0].sin().sum(), x) for one, x in zip((exported, module), given, strict=True)]
    torch.testing.assert_close(*found)


def test_traces_do_not_contain_the_kernel_while_gradients_are_on():
    module, x = low_rank(backend="auto"), torch.randn(2, 3, 2, 5)
    traced = torch.jit.trace(module, (x[0],))
    torch.testing.assert_close(traced(x[1])[0], module(x[1])[0])
