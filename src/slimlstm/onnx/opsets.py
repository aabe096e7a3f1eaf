"""Write a traced model in an older opset."""

from __future__ import annotations

import re
from typing import Any

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.onnx.builder import OLDEST_OPSET
from slimlstm.onnx.graph import attribute_of

_TRACED = 18
"""The oldest opset that PyTorch's exporter writes."""
_LAYER_NORMALIZATION = 17
"""The first opset with LayerNormalization."""
_SHAPE_BOUNDS = 15
"""The first opset whose Shape has the attributes start and end."""
_HIDDEN = "slimlstm.hidden"
"""A domain for operators that onnx's converter must leave alone."""


def check_opset(opset: int | None) -> None:
    """Raise :class:`SlimLSTMError` unless an opset is None or one that can be written."""
    from onnx import defs

    newest = defs.onnx_opset_version()
    if opset is not None and opset not in range(OLDEST_OPSET, newest + 1):
        raise SlimLSTMError(f"opset={opset!r} cannot be written; give one from {OLDEST_OPSET} to {newest}")


def traced_opset(opset: int | None) -> int | None:
    """Return the opset to trace in, for a file in ``opset``."""
    return None if opset is None else max(opset, _TRACED)


def opset_of(proto: Any) -> int:
    """Return the version of ONNX's own operators in a model."""
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def converted(proto: Any, opset: int | None) -> Any:
    """Return a model in another opset, in the oldest version of the file format that has it.

    Args:
        proto: an ``onnx.ModelProto``, which changes.
        opset: the opset; None returns the model in its own.

    Raises:
        SlimLSTMError: the opset has no operator for something that the model computes.
    """
    from onnx import helper

    _remove_metadata(proto)
    if opset is None:
        return proto
    if opset_of(proto) != opset:
        foreign = [entry for entry in proto.opset_import if entry.domain not in ("", "ai.onnx")]
        _prepare(proto, opset)
        proto = _convert(proto, opset)
        for node in proto.graph.node:
            node.domain = "" if node.domain == _HIDDEN else node.domain
        del proto.opset_import[:]
        proto.opset_import.extend([helper.make_opsetid("", opset), *foreign])
    proto.ir_version = min(proto.ir_version, helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))
    return proto


def _convert(proto: Any, opset: int) -> Any:
    """Convert all operators. Operators without a rule of conversion stay as they are, and onnx's checker judges them.

    They are often valid, because a newer version of an operator often only accepts more dtypes.
    """
    from onnx import version_converter

    while True:
        try:
            return version_converter.convert_version(proto, opset)
        except Exception as error:  # the converter raises what its C++ code throws
            reason = reason_of(error)
            found = re.search(r"No Adapter From Version \$\d+ for (\w+)", reason)
            kind = found.group(1) if found else ""
            nodes = [node for node in proto.graph.node if node.op_type == kind and node.domain in ("", "ai.onnx")]
            if not nodes:
                raise SlimLSTMError(
                    f"the model needs operators that opset {opset} lacks ({reason}); give a newer opset="
                ) from error
            for node in nodes:
                node.domain = _HIDDEN


def _remove_metadata(proto: Any) -> None:
    """Remove the exporter's notes, such as stack traces with paths of this machine."""
    del proto.metadata_props[:]
    graph = proto.graph
    for message in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        if hasattr(message, "metadata_props"):
            del message.metadata_props[:]
    for node in graph.node:
        node.ClearField("doc_string")


def _prepare(proto: Any, opset: int) -> None:
    """Rewrite the operators that onnx's converter cannot convert."""
    from onnx import helper

    proto.opset_import.append(helper.make_opsetid(_HIDDEN, 1))
    for node in [node for node in proto.graph.node if node.op_type == "Split"]:
        _name_sizes(proto.graph, node)
        node.domain = _HIDDEN
    for node in [node for node in proto.graph.node if node.op_type == "Shape" and opset < _SHAPE_BOUNDS]:
        _slice_shape(proto.graph, node)
    norms = [node for node in proto.graph.node if node.op_type == "LayerNormalization" and opset < _LAYER_NORMALIZATION]
    for number, node in enumerate(norms):
        at = next(index for index, other in enumerate(proto.graph.node) if other.output == node.output)
        for new in reversed(_normalization(proto.graph, node, f"slimlstm_norm_{number}")):
            proto.graph.node.insert(at + 1, new)
        del proto.graph.node[at]


def _name_sizes(graph: Any, node: Any) -> None:
    """Give a Split the sizes of its parts instead of the attribute ``num_outputs``, which is new in opset 18."""
    import numpy as np
    from onnx import numpy_helper

    count = attribute_of(node, "num_outputs")
    if count is None:
        return
    kept = [attribute for attribute in node.attribute if attribute.name != "num_outputs"]
    del node.attribute[:]
    node.attribute.extend(kept)
    entries = (entry for entry in (*graph.value_info, *graph.input) if entry.name == node.input[0])
    axes = [axis.dim_value for entry in entries for axis in entry.type.tensor_type.shape.dim]
    size = axes[attribute_of(node, "axis", 0)] if axes else 0
    if size % count:
        part = -(-size // count)
        sizes = [min(part, size - index * part) for index in range(count)]
        name = f"{node.output[0]}_sizes"
        graph.initializer.append(numpy_helper.from_array(np.array(sizes), name))
        node.input[1:] = [name]


def _slice_shape(graph: Any, node: Any) -> None:
    """Replace the attributes start and end of a Shape by a Slice of the whole shape."""
    import numpy as np
    from onnx import helper, numpy_helper

    bounds = attribute_of(node, "start", 0), attribute_of(node, "end", np.iinfo(np.int64).max)
    del node.attribute[:]
    whole, part = f"{node.output[0]}_whole", node.output[0]
    names = [f"{part}_{name}" for name in ("start", "end")]
    pairs = zip(names, bounds, strict=True)
    graph.initializer.extend(numpy_helper.from_array(np.array([bound]), name) for name, bound in pairs)
    node.output[0] = whole
    at = next(index for index, other in enumerate(graph.node) if whole in other.output)
    graph.node.insert(at + 1, helper.make_node("Slice", [whole, *names], [part]))


def _normalization(graph: Any, node: Any, prefix: str) -> list[Any]:
    """Return LayerNormalization in single operators of opset 18."""
    import numpy as np
    from onnx import helper, numpy_helper

    axes, epsilon = list(range(attribute_of(node, "axis", -1), 0)), attribute_of(node, "epsilon", 1e-5)
    constants = {"axes": np.array(axes), "epsilon": np.array(epsilon, np.float32)}
    graph.initializer.extend(numpy_helper.from_array(value, f"{prefix}_{name}") for name, value in constants.items())

    def make(operator: str, output: str, *inputs: str) -> Any:
        names = [name if name in node.input else f"{prefix}_{name}" for name in inputs]
        return helper.make_node(operator, names, [output if output in node.output else f"{prefix}_{output}"])

    x, scale, *bias = node.input
    last = "scaled" if bias else node.output[0]
    nodes = [
        make("ReduceMean", "mean", x, "axes"),
        make("Sub", "centred", x, "mean"),
        make("Mul", "square", "centred", "centred"),
        make("ReduceMean", "variance", "square", "axes"),
        make("Add", "shifted", "variance", "epsilon"),
        make("Sqrt", "deviation", "shifted"),
        make("Div", "normal", "centred", "deviation"),
        make("Mul", last, "normal", scale),
    ]
    return nodes + [make("Add", node.output[0], last, name) for name in bias]
