"""Weights outside LSTMs in int8, by ONNX Runtime's quantiser, and the numbers that a file holds."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import INPUTS, H, lstm_parts, run, save, written_out

from slimlstm import LowRank, Quantize, SlimLSTMError
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.graph import graphs_of
from slimlstm.onnx.sizes import count_numbers

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
WORDS, CLASSES = 200, 50


def whole_model(folder, opset=17, constant=False):
    """An embedding, an LSTM, a linear layer as MatMul and one as Gemm, and a convolution over the classes."""
    rng = np.random.default_rng(0)
    node, weights = lstm_parts(rng)
    node.input[0] = "embedded"
    shapes = {
        "table": (WORDS, INPUTS),
        "head": (H, CLASSES),
        "head_2": (CLASSES, CLASSES),
        "b": (CLASSES,),
        "k": (60, 50, 3),
    }
    arrays = {name: rng.standard_normal(shape).astype(np.float32) / 7 for name, shape in shapes.items()}
    make = helper.make_node
    nodes = [
        make("Gather", ["table", "words"], ["embedded"], "look-up"),
        node,
        make("Squeeze", ["lstm_y", "one"], ["h"]) if opset >= 13 else make("Squeeze", ["lstm_y"], ["h"], axes=[1]),
        make("Slice", ["h", "from", "to", "axis"], ["first"]),
        make("Squeeze", ["first", "zero"], ["rows"]) if opset >= 13 else make("Squeeze", ["first"], ["rows"], axes=[0]),
        make("MatMul", ["rows", "head"], ["scores"], "head"),
        make("Gemm", ["scores", "head_2", "b"], ["more"], transB=1),
        make("Unsqueeze", ["more", "two"], ["wide"]) if opset >= 13 else make("Unsqueeze", ["more"], ["wide"], axes=[2]),
        make("Conv", ["wide", "k"], ["y"], pads=[1, 1]),
    ]
    whole = {"zero": [0], "one": [1], "two": [2], "from": [0], "to": [1], "axis": [0]}
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    constants += [numpy_helper.from_array(np.array(value), name) for name, value in whole.items()]
    if constant:
        nodes = [make("Constant", [], [one.name], value=one) for one in constants] + nodes
        constants = []
    words = helper.make_tensor_value_info("words", TensorProto.INT64, ["t", "b"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [words], [y], [*weights, *constants])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def words_for(path):
    return {"words": np.random.default_rng(1).integers(0, WORDS, (7, 5))}


def kinds_of(path):
    model = onnx.load(path)
    return {tensor.name: tensor.data_type for graph in graphs_of(model.graph) for tensor in graph.initializer}


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize(
    ("also", "operators"),
    [
        (["linear"], ["MatMulInteger"]),
        (["embedding"], ["DequantizeLinear"]),
        (["conv"], ["ConvInteger"]),
        (["linear", "embedding"], ["MatMulInteger", "DequantizeLinear"]),
    ],
    ids=str,
)
def test_other_weights_become_int8(also, operators, opset, tmp_path):
    path, output = whole_model(tmp_path, opset), tmp_path / "small.onnx"
    report = compress_onnx(path, Quantize("int8"), output, also=also, batches=[words_for(path)])
    found = {node.op_type for node in onnx.load(output).graph.node}
    assert found.issuperset(operators)
    assert "LSTM" in found
    assert ("MatMul" in found) == ("linear" not in also)
    (note,) = (note for note in report.notes if "other weights" in note)
    assert "on the given inputs" in note
    (expected,), (got,) = (run(file, words_for(path)) for file in (path, output))
    assert np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(expected)
    assert report.model.bytes_after == output.stat().st_size
    without = compress_onnx(path, Quantize("int8"), tmp_path / "without.onnx")
    assert report.model.bytes_after < without.model.bytes_after
    # Scales and zero points count, too.
    assert report.model.parameters_after == pytest.approx(without.model.parameters_after, rel=0.02)


def test_weights_of_lstms_stay_out_of_it(tmp_path):
    """A cell of single operators: its products are linear layers to the quantiser."""
    nodes, weights, _ = written_out(np.random.default_rng(0), gemm=True)
    head = numpy_helper.from_array(np.random.default_rng(2).standard_normal((H, CLASSES)).astype(np.float32), "head")
    nodes.append(helper.make_node("MatMul", ["h", "head"], ["scores"]))
    path = save(tmp_path / "model.onnx", nodes, [*weights, head], ["scores"], 12)
    values = {"x": np.ones((3, INPUTS), np.float32), "h0": np.ones((3, H), np.float32), "c0": np.ones((3, H), np.float32)}
    report = compress_onnx(path, LowRank("svd", rank=2), tmp_path / "small.onnx", also=["linear"], batches=[values])
    operators = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert (operators.count("MatMulInteger"), operators.count("Gemm")) == (1, 2)
    assert "1 other weights" in " ".join(report.notes)


def test_what_is_not_there_is_an_error(tmp_path):
    nodes, weights = lstm_parts(np.random.default_rng(0))
    path = save(tmp_path / "model.onnx", [nodes], weights, ["lstm_y"])
    with pytest.raises(SlimLSTMError, match="no linear weights to quantise: no MatMul or Gemm"):
        compress_onnx(path, LowRank("svd", rank=2), tmp_path / "small.onnx", also=["linear"])
    with pytest.raises(SlimLSTMError, match="'rnn' names no weights; give some of linear, conv, embedding"):
        compress_onnx(path, LowRank("svd", rank=2), tmp_path / "small.onnx", also=["rnn"])
    assert not (tmp_path / "small.onnx").exists()


def test_a_large_change_is_refused(tmp_path, monkeypatch):
    path = whole_model(tmp_path)
    monkeypatch.setattr("slimlstm.onnx.others.LARGEST_CHANGE", 1e-6)
    with pytest.raises(SlimLSTMError, match=r"the outputs change by .* leave some of them out of --also"):
        compress_onnx(path, Quantize("int8"), tmp_path / "small.onnx", also=["linear"])
    assert not (tmp_path / "small.onnx").exists()


@pytest.mark.parametrize("constant", [False, True], ids=["initializers", "Constant nodes"])
def test_inspect_counts_what_is_in_the_file(constant, tmp_path, run_json):
    path = whole_model(tmp_path, constant=constant)
    result = run_json("inspect", path)
    in_lstm = 4 * H * (INPUTS + H)
    others = WORDS * INPUTS + H * CLASSES + CLASSES * CLASSES + CLASSES + 60 * CLASSES * 3 + 8 * H
    assert (result["parameters"], result["total"]) == (in_lstm, in_lstm + others)
    assert count_numbers(onnx.load(path)) == result["total"]


def test_the_command(tmp_path, run_json):
    path, output = whole_model(tmp_path), tmp_path / "small.onnx"
    result = run_json("compress", path, "-o", output, "--storage", "int8", "--also", "linear, embedding")
    assert any("other weights (linear, embedding)" in note for note in result["notes"])
    assert "MatMulInteger" in {node.op_type for node in onnx.load(output).graph.node}
