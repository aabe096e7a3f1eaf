"""Store weights outside LSTMs in int8, by ONNX Runtime's own quantiser."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.onnx.difference import output_difference
from slimlstm.onnx.find import find_lstms
from slimlstm.onnx.graph import OnnxLSTM
from slimlstm.onnx.opsets import opset_of
from slimlstm.onnx.runtime import RunInputs

KINDS = {"linear": ("MatMul", "Gemm"), "conv": ("Conv",), "embedding": ("Gather",)}
"""The words that users give, and the operators whose weights each word selects."""
LARGEST_CHANGE = 0.1
"""The largest accepted change of the outputs, as a fraction of their norm."""
_SMALLEST = 256
"""Weights with fewer numbers stay: the nodes around int8 weights would outweigh them."""
_KEPT, _CHOSEN = "slimlstm.Kept.", "slimlstm.chosen."


def check_kinds(kinds: Iterable[str]) -> None:
    """Check the words that select weights outside LSTMs.

    Raises:
        SlimLSTMError: a word is none of :data:`KINDS`.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise SlimLSTMError(f"{', '.join(map(repr, unknown))} names no weights; give some of {', '.join(KINDS)}")


def quantize_others(
    model: Any, lstms: Iterable[OnnxLSTM], kinds: Collection[str], runs: Sequence[RunInputs] | None
) -> list[str]:
    """Replace weights outside LSTMs by int8, in place, and compare the outputs of both models.

    Linear and convolution weights have one scale for each output, and their inputs are rounded to int8 when the model runs;
    embeddings have one scale.

    Args:
        model: an ``onnx.ModelProto``.
        lstms: its LSTMs, whose weights stay as they are.
        kinds: words of :data:`KINDS`.
        runs: inputs by name to compare the outputs on; None for random ones.

    Returns:
        Notes for the report.

    Raises:
        SlimLSTMError: ONNX Runtime or its quantiser fails, no such weights are in the model, or the outputs change by more
            than :data:`LARGEST_CHANGE`.
    """
    check_kinds(kinds)
    # Some LSTMs are Scans now, and some operators' weights products of factors.
    of_lstms = _products_of([*lstms, *find_lstms(model, Path("the model"))])
    nodes = {
        kind: [node for node in _weighted(model.graph, KINDS[kind]) if node.output[0] not in of_lstms] for kind in kinds
    }
    missing = [kind for kind, found in nodes.items() if not found]
    if missing:
        operators = " or ".join(name for kind in missing for name in KINDS[kind])
        raise SlimLSTMError(
            f"the file has no {missing[0]} weights to quantise: no {operators} outside LSTMs reads a constant float32 "
            f"weight of {_SMALLEST} numbers or more; leave {missing[0]} out"
        )
    chosen = [node for found in nodes.values() for node in found]
    before, left = model.SerializeToString(), list[str]()
    with _kept(model, chosen, of_lstms) as names:
        for kind, found in nodes.items():
            _quantize(model, kind, [names[id(node)] for node in found])
            # Embeddings go on being gathered, from a table of integers.
            left += [node.op_type for node in model.graph.node if node.op_type in KINDS[kind] and _is_chosen(node)]
    count = len(chosen) - sum(name != "Gather" for name in left)
    if not count:
        raise SlimLSTMError(
            f"ONNX Runtime's quantiser leaves the {', '.join(kinds)} weights of this file as they are; leave them out"
        )
    change = _change(before, model, runs)
    if not change <= LARGEST_CHANGE:
        raise SlimLSTMError(
            f"with {', '.join(kinds)} weights in int8 the outputs change by {change:.1%} of their norm, more than "
            f"{LARGEST_CHANGE:.0%}; leave some of them out of --also, or of also= in Python"
        )
    on = "random inputs" if runs is None else "the given inputs"
    return [f"{count} other weights ({', '.join(kinds)}) are int8 too, which changes the outputs by {change:.2%} on {on}"]


def _products_of(lstms: Iterable[OnnxLSTM]) -> set[str]:
    """Return the names of the products with the matrices of LSTMs that are written out in single operators, and of the
    values that the weights of operators are computed from."""
    lstms = list(lstms)
    nodes = [node for lstm in lstms for one in lstm.locations for node in (one.node, one.source) if node is not None]
    nodes += [node for lstm in lstms if lstm.is_operator for node in _sources(lstm)]
    # Where a matrix became factors, the product with V is a new node.
    return {name for node in nodes for name in (node.output[0], f"{node.output[0]}_thin")}


def _sources(lstm: OnnxLSTM) -> list[Any]:
    """Return the nodes that compute the weights of an LSTM operator."""
    found, pending = dict[int, Any](), list(lstm.node.input[1:4])
    while pending:
        node = lstm.scope.producers.get(pending.pop())
        if node is not None and id(node) not in found:
            found[id(node)] = node
            pending += node.input
    return list(found.values())


def _weighted(graph: Any, operators: Collection[str]) -> list[Any]:
    """Return the nodes of these operators that read a large constant weight in float32."""
    from onnx import TensorProto

    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    found: list[Any] = []
    for node in graph.node:
        if node.op_type in operators and node.domain in ("", "ai.onnx"):
            tensor = weights.get(node.input[0 if node.op_type == "Gather" else 1])
            shape = () if tensor is None else tuple(tensor.dims)
            # An embedding is a table; other constants that are gathered from are no weights.
            if math.prod(shape) >= _SMALLEST and (node.op_type != "Gather" or len(shape) == 2):
                found.append(node)
    return found


@contextmanager
def _kept(model: Any, chosen: Collection[Any], of_lstms: Collection[str]) -> Generator[dict[int, str]]:
    """Hide every Gemm of an LSTM within the block, and yield the names of the chosen nodes by id.

    The quantiser turns all Gemm nodes into MatMul, even where it does not quantise them.
    """
    names = {id(node): f"{_CHOSEN}{index}." for index, node in enumerate(chosen)}
    own = {names[id(node)]: node.name for node in chosen}
    for node in model.graph.node:
        if id(node) in names:
            node.name = names[id(node)]
        elif node.op_type == "Gemm" and node.output[0] in of_lstms:
            node.op_type = _KEPT + node.op_type
    try:
        yield names
    finally:
        for node in model.graph.node:
            node.op_type = node.op_type.removeprefix(_KEPT)
            stem = next((name for name in own if node.name.startswith(name)), None)
            if stem is not None:
                node.name = own[stem] + node.name.removeprefix(stem)


def _is_chosen(node: Any) -> bool:
    return node.name.startswith(_CHOSEN) and node.name.removesuffix("_MatMul").endswith(".")


def _quantize(model: Any, kind: str, names: list[str]) -> None:
    """Run ONNX Runtime's quantiser on the nodes with these names."""
    import onnx

    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise SlimLSTMError(
            "weights are quantised by onnxruntime, which is not installed: pip install onnxruntime"
        ) from error
    with tempfile.TemporaryDirectory() as folder, _quiet():
        output = Path(folder) / "quantised.onnx"
        try:
            quantize_dynamic(
                model,
                output,
                op_types_to_quantize=list(KINDS[kind]),
                per_channel=kind != "embedding" and opset_of(model) >= 13,
                # ONNX Runtime's ConvInteger takes unsigned weights only.
                weight_type=QuantType.QUInt8 if kind == "conv" else QuantType.QInt8,
                # Gemm nodes become MatMul nodes with longer names first.
                nodes_to_quantize=[name + ending for name in names for ending in ("", "_MatMul")],
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )
        except Exception as error:  # classes of several libraries
            raise SlimLSTMError(
                f"ONNX Runtime cannot quantise the {kind} weights: {reason_of(error)}; leave {kind} out"
            ) from error
        model.CopyFrom(onnx.load(output))


def _change(before: bytes, model: Any, runs: Sequence[RunInputs] | None) -> float:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("before.onnx", "after.onnx")]
        for path, content in zip(paths, (before, model.SerializeToString()), strict=True):
            path.write_bytes(content)
        return output_difference(paths[0], paths[1], runs)


@contextmanager
def _quiet() -> Generator[None]:
    """Silence the quantiser's advice, which goes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
