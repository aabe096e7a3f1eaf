"""Count the numbers that an ONNX model holds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from slimlstm.onnx.builder import SCALE
from slimlstm.onnx.graph import OnnxLSTM, graphs_of, inner_nodes
from slimlstm.ops.weights import parts_of

_SCALE = re.compile(rf"{re.escape(SCALE)}(\.\d+)?$")


def count_numbers(model: Any) -> int:
    """Return the number of weights in a model: floating-point numbers and 8-bit codes, in nested graphs and functions too.

    Scales that slimlstm wrote beside codes do not count, and neither do single numbers without axes, such as zero points,
    and integers that are no codes, such as shapes.
    """
    from onnx import TensorProto

    kinds = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
    kinds |= {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4}
    graphs, tensors = list(graphs_of(model.graph)), list[Any]()
    nodes = [node for graph in graphs for node in graph.node]
    for function in model.functions:
        for node in function.node:
            nodes += [node, *inner_nodes(node)]
    for graph in graphs:
        tensors += graph.initializer
    tensors += [found.t for node in nodes if node.op_type == "Constant" for found in node.attribute if found.HasField("t")]
    counted = (tensor for tensor in tensors if tensor.data_type in kinds and not _SCALE.search(tensor.name))
    return sum(math.prod(tensor.dims) for tensor in counted if tensor.dims)


def count_in_lstms(lstms: Iterable[OnnxLSTM]) -> int:
    """Return the number of weights in LSTMs of one model; a weight that several LSTMs read counts once."""
    found: dict[tuple[object, ...], int] = {}
    for lstm in lstms:
        for one in lstm.locations:
            numbers = sum(part.numel() for part in parts_of(one.matrix))
            found[one.node.input[one.index], one.direction, one.columns] = numbers
        biases = lstm.node.input[3] if lstm.is_operator and lstm.biases else lstm.name
        found[biases, "biases"] = sum(bias.numel() for bias in lstm.biases.values())
    return sum(found.values())
