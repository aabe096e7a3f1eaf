"""Forms of LSTMs that other tools write: each is read, compressed where it is, and computes the same."""

import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_files import INPUTS, RANK, H, feed, lstm_parts, run, save, written_out

from slimlstm import LowRank, LowRankLSTM, Quantize, SlimLSTMError
from slimlstm.onnx.builder import OPSET, GraphBuilder
from slimlstm.onnx.calibrate import calibrate_graph
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.find import find_lstms
from slimlstm.onnx.graph import graphs_of
from slimlstm.onnx.layers import Ports, add_layer
from slimlstm.onnx.probes import ProbedModel
from slimlstm.onnx.reading import read_model
from slimlstm.onnx.rows import observed_rows

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
T, B = 5, 3
WIDE = 64
"""The size of LSTMs of integers, whose names and nodes would outweigh smaller factors."""


def codes(array, axes, unsigned=False):
    """Integers, scales and zero points of a weight [D, 4H, n], with one scale for all numbers along ``axes``."""
    scale = (np.abs(array).max(axes, keepdims=True) / 127).astype(np.float32)
    integers = np.round(array / scale)
    zero = np.full_like(scale, 128 if unsigned else 0)
    return (integers + zero).astype(np.uint8 if unsigned else np.int8), scale, zero


def dequantize(direction, per_channel=False, unsigned=False):
    """Weights as integers behind DequantizeLinear."""

    def build(folder):
        node, weights = lstm_parts(np.random.default_rng(0), direction, hidden=WIDE)
        nodes, constants, axis = [], [weights[2]], {"axis": 1} if per_channel else {}
        for weight in weights[:2]:
            array = numpy_helper.to_array(weight)
            integers, scale, zero = codes(array, (0, 2) if per_channel else (0, 1, 2), unsigned)
            flat = [part.reshape(-1) if per_channel else part.reshape(()) for part in (scale, zero.astype(integers.dtype))]
            parts = {f"{weight.name}_{name}": part for name, part in zip("qsz", (integers, *flat), strict=True)}
            constants += [numpy_helper.from_array(part, name) for name, part in parts.items()]
            nodes.append(helper.make_node("DequantizeLinear", list(parts), [weight.name], **axis))
        return save(folder / "model.onnx", [*nodes, node], constants, node.output[:1])

    return build


def quantized_operator(direction, per_channel=False, unsigned=False, widened=False):
    """ONNX Runtime's DynamicQuantizeLSTM, whose integers are transposed; or ONNX's LSTM with the same numbers."""

    def build(folder):
        node, weights = lstm_parts(np.random.default_rng(0), direction, hidden=WIDE)
        constants, extra = [weights[2]], []
        for weight in weights[:2]:
            integers, scale, zero = codes(numpy_helper.to_array(weight), 2 if per_channel else (1, 2), unsigned)
            if widened:
                constants.append(numpy_helper.from_array((integers - zero) * scale, weight.name))
                continue
            shape = (len(scale), -1) if per_channel else (len(scale),)
            constants.append(numpy_helper.from_array(np.ascontiguousarray(integers.transpose(0, 2, 1)), weight.name))
            for name, part in (("s", scale), ("z", zero.astype(integers.dtype))):
                constants.append(numpy_helper.from_array(part.reshape(shape), f"{weight.name}_{name}"))
                extra.append(f"{weight.name}_{name}")
        if widened:
            return save(folder / "widened.onnx", [node], constants, node.output[:1])
        node.input.extend([""] * (8 - len(node.input)) + extra)
        node.op_type, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
        path = save(folder / "model.onnx", [node], constants, node.output[:1])
        model = onnx.load(path)
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        onnx.save(model, path)
        return path

    return build


def in_a_function(folder):
    """An LSTM in a local function that another function calls; the weights are arguments."""
    node, weights = lstm_parts(np.random.default_rng(0))
    names, opsets = ["x", "w", "r", "b"], [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    body = helper.make_node("LSTM", names, ["y"], "lstm", hidden_size=H)
    inner = helper.make_function("own", "Inner", names, ["y"], [body], opsets)
    outer = helper.make_function(
        "own", "Outer", names, ["y"], [helper.make_node("Inner", names, ["y"], domain="own")], opsets
    )
    call = helper.make_node("Outer", node.input[:4], ["y"], domain="own")
    path = save(folder / "model.onnx", [call], weights, ["y"])
    model = onnx.load(path)
    model.functions.extend([inner, outer])
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(model, path)
    return path


def looped(kind, joined, gemm=False):
    """A cell in single operators in a Loop or Scan over x [T, B, I]; where joined, one product with Concat(x, h)."""

    def build(folder):
        nodes, weights, (w, r) = written_out(np.random.default_rng(0))
        if joined:
            whole = np.concatenate([w.T, r.T]) if joined == "xh" else np.concatenate([r.T, w.T])
            order = ["x", "h0"] if joined == "xh" else ["h0", "x"]
            product = ["Gemm", ["xh", "k", "zero"]] if gemm else ["MatMul", ["xh", "k"]]
            nodes[:3] = [helper.make_node("Concat", order, ["xh"], axis=1), helper.make_node(*product, ["s"], "net/cell")]
            weights = [numpy_helper.from_array(np.ascontiguousarray(whole), "k"), weights[2]]
            weights += [numpy_helper.from_array(np.full(4 * H, 0.1, np.float32), "zero")] if gemm else []
        states = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [B, H]) for name in ("h0", "c0")]
        after = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [B, H]) for name in ("h", "c", "y")]
        nodes.append(helper.make_node("Identity", ["h"], ["y"]))
        zeros = numpy_helper.from_array(np.zeros((B, H), np.float32), "start")
        if kind == "Scan":
            entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, [B, INPUTS])
            body = helper.make_graph(nodes, "body", [*states, entry], after)
            names = ["start", "start", "x_all"], ["last_h", "last_c", "y_all"]
            node, more = helper.make_node("Scan", *names, body=body, num_scan_inputs=1), []
        else:
            count = helper.make_tensor_value_info("t", TensorProto.INT64, [])
            going = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "go_on")]
            nodes = [
                helper.make_node("Gather", ["x_all", "t"], ["x"]),
                *nodes,
                helper.make_node("Identity", ["go"], ["go_on"]),
            ]
            body = helper.make_graph(nodes, "body", [count, going[0], *states], [going[1], *after])
            names = ["steps", "", "start", "start"], ["last_h", "last_c", "y_all"]
            node, more = helper.make_node("Loop", *names, body=body), [numpy_helper.from_array(np.array(T), "steps")]
        entry = helper.make_tensor_value_info("x_all", TensorProto.FLOAT, [T, B, INPUTS])
        graph = helper.make_graph(
            [node],
            "graph",
            [entry],
            [helper.make_tensor_value_info("y_all", TensorProto.FLOAT, [T, B, H])],
            [*weights, zeros, *more],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, folder / "model.onnx")
        return folder / "model.onnx"

    return build


def our_own(reverse):
    """A Scan that slimlstm writes for factors, which reads the products of x from outside."""

    def build(folder):
        layer = LowRankLSTM(INPUTS, H, ranks={"weight_ih_l0": 6, "weight_hh_l0": 6})
        builder = GraphBuilder("layer")
        add_layer(builder, layer.layers()[0], Ports("x", "", "", "y", "h", "c"), reverse, "scan")
        return save(folder / "model.onnx", builder.nodes, builder.constants, ["y"], OPSET)

    return build


def integer_scan(reverse):
    """A Scan that slimlstm writes for int8 weights, whose steps multiply integers."""

    def build(folder):
        torch.manual_seed(0)
        layer = LowRankLSTM(INPUTS, WIDE)
        with torch.no_grad():
            for name in layer.matrix_shapes:
                weight = layer.get_parameter(name)
                weight.copy_(torch.randn(len(weight), RANK) @ torch.randn(RANK, weight.shape[1]) / RANK)
                layer.store(name, "int8")
        builder = GraphBuilder("layer")
        add_layer(builder, layer.layers()[0], Ports("x", "", "", "y", "h", "c"), reverse, "scan")
        return save(folder / "model.onnx", builder.nodes, builder.constants, ["y"], OPSET)

    return build


def values_for(path):
    rng = np.random.default_rng(3)
    (entry,) = onnx.load(path).graph.input
    return {entry.name: rng.standard_normal((T, B, INPUTS)).astype(np.float32)}


FORMS = {
    "DequantizeLinear": dequantize("forward"),
    "DequantizeLinear by channel": dequantize("forward", per_channel=True),
    "DequantizeLinear, unsigned": dequantize("bidirectional", unsigned=True),
    "DynamicQuantizeLSTM": quantized_operator("forward"),
    "DynamicQuantizeLSTM, both directions, by channel": quantized_operator("bidirectional", per_channel=True),
    "DynamicQuantizeLSTM, unsigned": quantized_operator("bidirectional", unsigned=True),
    "functions": in_a_function,
    "Scan": looped("Scan", ""),
    "Loop": looped("Loop", ""),
    "Scan over Concat(x, h)": looped("Scan", "xh"),
    "Scan over Concat(h, x)": looped("Scan", "hx"),
    "Loop over Concat(x, h)": looped("Loop", "xh"),
    "Loop over Concat(x, h) with Gemm": looped("Loop", "xh", gemm=True),
    "our own Scan": our_own(False),
    "our own Scan, backward": our_own(True),
    "our own Scan of integers": integer_scan(False),
    "our own Scan of integers, backward": integer_scan(True),
}
WIDENED = {
    "DynamicQuantizeLSTM": quantized_operator("forward", widened=True),
    "DynamicQuantizeLSTM, both directions, by channel": quantized_operator("bidirectional", True, widened=True),
    "DynamicQuantizeLSTM, unsigned": quantized_operator("bidirectional", unsigned=True, widened=True),
}
"""The files to compare with: ONNX Runtime's integer products saturate on CPUs without VNNI."""
INT8 = [name for name in FORMS if any(word in name for word in ("Quantize", "Dequantize", "integers"))]


def only_lstm(path):
    (lstm,) = find_lstms(read_model(path), path)
    return lstm


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_read(form, tmp_path):
    path = FORMS[form](tmp_path)
    lstm = only_lstm(path)
    assert lstm.problem is None
    assert [location.name for location in lstm.locations][:2] == ["weight_ih_l0", "weight_hh_l0"]
    shapes = {(tuple(one.matrix.shape) if isinstance(one.matrix, torch.Tensor) else "factors") for one in lstm.locations}
    hidden = WIDE if form in INT8 else H
    assert shapes <= {(4 * hidden, INPUTS), (4 * hidden, hidden), "factors"}
    assert {location.storage for location in lstm.locations} == ({"int8"} if form in INT8 else {None})


def config_for(form, target):
    if "own" in form and form not in INT8:  # its factors are small already
        return Quantize("bfloat16", target=target)
    # int8 factors, as others would be larger than int8 matrices of this size.
    return LowRank("svd", rank=RANK, target=target, storage="int8" if form in INT8 else None)


@pytest.mark.parametrize("target", ["both", "hh"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_compressed_where_they_are(form, target, tmp_path):
    """Matrices of the rank that is asked for stay as they are; integers only nearly have that rank."""
    path, output = FORMS[form](tmp_path), tmp_path / "small.onnx"
    report = compress_onnx(path, config_for(form, target), output)
    assert report.model.bytes_after == output.stat().st_size
    values = values_for(path)
    exact = WIDENED[form](tmp_path) if form in WIDENED else path
    (expected,), (found,) = (run(file, values) for file in (exact, output))
    assert np.linalg.norm(found - expected) < (0.1 if form in INT8 or "own" in form else 1e-4) * np.linalg.norm(expected)
    small = onnx.load(output)
    used = {name for graph in graphs_of(small.graph) for node in graph.node for name in node.input}
    assert {tensor.name for graph in graphs_of(small.graph) for tensor in graph.initializer} <= used


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_calibrated(form, with_gradients, tmp_path):
    path = FORMS[form](tmp_path)
    model, values = read_model(path), values_for(path)
    found = calibrate_graph(model, find_lstms(model, path), [values], with_gradients)
    (x,) = values.values()
    rows = x.reshape(-1, INPUTS).astype(np.float64)
    for key, (moments,) in found.items():
        assert moments.rows == T * B
        if "weight_ih" in key:
            np.testing.assert_allclose(moments.inputs.numpy(), rows.T @ rows / len(rows), rtol=1e-5)
        assert (moments.gradients is not None) == with_gradients
        assert with_gradients is False or moments.gradients.trace() > 0


def test_rows_of_a_backward_scan_pair_with_its_inputs(tmp_path):
    path = our_own(True)(tmp_path)
    model, values = read_model(path), values_for(path)
    (lstm,) = find_lstms(model, path)
    probed = ProbedModel(model, {lstm.name})
    (y,), (shown,) = probed.run(values)
    ((x, h),) = (rows.inputs for rows in observed_rows(probed.probes[0], shown).values())
    np.testing.assert_allclose(x.numpy(), values["x"].reshape(-1, INPUTS), rtol=1e-6)
    before = np.concatenate([y[1:], np.zeros_like(y[:1])])
    np.testing.assert_allclose(h.numpy(), before.reshape(-1, H), atol=1e-6)


def quantized_by_the_runtime(folder):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    node, weights = lstm_parts(np.random.default_rng(0))
    path = save(folder / "float.onnx", [node], weights, node.output[:1])
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(path, folder / "model.onnx", weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    return path, folder / "model.onnx"


def test_files_of_the_runtimes_own_quantiser(tmp_path):
    path, quantized = quantized_by_the_runtime(tmp_path)
    assert "DynamicQuantizeLSTM" in {node.op_type for node in onnx.load(quantized).graph.node}
    exact, found = only_lstm(path), only_lstm(quantized)
    for one, other in zip(exact.locations, found.locations, strict=True):
        assert other.storage == "int8"
        torch.testing.assert_close(other.matrix, one.matrix, rtol=0, atol=0.02 * float(one.matrix.abs().max()))


@pytest.mark.parametrize("inner", ["float16", "cast"])
def test_half_precision(inner, tmp_path):
    """Weights in float16, for an LSTM in float16 or widened for one in float32."""
    node, weights = lstm_parts(np.random.default_rng(0))
    halves = [numpy_helper.from_array(numpy_helper.to_array(w).astype(np.float16), f"{w.name}_half") for w in weights]
    if inner == "cast":
        nodes = [
            helper.make_node("Cast", [half.name], [w.name], to=TensorProto.FLOAT)
            for half, w in zip(halves, weights, strict=True)
        ]
        nodes.append(node)
    else:
        node.input[:4] = ["x_half", *(half.name for half in halves)]
        nodes = [helper.make_node("Cast", ["x"], ["x_half"], to=TensorProto.FLOAT16), node]
        nodes.append(helper.make_node("Cast", ["lstm_y"], ["y"], to=TensorProto.FLOAT))
    path, output = (
        save(tmp_path / "model.onnx", nodes, halves, ["lstm_y" if inner == "cast" else "y"]),
        tmp_path / "small.onnx",
    )
    report = compress_onnx(path, LowRank("svd", rank=RANK), output)
    values = feed(path)
    (expected,), (found,) = (ReferenceEvaluator(onnx.load(file)).run(None, values) for file in (path, output))
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert report.model.bytes_after < report.model.bytes_before


def other_cell(kind):
    def build(folder):
        node, weights = lstm_parts(np.random.default_rng(0))
        other = helper.make_node(kind, ["lstm_x", "a", "b"], ["g"], f"other_{kind}", hidden_size=H)
        gates = 3 if kind == "GRU" else 1
        shapes = {"a": (1, gates * H, INPUTS), "b": (1, gates * H, H)}
        constants = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()]
        copy = helper.make_node("Identity", ["x"], ["lstm_x"])
        return save(folder / "model.onnx", [node, copy, other], [*weights, *constants], ["lstm_y", "g"])

    return build


def computed_product(folder):
    nodes, weights, _ = written_out(np.random.default_rng(0))
    nodes[1].input[1] = "r_computed"
    nodes.insert(0, helper.make_node("Abs", ["r"], ["r_computed"]))
    node, others = lstm_parts(np.random.default_rng(0))
    node.input[0] = "x_3d"
    nodes = [*nodes, helper.make_node("Unsqueeze", ["x"], ["x_3d"], axes=[0]), node]
    return save(folder / "model.onnx", nodes, [*weights, *others], ["h", "lstm_y"], 12)


UNREAD = {
    "GRU": (other_cell("GRU"), "other_GRU: GRU operators cannot be read"),
    "RNN": (other_cell("RNN"), "other_RNN: RNN operators cannot be read"),
    "computed": (computed_product, "its gates are no sum of products of x and of h with one constant each"),
}


@pytest.mark.parametrize(("build", "message"), UNREAD.values(), ids=list(UNREAD))
def test_what_cannot_be_read_is_named(build, message, tmp_path):
    path = build(tmp_path)
    report = compress_onnx(path, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
    assert any(message in note for note in report.notes)
    assert {site.key.partition(".")[0] for site in report.sites} == {"lstm"}


def test_integers_that_are_no_constants_are_named(tmp_path):
    path = quantized_operator("forward")(tmp_path)
    model = onnx.load(path)
    model.graph.node[0].input[8] = "scale_from_outside"
    model.graph.input.append(helper.make_tensor_value_info("scale_from_outside", TensorProto.FLOAT, [1]))
    onnx.save(model, path)
    with pytest.raises(SlimLSTMError, match="lstm: its weights are no constants of the file"):
        compress_onnx(path, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
