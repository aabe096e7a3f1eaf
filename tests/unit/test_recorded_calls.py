"""Calls that PyTorch records, traces or compiles: correct at other sizes, or refused in words."""

from copy import deepcopy

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from slimlstm import LowRank, Quantize, SlimLSTMError, compress_
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.lstm import LowRankLSTM

INPUTS, SIZES = 5, [(1, 1), (7, 1), (1, 3), (4, 2)]


class Tagger(nn.Module):
    def __init__(self, hidden, bidirectional):
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, hidden, bidirectional=bidirectional)
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


CONFIGS = {"factors": LowRank(rank=4), "int8": Quantize("int8")}


def tagger(config, hidden=16, bidirectional=False):
    torch.manual_seed(0)
    model = Tagger(hidden, bidirectional).eval()
    compress_(model, CONFIGS[config])
    return model


def assert_right_at_other_sizes(model, recorded, gradients=False):
    for steps, batch in SIZES:
        x = torch.randn(steps, batch, INPUTS, requires_grad=gradients)
        torch.testing.assert_close(recorded(x), model(x), rtol=0.05, atol=5e-3)
        if gradients:
            found = [torch.autograd.grad(one(x).square().sum(), x)[0] for one in (recorded, model)]
            torch.testing.assert_close(*found, rtol=0.05, atol=5e-3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "gradients"])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 2)], ids=str)
@pytest.mark.parametrize(("config", "hidden"), [("factors", 16), ("factors", 400), ("int8", 16)])
def test_traces_are_right_at_other_sizes(config, hidden, sizes, gradients, training):
    model = tagger(config, hidden, bidirectional=True).train(training)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (torch.randn(*sizes, INPUTS),))
        assert_right_at_other_sizes(model, traced, gradients)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_of_cells(tmp_path):
    cell = LowRankLSTMCell(INPUTS, 8, ranks={"weight_hh": 2}).eval()
    traced = torch.jit.trace(cell, (torch.randn(2, INPUTS),))
    torch.jit.save(traced, tmp_path / "cell.pt")
    x = torch.randn(4, INPUTS)
    torch.testing.assert_close(torch.jit.load(tmp_path / "cell.pt")(x), cell(x))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("is_warm", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("config", CONFIGS)
def test_make_fx_records_the_layer_and_its_gradients(config, is_warm, training):
    model, x, y = tagger(config).train(training), torch.randn(3, 2, INPUTS), torch.randn(3, 2, INPUTS)

    def gradient(x):
        return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))[0]

    for function in (model, gradient):
        if is_warm:
            function(x)
        torch.testing.assert_close(make_fx(function)(x)(y), function(y), rtol=0.05, atol=5e-3)


def test_make_fx_records_a_cell():
    cell = LowRankLSTMCell(INPUTS, 8, ranks={"weight_hh": 2}).eval()
    x = torch.randn(2, INPUTS)
    torch.testing.assert_close(make_fx(cell)(torch.randn(2, INPUTS))(x), cell(x))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("config", CONFIGS)
def test_compiled_models(config, training):
    torch.compiler.reset()
    model = tagger(config).train(training)
    assert_right_at_other_sizes(model, torch.compile(model, backend="aot_eager", fullgraph=True), gradients=True)


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "gradients"])
@pytest.mark.parametrize("config", CONFIGS)
def test_exported_programs(config, gradients, tmp_path):
    model, dimensions = tagger(config), dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (torch.randn(3, 2, INPUTS),), dynamic_shapes=(dimensions,))
        torch.export.save(program, tmp_path / "model.pt2")
        assert_right_at_other_sizes(model, torch.export.load(tmp_path / "model.pt2").module(), gradients)


def test_programs_of_the_dense_backend_need_no_slimlstm():
    model = tagger("factors")
    model.lstm.backend = "dense"
    program = torch.export.export(model, (torch.randn(3, 2, INPUTS),))
    assert not any("slimlstm" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_pytorchs_own_onnx_export_is_dense_and_right(dynamo, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model, path = tagger("factors", 400), tmp_path / "model.onnx"
    axes = dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    shapes = {"dynamic_shapes": (axes,)} if dynamo else {"dynamic_axes": {"x": {0: "t", 1: "b"}}}
    torch.onnx.export(model, (torch.randn(3, 2, INPUTS),), path, input_names=["x"], dynamo=dynamo, verbose=False, **shapes)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # PyTorch's newer exporter writes the number of steps into the graph of nn.LSTM, too.
    for steps, batch in [(3, 2)] if dynamo else SIZES:
        x = torch.randn(steps, batch, INPUTS)
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_remedy_for_scripts():
    model, x = tagger("factors"), torch.randn(3, 2, INPUTS)
    dense = deepcopy(model)
    dense.lstm = model.lstm.to_dense()
    torch.testing.assert_close(torch.jit.script(dense)(x), model(x))


@pytest.mark.parametrize("module", [LowRankLSTM(INPUTS, 8), LowRankLSTMCell(INPUTS, 8)], ids=["LSTM", "cell"])
def test_symbolic_traces_are_refused_with_the_remedy(module):
    model = nn.Sequential(module).eval()
    with pytest.raises(SlimLSTMError, match="whose is_leaf_module returns True"):
        fx.symbolic_trace(model)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, LowRankLSTM | LowRankLSTMCell) or super().is_leaf_module(module, name)

    traced, x = fx.GraphModule(model, Tracer().trace(model)), torch.randn(2, INPUTS)
    torch.testing.assert_close(traced(x), model(x))
