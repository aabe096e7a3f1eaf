"""The ONNX nodes of one layer with states and lengths, run by ONNX Runtime, against PyTorch.

T time steps, B sequences, D directions, I input size, H hidden size, P projection size (or H).
"""

from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from slimlstm import LowRankLSTM
from slimlstm.onnx.layers import OPSET, Graph, Ports, add_layer

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


def session_of(directions, ports, reverse=False, dtype="FLOAT"):
    """A layer as a model of its own whose inputs and outputs are the ports."""
    graph, kind = Graph("layer"), getattr(onnx.TensorProto, dtype)
    add_layer(graph, directions, ports, reverse)
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
@torch.no_grad()
def test_a_layer_with_states_is_what_pytorch_computes(kinds, arguments):
    layer = low_rank(kinds, **arguments)
    session = session_of(layer.layers()[0], Ports("x", "h0", "c0", "y", "h", "c"))
    for steps, batch in product((1, 7, 200), (1, 3)):
        inputs = inputs_of(layer, steps, batch)
        y, state = layer(inputs["x"], (inputs["h0"], inputs["c0"]))
        for actual, expected in zip(run(session, **inputs), (y, *state), strict=True):
            torch.testing.assert_close(actual, expected, **NEAR)


@pytest.mark.parametrize("arguments", [{"bidirectional": True}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("kinds", [(), ("ih", "hh")], ids=["dense", "factors"])
@pytest.mark.parametrize("states", [False, True])
@torch.no_grad()
def test_sequences_may_differ_in_length(arguments, kinds, states):
    layer, given = low_rank(kinds, **arguments), ("h0", "c0") if states else ("", "")
    session = session_of(layer.layers()[0], Ports("x", *given, "y", "h", "c", "lengths"))
    lengths, inputs = torch.tensor([4, 9, 1]), inputs_of(layer, 9, 3)
    packed = pack_padded_sequence(inputs["x"], lengths, enforce_sorted=False)
    output, state = layer(packed, (inputs["h0"], inputs["c0"]) if states else None)
    expected = pad_packed_sequence(output)[0], *state
    found = run(session, **{name: inputs[name] for name in ("x", *filter(None, given))}, lengths=lengths.int())
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **NEAR)


@pytest.mark.parametrize("kinds", [(), ("ih", "hh")], ids=["dense", "factors"])
@torch.no_grad()
def test_one_direction_may_run_backward(kinds):
    layer = low_rank(kinds, bidirectional=True)
    session = session_of(layer.layers()[0][1:], Ports("x", "", "", "y", "h", "c", "lengths"), reverse=True)
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
