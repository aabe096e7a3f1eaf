"""ONNX files with LSTMs, built node by node, for the tests of several modules."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slimlstm.onnx.graph import graphs_of

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
RANK, INPUTS, H = 2, 10, 16
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def low_rank(rng, *shape):
    """Matrices [..., m, n] of rank ``RANK``, which factors of that rank stand for exactly."""
    *lead, m, n = shape
    return (rng.standard_normal((*lead, m, RANK)) @ rng.standard_normal((*lead, RANK, n)) / 3).astype(np.float32)


def info(name, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, None)


def lstm_parts(
    rng, direction="forward", lengths=False, states=False, layout=0, bias=True, name="lstm", hidden=H, **attributes
):
    """An LSTM node, its weights, and the names of the optional inputs that it takes."""
    number = DIRECTIONS[direction]
    weights = {"W": low_rank(rng, number, 4 * hidden, INPUTS), "R": low_rank(rng, number, 4 * hidden, hidden)}
    if bias:
        weights["B"] = rng.standard_normal((number, 8 * hidden)).astype(np.float32)
    names = ["x", f"{name}_W", f"{name}_R", f"{name}_B" if bias else "", "lengths" if lengths else ""]
    names += ["h0", "c0"] if states else []
    attributes |= {"layout": layout} if layout else {}
    outputs = [f"{name}_{part}" for part in ("y", "h", "c")]
    node = helper.make_node("LSTM", names, outputs, name, hidden_size=hidden, direction=direction, **attributes)
    return node, [numpy_helper.from_array(value, f"{name}_{kind}") for kind, value in weights.items()]


def save(path, nodes, initializers, outputs, opset=17, ir_version=8):
    inputs = dict.fromkeys(("x", "h0", "c0"), TensorProto.FLOAT) | {
        "lengths": TensorProto.INT32,
        "on": TensorProto.BOOL,
    }
    graph = helper.make_graph(nodes, "graph", [], [info(name) for name in outputs], initializers)
    used = {name for inner in graphs_of(graph) for node in inner.node for name in node.input}
    graph.input.extend(info(name, kind) for name, kind in inputs.items() if name in used)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.save(model, path)
    return path


def feed(path, steps=5, batch=3, directions=1, layout=0, on=True, seed=0):
    rng = np.random.default_rng(seed)
    swap = (lambda array: np.ascontiguousarray(array.swapaxes(0, 1))) if layout else lambda array: array
    values = {
        "x": swap(rng.standard_normal((steps, batch, INPUTS)).astype(np.float32)),
        "h0": swap(rng.standard_normal((directions, batch, H)).astype(np.float32)),
        "c0": swap(rng.standard_normal((directions, batch, H)).astype(np.float32)),
        "lengths": rng.integers(1, steps + 1, batch).astype(np.int32),
        "on": np.array(on),
    }
    return {value.name: values[value.name] for value in onnx.load(path).graph.input}


def run(path, values):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, values)


def written_out(rng, gemm=False):
    """A step of an LSTM in single operators, gates in the order f, o, i, g, as exporters write cells."""
    w, r = low_rank(rng, 4 * H, INPUTS), low_rank(rng, 4 * H, H)
    bias = rng.standard_normal(4 * H).astype(np.float32)
    arrays = {"w": w if gemm else np.ascontiguousarray(w.T), "r": r if gemm else np.ascontiguousarray(r.T), "b": bias}
    make = helper.make_node
    products = [
        make(
            "Gemm" if gemm else "MatMul", ["x", "w"] + ["b"] * gemm, ["xw"], "net/cell/x", **({"transB": 1} if gemm else {})
        ),
        make("Gemm" if gemm else "MatMul", ["h0", "r"], ["hr"], "net/cell/h", **({"transB": 1} if gemm else {})),
    ]
    sums = [make("Add", ["xw", "hr"], ["s"])] + [make("Add", ["s", "b"], ["sum"])] * (not gemm)
    nodes = [
        *products,
        *sums,
        make("Split", ["s" if gemm else "sum"], ["f", "o", "i", "g"], axis=1),
        *(make("Sigmoid", [gate], [f"{gate}s"]) for gate in "foi"),
        make("Tanh", ["g"], ["gt"]),
        make("Mul", ["fs", "c0"], ["kept"]),
        make("Mul", ["is", "gt"], ["new"]),
        make("Add", ["kept", "new"], ["c"]),
        make("Tanh", ["c"], ["ct"]),
        make("Mul", ["os", "ct"], ["h"]),
    ]
    return nodes, [numpy_helper.from_array(value, name) for name, value in arrays.items()], (w, r)
