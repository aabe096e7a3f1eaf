"""Read the products of integers in slimlstm's own Scans back as the matrices that they multiply by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from slimlstm.onnx.graph import Scope, WeightLocation, constant


class _Product(NamedTuple):
    """The weight [m, n] of a product, and the name of the value that it rounds."""

    weight: Tensor
    x: str


def integer_product(node: Any, scope: Scope) -> WeightLocation | None:
    """Return the location of the matrix, or the factors, of a product of integers that ends in a node.

    Gates are in the file's order. None where the node ends no such product.

    Args:
        node: the node, which is a Mul by the scales of the weight's rows if it ends such a product.
        scope: the graph that it is in.
    """
    outer = _product(node, scope)
    if outer is None:
        return None
    source = scope.producers.maps[0].get(outer.x)
    inner = None if source is None else _product(source, scope)
    if inner is None:
        return WeightLocation("", outer.weight, "", scope, node, 1, storage="int8", rounded=outer.x)
    factors = outer.weight, inner.weight
    return WeightLocation("", factors, "", scope, node, 1, source=source, storage="int8", rounded=inner.x)


def make_plain(location: WeightLocation) -> Iterator[str]:
    """Turn a product of integers into a plain MatMul; yield the names that are no longer read.

    The caller then sets the name of the MatMul's weight.
    """
    if not location.rounded:
        return
    x = location.rounded
    for node in filter(None, (location.source, location.node)):
        yield from node.input
        node.op_type = "MatMul"
        node.input[0], x = x, node.output[0]
    location.rounded = ""


def _product(node: Any, scope: Scope) -> _Product | None:
    producers = scope.producers.maps[0]
    nodes = [node]
    for kind in ("Mul", "Cast", "MatMulInteger"):
        before = producers.get(nodes[-1].input[0]) if nodes[-1].input else None
        if before is None or before.op_type != kind:
            return None
        nodes.append(before)
    if node.op_type != "Mul" or len(nodes[-1].input) != 4:
        return None
    codes, zero, scales = (constant(name, scope) for name in (nodes[-1].input[1], nodes[-1].input[3], node.input[1]))
    x = _rounded(producers.get(nodes[-1].input[0]), producers)
    if codes is None or zero is None or scales is None or codes.ndim != 2 or scales.shape != codes.shape[1:] or not x:
        return None
    return _Product((codes.float() - zero.float()).T * scales[:, None], x)


def _rounded(node: Any, producers: Any) -> str:
    """Return the value that a chain of nodes rounds to integers; "" where the chain does something else."""
    for kind in ("Cast", "Add", "Round", "Div"):
        if node is None or node.op_type != kind:
            return ""
        name = node.input[0]
        node = producers.get(name)
    return name
