"""Make inputs for an ONNX file of which no runs are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from slimlstm.onnx.graph import attribute_of, graphs_of

OPEN_SIZE = 4
"""The size that random inputs have along open axes."""
_FLOATS = {"float": np.float32, "float16": np.float16, "double": np.float64}
_WHOLE = {f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
_WHOLE["bool"] = np.dtype(np.bool_)
_LENGTHS = {"LSTM": 4, "DynamicQuantizeLSTM": 4, "GRU": 4, "RNN": 4, "ReverseSequence": 1}
"""Operators that read lengths of sequences, and the position of the lengths among their inputs."""
_LIMITS = {"Less": 1, "LessOrEqual": 1, "Greater": 0, "GreaterOrEqual": 0}
"""Comparisons that tell which steps a sequence has, and the position of its length."""
_WITH_ALL_INPUTS = {"Add", "Concat", "Div", "Max", "Min", "Mul", "Sub"}
_NOT_FOLLOWED = {"If", "Loop", "Scan", "Shape", "Size"}


def random_inputs(path: Path, entries: list[Any]) -> dict[str, Any]:
    """Return random numbers for the inputs of a file, and zeros for integers.

    Inputs that lengths of sequences are computed from, such as lengths or a mask, get values with which all steps count.

    Args:
        path: the file.
        entries: the inputs of ONNX Runtime's session for it.
    """
    generator, inputs = np.random.default_rng(0), dict[str, Any]()
    shapes = {
        entry.name: [size if isinstance(size, int) and size > 0 else OPEN_SIZE for size in entry.shape] for entry in entries
    }
    kinds = {entry.name: entry.type.removeprefix("tensor(").removesuffix(")") for entry in entries}
    values = _lengths(path, shapes)
    for name, kind in kinds.items():
        if kind in _FLOATS and name not in values:
            inputs[name] = generator.standard_normal(shapes[name]).astype(_FLOATS[kind])
        else:
            dtype = _FLOATS.get(kind) or _WHOLE.get(kind, np.dtype(np.int64))
            inputs[name] = np.full(shapes[name], values.get(name, 0), dtype)
    return inputs


def _lengths(path: Path, shapes: Mapping[str, list[int]]) -> dict[str, int]:
    """Return a value for every input that lengths of sequences are computed from, so that all steps count."""
    import onnx
    from onnx import shape_inference

    model = onnx.load(path, load_external_data=False)
    del model.graph.value_info[:]
    for entry in model.graph.input:
        for axis, size in zip(entry.type.tensor_type.shape.dim, shapes.get(entry.name, []), strict=False):
            axis.dim_value = size
    with suppress(Exception):  # the classes of onnx's C++ code; some sizes then stay unknown
        model = shape_inference.infer_shapes(model)
    graphs = list(graphs_of(model.graph))
    sizes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for graph in graphs
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    producers = {name: node for graph in graphs for node in graph.node for name in node.output}
    largest, found = max((size for shape in shapes.values() for size in shape), default=OPEN_SIZE), dict[str, int]()
    layers = [node for graph in graphs for node in graph.node if node.op_type in _LENGTHS and node.input]
    rows = {source for node in layers for source, _ in _sources(node.input[0], 0, producers)}
    for graph in graphs:
        for node in graph.node:
            name, steps = _length_of(node, sizes, producers, largest)
            for source, value in _sources(name, steps, producers) if name else ():
                found[source] = min(found.get(source, value), value)
    return {name: value for name, value in found.items() if name not in rows}


def _length_of(node: Any, sizes: Mapping[str, list[int]], producers: Mapping[str, Any], largest: int) -> tuple[str, int]:
    """Return the value that a node takes for lengths of sequences, or "", and the number of steps."""
    if node.op_type in _LIMITS and len(node.input) == 2:
        at = _LIMITS[node.op_type]
        range_ = _before(node.input[1 - at], "Range", producers)
        if range_ is None:
            return "", 0
        of = _before(range_.input[1], "Shape", producers)
        axis = None if of is None else attribute_of(of, "start")
        known = [] if of is None or axis is None else sizes.get(of.input[0], [])[axis:][:1]
        return node.input[at], (known[0] if known else 0) or largest
    at = _LENGTHS.get(node.op_type, len(node.input))
    if at >= len(node.input):
        return "", 0
    shape = sizes.get(node.input[0], [])
    axis = attribute_of(node, "time_axis", 0) if node.op_type == "ReverseSequence" else attribute_of(node, "layout", 0)
    return node.input[at], (shape[axis] if axis < len(shape) else 0) or OPEN_SIZE


def _before(name: str, operator: str, producers: Mapping[str, Any]) -> Any:
    """Return the last node of an operator on the way to a value through first inputs, or None."""
    seen = set[str]()
    while name not in seen and (node := producers.get(name)) is not None:
        if node.op_type == operator:
            return node
        seen.add(name)
        name = node.input[0] if node.input else ""
    return None


def _sources(name: str, value: int, producers: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the values that no node computes and from which a length follows, with the number that gives this length."""
    pending, seen = [(name, value)], set[str]()
    while pending:
        name, value = pending.pop()
        node = producers.get(name)
        if name in seen or not name:
            continue
        seen.add(name)
        if node is None:
            yield name, value
        elif node.op_type not in _NOT_FOLLOWED:
            # A mask has a one for every step.
            value = 1 if node.op_type == "ReduceSum" else int(not value) if node.op_type == "Not" else value
            pending += [(one, value) for one in (node.input if node.op_type in _WITH_ALL_INPUTS else node.input[:1])]
