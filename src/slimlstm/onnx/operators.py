"""Read the weights of LSTM operators: ONNX's own, and ONNX Runtime's operator with int8 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.onnx.graph import OnnxLSTM, Scope, WeightLocation, attribute_of, constant, storage_of, stored_itemsize
from slimlstm.ops.gates import ONNX, PYTORCH, reordered
from slimlstm.ops.weights import Matrix

ENDINGS = {"forward": [""], "reverse": ["_reverse"], "bidirectional": ["", "_reverse"]}
"""The endings of PyTorch's names for the directions of an operator."""


QUANTIZED = ("com.microsoft", "DynamicQuantizeLSTM")
"""ONNX Runtime's operator, whose weights W [D, I, 4H] and R [D, H, 4H] are integers."""
_BIAS = 3
"""The position of the biases among an operator's inputs."""
_PEEPHOLES = 7
"""The position of the peephole weights among an operator's inputs."""
_ACTIVATIONS = ["sigmoid", "tanh", "tanh"]
"""The activations of each direction of PyTorch's LSTM."""
OPERATORS = {("", "LSTM"), ("ai.onnx", "LSTM"), QUANTIZED}
"""The domains and names of the operators that are read."""


def read_operator(node: Any, scope: Scope) -> OnnxLSTM:
    """Return the LSTM of an operator, without locations where its weights are no constants.

    Raises:
        SlimLSTMError: the shapes of its weights do not fit each other, or its direction is unknown.
    """
    w, r, b = (constant(name, scope) for name in [*node.input[1:4], "", "", ""][:3])
    is_quantized = (node.domain, node.op_type) == QUANTIZED
    if is_quantized:
        w, r = (dequantized(node, scope, position) for position in (1, 2))
    name = node.name or next(output for output in node.output if output)
    if w is None or r is None:
        return OnnxLSTM(name, node, scope, problem=f"{name}: its weights are no constants of the file; it stays as it is")
    direction = attribute_of(node, "direction", b"forward").decode()
    if direction not in ENDINGS:
        raise SlimLSTMError(
            f"the LSTM {name} has the direction {direction!r}, which ONNX does not know; is the file damaged?"
        )
    endings = ENDINGS[direction]
    _check_shapes(name, (w, r, b), len(endings), attribute_of(node, "hidden_size", r.shape[-1]))
    has_bias = len(node.input) > _BIAS and bool(node.input[_BIAS])
    lstm = OnnxLSTM(name, node, scope, has_computed_bias=has_bias and b is None)
    for index, ending in enumerate(endings):
        for kind, position, whole in (("weight_ih", 1, w), ("weight_hh", 2, r)):
            location = _location(f"{kind}_l0{ending}", scope, node, position, index, whole)
            location.storage = "int8" if is_quantized else location.storage
            lstm.locations.append(location)
        if b is not None:
            for kind, bias in zip(("bias_ih", "bias_hh"), b[index].chunk(2), strict=True):
                lstm.biases[f"{kind}_l0{ending}"] = reordered(bias, PYTORCH, ONNX)
    return lstm


def peculiarity_of(node: Any) -> str:
    """Return in words the first feature of an operator that PyTorch's LSTM lacks; "" where it has none."""
    activations = [name.decode().lower() for name in attribute_of(node, "activations", [])]
    found = {
        "clip": attribute_of(node, "clip") is not None,
        "input_forget": bool(attribute_of(node, "input_forget", 0)),
        "other activations": activations != _ACTIVATIONS * (len(activations) // len(_ACTIVATIONS)),
        "peepholes": len(node.input) > _PEEPHOLES and bool(node.input[_PEEPHOLES]),
    }
    return next((name for name, is_there in found.items() if is_there), "")


def _location(name: str, scope: Scope, node: Any, position: int, index: int, whole: Tensor) -> WeightLocation:
    """Return the location of one direction's matrix in an operand [D, 4H, n]."""
    factors = _factors(node.input[position], scope, index, len(whole))
    if factors is None:
        matrix: Matrix = reordered(whole[index], PYTORCH, ONNX)
    else:
        matrix = reordered(factors[0], PYTORCH, ONNX), factors[1].contiguous()
    storage = storage_of(node.input[position], scope, index)
    size = stored_itemsize(node.input[position], scope, index)
    return WeightLocation(name, matrix, ONNX, scope, node, position, index, storage=storage, stored_itemsize=size)


def _check_shapes(name: str, weights: tuple[Tensor, Tensor, Tensor | None], directions: int, hidden: int) -> None:
    w, r, b = weights
    fits = w.ndim == r.ndim == 3 and w.shape[:2] == r.shape[:2] == (directions, 4 * hidden) and r.shape[2] == hidden
    if not fits or hidden < 1 or w.shape[2] < 1 or (b is not None and b.shape != (directions, 8 * hidden)):
        found = ", ".join(str(list(part.shape)) for part in weights if part is not None)
        raise SlimLSTMError(
            f"the weights of the LSTM {name} are {found}, not [D, 4H, I], [D, 4H, H] and [D, 8H] with D = {directions} and "
            f"H = {hidden}; the file is damaged"
        )


def _factors(name: str, scope: Scope, index: int, directions: int) -> tuple[Tensor, Tensor] | None:
    """Return U [4H, r] and V [r, n] where one direction of an operand is a product of constants."""
    node = scope.producers.get(name)
    if node is not None and node.op_type == "Concat" and len(node.input) == directions > 1:
        node = scope.producers.get(node.input[index])
    elif directions > 1:
        return None
    if node is None or node.op_type != "MatMul":
        return None
    u, v = (constant(part, scope) for part in node.input)
    return None if u is None or v is None or u.ndim != 3 or v.ndim != 3 else (u[0], v[0])


def quantization(node: Any, scope: Scope, position: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the codes of a quantised operator's W or R, [D, n, 4H], their scales and their zero points.

    Scales and zero points are float32 [D, 1, 1] or [D, 1, 4H]. Return None where codes, scales or zero points are no
    constants.

    Args:
        node: the operator.
        scope: the graph that it is in.
        position: the position of W, 1, or of R, 2, among the operator's inputs.
    """
    scale_at = 8 if position == 1 else 10
    names = [node.input[at] if at < len(node.input) else "" for at in (position, scale_at, scale_at + 1)]
    codes, scale, zero = (constant(name, scope) for name in names)
    if codes is None or scale is None or codes.ndim != 3 or (names[2] and zero is None):
        return None
    zero = torch.zeros_like(scale) if zero is None else zero
    scale, zero = (part.float().reshape(len(codes), 1, -1) for part in (scale, zero))
    return codes, scale, zero


def dequantized(node: Any, scope: Scope, position: int) -> Tensor | None:
    """Return W [D, 4H, I] or R [D, 4H, H] of a quantised operator in float32, or None where it is no constant."""
    found = quantization(node, scope, position)
    if found is None:
        return None
    codes, scale, zero = found
    return ((codes.float() - zero) * scale).mT.contiguous()
