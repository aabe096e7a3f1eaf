"""Build ONNX nodes and constants one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods.low_bit import pack

OPSET = 18
"""The opset to use where none is asked for."""
OLDEST_OPSET = 13
"""The oldest opset whose operators have the forms used here."""

INT4_OPSET = 21
"""The first opset with integers of 4 bits."""
INT4_IR_VERSION = 10
"""The first version of the file format with integers of 4 bits."""

SCALE = ".scale"
"""The ending of the names of scales, which are no weights."""
_AXES_ARE_INPUTS = 18
_SHAPE_HAS_BOUNDS = 15
_TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.float64: "DOUBLE",
    torch.bfloat16: "BFLOAT16",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
}


class GraphBuilder:
    """Collects nodes in their order, and constants; equal constants are stored once.

    Args:
        prefix: the beginning of all new names.
        parent: the builder of the surrounding graph, for the body of a Scan; both share one list of constants.
        opset: the version of ONNX's operators, from ``OLDEST_OPSET`` on.

    Examples:
        >>> builder = GraphBuilder("demo")
        >>> builder.add("Tanh", "x", to="y")
        'y'
        >>> builder.constant(torch.tensor([0]))
        'demo_2'
    """

    def __init__(self, prefix: str, parent: GraphBuilder | None = None, opset: int = OPSET) -> None:
        self.prefix, self.opset = prefix, opset if parent is None else parent.opset
        self.nodes: list[Any] = []
        self.constants: list[Any] = [] if parent is None else parent.constants
        self._known: dict[tuple[int, str], tuple[object, str]] = {} if parent is None else parent._known
        self._equal: dict[tuple[Any, ...], str] = {} if parent is None else parent._equal
        self._count = 0

    def add(self, operator: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, named ``to`` or by a new name; return the output's name."""
        return self.add_many(operator, inputs, [to or self._new_name()], **attributes)[0]

    def add_many(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Sequence[str]:
        """Add a node with these outputs, and return them."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, outputs, name=self._new_name(), **attributes))
        return outputs

    def constant(self, value: Tensor, ending: str = "") -> str:
        """Add a constant whose name has an ending, or find an equal one; return its name."""
        from onnx import helper

        value = value.detach().cpu()
        content = value.flatten().contiguous().view(torch.uint8).numpy().tobytes()
        key = value.dtype, tuple(value.shape), sha256(content).digest(), ending
        if key not in self._equal:
            self._equal[key] = f"{self._new_name()}{ending}"
            tensor = helper.make_tensor(self._equal[key], onnx_type(value.dtype), value.shape, content, raw=True)
            self.constants.append(tensor)
        return self._equal[key]

    def int4(self, value: Tensor) -> str:
        """Add a constant of integers of 4 bits, which needs ``INT4_OPSET`` or later; return its name."""
        tensor = int4_tensor(self._new_name(), value)
        self.constants.append(tensor)
        return tensor.name

    def once(self, owner: object, kind: str, make: Callable[[], Tensor]) -> str:
        """Return the name of a constant that belongs to ``owner`` and has this kind; the first call makes it."""
        return self.shared(owner, kind, lambda: self.constant(make()))

    def shared(self, owner: object, kind: str, add: Callable[[], str]) -> str:
        """Return the name of a value that belongs to ``owner`` and has this kind; the first call adds its nodes."""
        key = id(owner), kind
        if key not in self._known:
            self._known[key] = owner, add()  # the reference keeps the id from being reused
        return self._known[key][1]

    def names(self, count: int) -> list[str]:
        """Return new names."""
        return [self._new_name() for _ in range(count)]

    def cast(self, name: str, dtype: torch.dtype = torch.float32) -> str:
        """Add a conversion to another dtype; return the name of the result."""
        (result,) = self.names(1)
        self.add_many("Cast", [name], [result], to=onnx_type(dtype))
        return result

    def size(self, name: str, axis: int) -> str:
        """Add the size of one axis, int64 [1]; return its name."""
        if self.opset >= _SHAPE_HAS_BOUNDS:
            return self.add("Shape", name, start=axis, end=axis + 1)
        return self.add("Gather", self.add("Shape", name), self.constant(torch.tensor([axis])), axis=0)

    def largest(self, name: str) -> str:
        """Add the largest number along the last axis, whose size becomes 1; return the result's name."""
        if self.opset >= _AXES_ARE_INPUTS:
            return self.add("ReduceMax", name, self.constant(torch.tensor([-1])))
        return self.add("ReduceMax", name, axes=[-1])

    def _new_name(self) -> str:
        self._count += 1
        return f"{self.prefix}_{self._count}"


def int4_tensor(name: str, value: Tensor) -> Any:
    """Return integers from -8 to 7 as a constant, two in a byte."""
    from onnx import TensorProto, helper

    content = pack(value.detach().cpu(), 4).numpy().tobytes()
    return helper.make_tensor(name, TensorProto.INT4, value.shape, content, raw=True)


def onnx_type(dtype: torch.dtype) -> int:
    """Return ONNX's number for a dtype.

    Raises:
        SlimLSTMError: ONNX has none, or it is not used here.
    """
    from onnx import TensorProto

    if dtype not in _TYPES:
        raise SlimLSTMError(f"ONNX files cannot hold {dtype} codes here; give another storage")
    return getattr(TensorProto, _TYPES[dtype])


def value_info(name: str, dtype: torch.dtype, shape: Sequence[int | None]) -> Any:
    """Return the entry of a graph's input or output; a size of None is open."""
    from onnx import helper

    return helper.make_tensor_value_info(name, onnx_type(dtype), shape)
