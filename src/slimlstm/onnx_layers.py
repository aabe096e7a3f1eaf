"""One LSTM layer as ONNX: the LSTM operator, and factors as a Scan. Shapes as in :mod:`slimlstm.ops.weights`.

ONNX orders gates i, o, f, c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm.errors import SlimLSTMError
from slimlstm.ops.weights import Direction

OPSET = 17


def lstm_model(lstm: nn.LSTM) -> Any:
    """One layer, x [T, B, I] to y [T, D, B, H], as the LSTM operator.

    Raises:
        SlimLSTMError: the layer has a projection, which the operator has not.
        ImportError: onnx is not installed.
    """
    from onnx import helper

    if lstm.proj_size:
        raise SlimLSTMError("ONNX's LSTM has no projections")
    endings = ["_l0", "_l0_reverse"][: 1 + lstm.bidirectional]

    def stacked(*kinds: str) -> Tensor:
        return torch.stack([torch.cat([_reordered(lstm, kind + ending) for kind in kinds]) for ending in endings])

    weights = {"W": stacked("weight_ih"), "R": stacked("weight_hh")}
    if lstm.bias:
        weights["B"] = stacked("bias_ih", "bias_hh")
    direction = "bidirectional" if lstm.bidirectional else "forward"
    node = helper.make_node("LSTM", ["x", *weights], ["y"], hidden_size=lstm.hidden_size, direction=direction)
    return _model([node], weights, lstm.input_size, [None, len(endings), None, lstm.hidden_size])


def scan_model(weights: Direction) -> Any:
    """One direction with biases and factors at both matrices: thin products of all inputs, then a Scan over time.

    Raises:
        SlimLSTMError: a matrix is dense, or there are no biases.
        ImportError: onnx is not installed.
    """
    from onnx import helper

    ih, hh = weights.ih, weights.hh
    if isinstance(ih, Tensor) or isinstance(hh, Tensor) or weights.bias_ih is None or weights.bias_hh is None:
        raise SlimLSTMError("the Scan is written for factors at both matrices and biases")
    hidden = hh[1].shape[1]
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
        _initializers({"hh_v": hh[1].T, "hh_u": hh[0].T}),
    )
    outer = {"ih_v": ih[1].T, "ih_u": ih[0].T, "bias": weights.bias_ih + weights.bias_hh, "width": torch.tensor([hidden])}
    graph = [
        helper.make_node("MatMul", ["x", "ih_v"], ["thin"]),
        helper.make_node("MatMul", ["thin", "ih_u"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["all_gates"]),
        helper.make_node("Shape", ["x"], ["batch"], start=1, end=2),
        helper.make_node("Concat", ["batch", "width"], ["state"], axis=0),
        helper.make_node("ConstantOfShape", ["state"], ["zeros"]),
        helper.make_node("Scan", ["zeros", "zeros", "all_gates"], ["h_last", "c_last", "y"], body=body, num_scan_inputs=1),
    ]
    return _model(graph, outer, ih[1].shape[1], [None, None, hidden])


def _reordered(lstm: nn.LSTM, name: str) -> Tensor:
    i, f, g, o = lstm.get_parameter(name).detach().chunk(4)
    return torch.cat([i, o, f, g])


def _info(name: str, shape: Sequence[int | None]) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _initializers(weights: Mapping[str, Tensor]) -> list[Any]:
    from onnx import numpy_helper

    return [numpy_helper.from_array(value.detach().contiguous().numpy(), name) for name, value in weights.items()]


def _model(nodes: Sequence[Any], weights: Mapping[str, Tensor], inputs: int, output: Sequence[int | None]) -> Any:
    import onnx
    from onnx import helper

    entry = [_info("x", [None, None, inputs])]
    graph = helper.make_graph(nodes, "layer", entry, [_info("y", output)], _initializers(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    return model
