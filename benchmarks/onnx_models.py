"""One LSTM layer as ONNX: the LSTM operator, and factors as a Scan. Shapes as in ``slimlstm/ops/weights.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from slimlstm.ops.weights import Direction

OPSET = 17


def lstm_model(lstm: nn.LSTM) -> Any:
    """``lstm``, one layer and direction with biases, as the LSTM operator, whose gates are ordered i, o, f, g."""

    def reordered(weight: Tensor) -> np.ndarray:
        i, f, g, o = weight.detach().chunk(4)
        return torch.cat([i, o, f, g]).numpy()

    weights = {
        "W": reordered(lstm.weight_ih_l0)[None],
        "R": reordered(lstm.weight_hh_l0)[None],
        "B": np.concatenate([reordered(lstm.bias_ih_l0), reordered(lstm.bias_hh_l0)])[None],
    }
    node = helper.make_node("LSTM", ["x", *weights], ["y"], hidden_size=lstm.hidden_size)
    return _model([node], weights, lstm.input_size, [None, 1, None, lstm.hidden_size])


def scan_model(weights: Direction) -> Any:
    """A layer with biases and factors at both matrices: thin products of all inputs, then a Scan over time."""
    ih, hh, bias = weights.ih, weights.hh, weights.bias_ih + weights.bias_hh
    hidden = hh[1].shape[1]
    body_weights = {"hh_v": hh[1].T, "hh_u": hh[0].T}
    nodes = [
        helper.make_node("MatMul", ["h", "hh_v"], ["z"]),
        helper.make_node("MatMul", ["z", "hh_u"], ["recurrent"]),
        helper.make_node("Add", ["gates_of_x", "recurrent"], ["gates"]),
        helper.make_node("Split", ["gates"], ["i", "f", "g", "o"], axis=1),
        *(helper.make_node("Sigmoid", [gate], [f"{gate}s"]) for gate in "ifo"),
        helper.make_node("Tanh", ["g"], ["gt"]),
        helper.make_node("Mul", ["fs", "c"], ["kept"]),
        helper.make_node("Mul", ["is", "gt"], ["new"]),
        helper.make_node("Add", ["kept", "new"], ["c_next"]),
        helper.make_node("Tanh", ["c_next"], ["ct"]),
        helper.make_node("Mul", ["os", "ct"], ["h_next"]),
        helper.make_node("Identity", ["h_next"], ["h_out"]),
    ]
    body = helper.make_graph(
        nodes,
        "step",
        [_info(name, [None, size]) for name, size in (("h", hidden), ("c", hidden), ("gates_of_x", 4 * hidden))],
        [_info(name, [None, hidden]) for name in ("h_next", "c_next", "h_out")],
        [_tensor(name, value) for name, value in body_weights.items()],
    )
    outer = {"ih_v": ih[1].T, "ih_u": ih[0].T, "bias": bias, "width": torch.tensor([hidden])}
    graph = [
        helper.make_node("MatMul", ["x", "ih_v"], ["thin"]),
        helper.make_node("MatMul", ["thin", "ih_u"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["all_gates"]),
        helper.make_node("Shape", ["x"], ["batch"], start=1, end=2),
        helper.make_node("Concat", ["batch", "width"], ["state"], axis=0),
        helper.make_node("ConstantOfShape", ["state"], ["zeros"]),
        helper.make_node("Scan", ["zeros", "zeros", "all_gates"], ["h_last", "c_last", "y"], body=body, num_scan_inputs=1),
    ]
    arrays = {name: value.detach().numpy() for name, value in outer.items()}
    return _model(graph, arrays, ih[1].shape[1], [None, None, hidden])


def _info(name: str, shape: list[int | None]) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _tensor(name: str, value: Tensor) -> Any:
    return numpy_helper.from_array(np.ascontiguousarray(value.detach().numpy()), name)


def _model(nodes: list[Any], weights: dict[str, np.ndarray], inputs: int, output: list[int | None]) -> Any:
    graph = helper.make_graph(
        nodes,
        "layer",
        [_info("x", [None, None, inputs])],
        [_info("y", output)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    return model
