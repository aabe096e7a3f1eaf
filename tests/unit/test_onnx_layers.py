"""The ONNX nodes of one layer with states and lengths, run by ONNX Runtime, against PyTorch.

T time steps, B sequences, D directions, I input size, H hidden size, P projection size (or H).
"""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from slimlstm import LowRankLSTM
from slimlstm.onnx.builder import OPSET, GraphBuilder
from slimlstm.onnx.layers import Ports, add_layer, layer_model

onnxruntime = pytest.importorskip("onnxruntime", reason="what was written is run by ONNX Runtime")
onnx = pytest.importorskip("onnx")
helper = onnx.helper

INPUTS, H = 5, 8
NEAR = {"rtol": 1e-4, "atol": 1e-5}
RANKS = {"dense": (), "ih": ("ih",), "hh": ("hh",), "both": ("ih", "hh")}
LAYERS = [
    {},
    {"bidirectional": True},
    {"bidirectional": True, "bias": False},
    {"proj_size": 3},
    {"bidirectional": True, "proj_size": 3},
]


def low_rank(kinds=(), **arguments):
    torch.manual_seed(0)
    endings = ["_l0", "_l0_reverse"][: 1 + arguments.get("bidirectional", False)]
    ranks = {f"weight_{kind}{ending}": 2 + (ending == "_l0") for kind, ending in product(kinds, endings)}
    return LowRankLSTM(INPUTS, H, **arguments, ranks=ranks).eval()


def session_of(directions, ports, reverse=False, dtype="FLOAT", form="auto"):
    """A layer as a model of its own whose inputs and outputs are the ports."""
    graph, kind = GraphBuilder("layer"), getattr(onnx.TensorProto, dtype)
    add_layer(graph, directions, ports, reverse, form)
    entries = [(name, kind, [None] * 3) for name in (ports.x, ports.h0, ports.c0) if name]
    entries += [(ports.lengths, onnx.TensorProto.INT32, [None])] if ports.lengths else []
    results = [(name, kind, [None] * 3) for name in (ports.y, ports.h, ports.c)]
    infos = ([helper.make_tensor_value_info(*info) for info in infos] for infos in (entries, results))
    model = helper.make_model(
        helper.make_graph(graph.nodes, "test", *infos, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session, **inputs):
    return [torch.from_numpy(value) for value in session.run(None, {name: one.numpy() for name, one in inputs.items()})]


def inputs_of(layer, steps, batch):
    """x [T, B, I] and states, drawn anew."""
    directions, outputs = 1 + layer.bidirectional, layer.proj_size or H
    sizes = {"x": (steps, batch, INPUTS), "h0": (directions, batch, outputs), "c0": (directions, batch, H)}
    return {name: torch.randn(size) for name, size in sizes.items()}


@pytest.mark.parametrize("kinds", RANKS.values(), ids=list(RANKS))
@pytest.mark.parametrize("arguments", LAYERS, ids=str)
@pytest.mark.parametrize("form", ["auto", "scan"])
@torch.no_grad()
def test_a_layer_with_states_is_what_pytorch_computes(kinds, arguments, form):
    layer = low_rank(kinds, **arguments)
    session = session_of(layer.layers()[0], Ports("x", "h0", "c0", "y", "h", "c"), form=form)
    for steps, batch in product((1, 7, 200), (1, 3)):
        inputs = inputs_of(layer, steps, batch)
        y, state = layer(inputs["x"], (inputs["h0"], inputs["c0"]))
        for actual, expected in zip(run(session, **inputs), (y, *state), strict=True):
            torch.testing.assert_close(actual, expected, **NEAR)


@pytest.mark.parametrize("arguments", [{"bidirectional": True}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("kinds", [(), ("ih", "hh")], ids=["dense", "factors"])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("form", ["auto", "scan"])
@torch.no_grad()
def test_sequences_may_differ_in_length(arguments, kinds, states, form):
    layer, given = low_rank(kinds, **arguments), ("h0", "c0") if states else ("", "")
    session = session_of(layer.layers()[0], Ports("x", *given, "y", "h", "c", "lengths"), form=form)
    lengths, inputs = torch.tensor([4, 9, 1]), inputs_of(layer, 9, 3)
    packed = pack_padded_sequence(inputs["x"], lengths, enforce_sorted=False)
    output, state = layer(packed, (inputs["h0"], inputs["c0"]) if states else None)
    expected = pad_packed_sequence(output)[0], *state
    found = run(session, **{name: inputs[name] for name in ("x", *filter(None, given))}, lengths=lengths.int())
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **NEAR)


@pytest.mark.parametrize("kinds", [(), ("ih", "hh")], ids=["dense", "factors"])
@pytest.mark.parametrize("form", ["auto", "scan"])
@torch.no_grad()
def test_one_direction_may_run_backward(kinds, form):
    layer = low_rank(kinds, bidirectional=True)
    session = session_of(layer.layers()[0][1:], Ports("x", "", "", "y", "h", "c", "lengths"), reverse=True, form=form)
    x, lengths = torch.randn(9, 3, INPUTS), torch.tensor([4, 9, 1])
    output, state = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    expected = pad_packed_sequence(output)[0][..., H:], state[0][1:], state[1][1:]
    for actual, wanted in zip(run(session, x=x, lengths=lengths.int()), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **NEAR)


@pytest.mark.parametrize("kinds", [(), ("hh",)], ids=["dense", "factors"])
@torch.no_grad()
def test_double_precision_is_kept(kinds):
    layer = low_rank(kinds, bidirectional=True).double()
    session = session_of(layer.layers()[0], Ports("x", "", "", "y", "h", "c"), dtype="DOUBLE")
    x = torch.randn(7, 3, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(run(session, x=x)[0], layer(x)[0], rtol=1e-10, atol=1e-10)


def saturating_matmul():
    """MatMulInteger as x86 CPUs without VNNI compute u8 times s8: sums of two products saturate at 16 bits."""
    from onnx.reference.op_run import OpRun

    class MatMulInteger(OpRun):
        op_domain = ""

        def _run(self, a, b, a_zero=0, b_zero=0):
            wide, right = a.astype(np.int64), b.astype(np.int64)
            if (a.dtype, b.dtype) != (np.uint8, np.int8):
                return (((wide - int(a_zero)) @ (right - int(b_zero))).astype(np.int32),)
            pairs = wide[..., 0::2, None] * right[0::2] + wide[..., 1::2, None] * right[1::2]
            total = pairs.clip(-(2**15), 2**15 - 1).sum(-2) - int(a_zero) * right.sum(0)
            return (total.astype(np.int32),)

    return MatMulInteger


@torch.no_grad()
def test_int8_is_exact_on_cpus_that_saturate():
    """ONNX Runtime, the reference and a saturating CPU agree at weights and inputs of the full range."""
    from onnx.reference import ReferenceEvaluator

    layer = LowRankLSTM(64, H)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        weight = layer.get_parameter(name)
        weight.copy_(torch.where(torch.rand_like(weight) < 0.8, 0.05, -0.05))
    layer.storages = {"weight_ih_l0": "int8", "weight_hh_l0": "int8"}
    model, x = layer_model(layer.layers()[0], "scan"), torch.full((3, 2, 64), 2.0)
    expected = layer(x)[0].numpy()
    for engine in (
        ReferenceEvaluator(model),
        ReferenceEvaluator(model, new_ops=[saturating_matmul()]),
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]),
    ):
        np.testing.assert_allclose(engine.run(None, {"x": x.numpy()})[0], expected, atol=2e-3)
