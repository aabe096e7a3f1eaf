"""Give every matrix of an LSTM an operand of its own, so that it can be replaced alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from slimlstm.onnx.graph import OnnxLSTM, Scope, attribute_of, constant
from slimlstm.onnx.operators import QUANTIZED, quantization
from slimlstm.onnx.runtime import insert
from slimlstm.ops.gates import reordered
from slimlstm.ops.weights import rebuilt

_PLAIN_INPUTS = 8
"""Number of inputs that a quantised operator shares with ONNX's LSTM; they come first."""


def separate(lstm: OnnxLSTM, model: Any, new_name: Callable[[str], str], shared: dict[Hashable, Any]) -> list[str]:
    """Rewrite an LSTM whose matrices are not plain operands; the graph computes the same, except for rounding.

    An operator with int8 weights becomes ONNX's LSTM, with the same integers widened. A product of a Concat of x and h with
    [W R] becomes two products. Other LSTMs stay as they are.

    Args:
        lstm: the LSTM, whose locations change with the graph.
        model: the model that it is in.
        new_name: takes the preferred name and returns a name that is free in the model.
        shared: holds constants for further LSTMs with the same weights.

    Returns:
        The names of values that the LSTM no longer reads.
    """
    if (lstm.node.domain, lstm.node.op_type) == QUANTIZED:
        return _widen(lstm, new_name)
    if any(location.columns for location in lstm.locations):
        return _divide(lstm, model, new_name, shared)
    return []


def _widen(lstm: OnnxLSTM, new_name: Callable[[str], str]) -> list[str]:
    """Turn an operator with int8 weights into ONNX's LSTM, and return the names of values that it no longer reads."""
    node, released = lstm.node, list(lstm.node.input[_PLAIN_INPUTS:])
    for position, letter in ((1, "W"), (2, "R")):
        found = quantization(node, lstm.scope, position)
        if found is not None:
            _, scale, zero = found
            released.append(node.input[position])
            node.input[position] = _widened(lstm, node.input[position], scale, zero, f"{lstm.name}.{letter}", new_name)
    node.op_type, node.domain = "LSTM", ""
    del node.input[_PLAIN_INPUTS:]
    return released


def _widened(lstm: OnnxLSTM, codes: str, scale: Tensor, zero: Tensor, prefix: str, new_name: Callable[[str], str]) -> str:
    """Insert nodes before an operator that widen and transpose its codes; return the name of the result."""
    from onnx import TensorProto

    name = _insert_new(lstm, "Cast", [codes], new_name(f"{prefix}.wide"), to=TensorProto.FLOAT)
    if bool(zero.any()):
        shift = _add_constant(lstm.scope, zero, new_name(f"{prefix}.zero"))
        name = _insert_new(lstm, "Sub", [name, shift], new_name(f"{prefix}.shifted"))
    factor = _add_constant(lstm.scope, scale, new_name(f"{prefix}.scale"))
    name = _insert_new(lstm, "Mul", [name, factor], new_name(f"{prefix}.scaled"))
    return _insert_new(lstm, "Transpose", [name], new_name(prefix), perm=[0, 2, 1])


def _divide(lstm: OnnxLSTM, model: Any, new_name: Callable[[str], str], shared: dict[Hashable, Any]) -> list[str]:
    """Divide the product with [W R] in two, and return the names of values that the LSTM no longer reads."""
    from onnx import helper

    graph, product = lstm.scope.graph, lstm.locations[0].node
    output, released = product.output[0], list(product.input)
    place = "divided", id(lstm.scope), output
    if place in shared:
        _set_products(lstm, shared[place])
        return []
    shared[place] = parts = _insert_products(lstm, model, new_name, shared)
    bias = product.input[2] if len(product.input) > 2 else ""
    total = new_name(f"{lstm.name}.sum") if bias else output
    insert(graph, helper.make_node("Add", parts, [total]), before=product)
    if bias:
        insert(graph, helper.make_node("Add", [total, bias], [output]), before=product)
    graph.node.remove(product)
    _set_products(lstm, parts)
    return [name for name in released if name and name != bias]


def _insert_products(lstm: OnnxLSTM, model: Any, new_name: Callable[[str], str], shared: dict[Hashable, Any]) -> list[str]:
    """Insert a product for every location before their common one, and return the names of the results."""
    from onnx import helper

    parts: list[str] = []
    for location in lstm.locations:
        key = "part", location.name
        if key not in shared:
            weight = reordered(rebuilt(location.matrix), location.gates)
            shared[key] = _add_initializer(model, weight.T, new_name(f"{lstm.name}.{location.name}"))
        parts.append(new_name(f"{lstm.name}.{location.name}.product"))
        node = helper.make_node("MatMul", [location.input, shared[key]], parts[-1:])
        insert(lstm.scope.graph, node, before=location.node)
    return parts


def _set_products(lstm: OnnxLSTM, parts: list[str]) -> None:
    """Set the nodes of an LSTM's locations to the products with these outputs."""
    for location, part in zip(lstm.locations, parts, strict=True):
        location.node = next(node for node in lstm.scope.graph.node if part in node.output)
        location.index, location.columns = 1, None


def is_divisible(node: Any, scope: Scope) -> bool:
    """Return whether a product reads a Concat of two values along the last axis, and multiplies by nothing else."""
    joined = scope.producers.maps[0].get(node.input[0])
    if (
        joined is None
        or joined.op_type != "Concat"
        or len(joined.input) != 2
        or attribute_of(joined, "axis") not in (1, -1)
    ):
        return False
    if node.op_type == "Gemm" and (attribute_of(node, "alpha", 1.0), attribute_of(node, "beta", 1.0)) != (1.0, 1.0):
        return False
    return constant(node.input[1], scope) is not None


def _insert_new(lstm: OnnxLSTM, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
    from onnx import helper

    insert(lstm.scope.graph, helper.make_node(operator, inputs, [output], **attributes), before=lstm.node)
    return output


def _add_constant(scope: Scope, value: Tensor, name: str) -> str:
    from onnx import numpy_helper

    scope.graph.initializer.append(numpy_helper.from_array(value.contiguous().numpy(), name))
    return name


def _add_initializer(model: Any, value: Tensor, name: str) -> str:
    from onnx import numpy_helper

    value = value.contiguous()
    if value.dtype == torch.bfloat16:
        value = value.float()
    model.graph.initializer.append(numpy_helper.from_array(value.numpy(), name))
    return name
