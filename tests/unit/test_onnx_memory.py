"""Small ONNX files that declare huge constants are refused before the memory is taken; outside data is a regular file."""

import itertools
import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slimlstm import SlimLSTMError
from slimlstm.weight_files import read_tensors


def write(path, nodes, initializers):
    result = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [], [result], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def column(rows):
    return numpy_helper.from_array(np.ones((rows, 1), np.float32), "a")


def chain(op, count, **attributes):
    """Nodes that each take the last result twice."""
    names = ["a", *(f"v{index}" for index in range(count))]
    pairs = itertools.pairwise(names)
    return [helper.make_node(op, [name, name], [result], **attributes) for name, result in pairs]


BOMBS = {
    "factors multiplied out": (
        [helper.make_node("Transpose", ["a"], ["t"]), helper.make_node("MatMul", ["a", "t"], ["p"])],
        [column(40_000)],
    ),
    "a product by broadcasting": (
        [helper.make_node("Transpose", ["a"], ["t"]), helper.make_node("Mul", ["a", "t"], ["p"])],
        [column(40_000)],
    ),
    "a chain of joins": (chain("Concat", 28, axis=0), [column(64)]),
}


@pytest.mark.parametrize(("nodes", "initializers"), BOMBS.values(), ids=BOMBS)
def test_huge_constants_are_refused(nodes, initializers, tmp_path):
    write(tmp_path / "model.onnx", nodes, initializers)
    with pytest.raises(SlimLSTMError, match="the constants that the file's nodes compute would take"):
        read_tensors(tmp_path / "model.onnx")


@pytest.mark.skipif(os.name != "posix", reason="pipes in folders are POSIX")
def test_outside_data_in_a_pipe_is_refused(tmp_path):
    tensor = column(4)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="pipe")
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "model.onnx", [helper.make_node("Identity", ["a"], ["b"])], [tensor])
    with pytest.raises(SlimLSTMError, match="a pipe or device"):
        read_tensors(tmp_path / "model.onnx")


def calling(count, depth, inside_itself=False):
    """A file whose functions each call the one below ``count`` times; the lowest holds a Split."""
    functions = []
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for level in range(depth):
        called = level if inside_itself else level - 1
        node = ["Identity", ""] if called < 0 else [f"f{called}", "own"]
        names = ["x", *(f"v{index}" for index in range(count))]
        nodes = [helper.make_node(node[0], [one], [two], domain=node[1]) for one, two in itertools.pairwise(names)]
        if level == 0:
            nodes.append(helper.make_node("Split", ["x"], ["a", "b"], axis=0))
        nodes.append(helper.make_node("Identity", [names[-1]], ["y"]))
        functions.append(helper.make_function("own", f"f{level}", ["x"], ["y"], nodes, opsets))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(f"f{depth - 1}", ["x"], ["y"], domain="own")],
        "graph",
        [value("x", TensorProto.FLOAT, [4])],
        [value("y", TensorProto.FLOAT, [4])],
        [],
    )
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)


CALLS = {
    "2 calls, 40 levels": (calling(2, 40), "would take"),
    "40 calls, 8 levels": (calling(40, 8), "would take"),
    "itself": (calling(1, 1, inside_itself=True), "calls itself"),
}


@pytest.mark.parametrize(("model", "message"), CALLS.values(), ids=CALLS)
def test_functions_that_call_each_other_are_refused_before_they_are_inlined(model, message, tmp_path):
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SlimLSTMError, match=message):
        read_tensors(tmp_path / "model.onnx")


def test_functions_of_an_honest_size_are_inlined(tmp_path):
    from slimlstm.onnx.reading import read_model

    (tmp_path / "model.onnx").write_bytes(calling(2, 6).SerializeToString())
    model = read_model(tmp_path / "model.onnx")
    assert not model.functions
    assert [node.op_type for node in model.graph.node].count("Split") == 32
