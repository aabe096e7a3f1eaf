"""Trace a model with PyTorch's exporter, with one placeholder node for every recurrence.

The placeholders keep time and batch open; :mod:`slimlstm.onnx.export` replaces them by ONNX's LSTM or by a Scan.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]  # the public name is of newer versions

from slimlstm.calibration.observe import build_like, forwards_replaced
from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.methods import storage_called
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.host import Host
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.shapes import LSTMState
from slimlstm.onnx.builder import INT4_OPSET
from slimlstm.ops.weights import Direction

DOMAIN, PLACEHOLDER = "slimlstm", "Recurrence"
"""The domain and the operator of a placeholder. Its attribute ``number`` is the position in :attr:`Traced.layers`."""

Shape = tuple[Any, ...]
"""Sizes: integers, or PyTorch's expressions where they are open."""


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        program: PyTorch's ``ONNXProgram``, with placeholders.
        layers: the weights of every placeholder, by number.
        shapes: the shape of every input.
        limits: the smallest and largest value of every open size, by PyTorch's symbol.
        closed: the value of every size that has only one possible value, by its name in the program.
    """

    program: Any
    layers: list[Sequence[Direction]]
    shapes: list[Shape]
    limits: dict[Any, tuple[int, int]]
    closed: dict[str, int]


def trace(
    model: nn.Module,
    hosts: Sequence[Host],
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    *,
    opset: int | None,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    dynamic_shapes: Any,
) -> Traced:
    """Trace a model in evaluation mode.

    Args:
        model: the model.
        hosts: its LSTMs.
        arguments: example inputs by position.
        named: example inputs by name.
        opset: the version of ONNX's operators; None for PyTorch's default.
        input_names: see :func:`slimlstm.export_onnx`.
        output_names: see :func:`slimlstm.export_onnx`.
        dynamic_shapes: as for ``torch.export.export``; None leaves all axes open that can be.

    Raises:
        SlimLSTMError: PyTorch cannot trace the model.
        ImportError: onnx or onnxscript is not installed.
    """
    layers: list[Sequence[Direction]] = []
    modules = [(host.lstm, _placeholder_module(host, layers, (opset or 0) >= INT4_OPSET)) for host in hosts]
    if dynamic_shapes is None:
        dynamic_shapes = pytree.tree_map(_all_open, named or arguments)
    try:
        with forwards_replaced(modules), _quiet():
            program = torch.onnx.export(
                model,
                arguments,
                kwargs=named,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
                opset_version=opset,
            )
    except (ImportError, SlimLSTMError):
        raise
    except Exception as error:  # PyTorch's exporter raises as many classes as models can
        raise SlimLSTMError(f"PyTorch cannot trace the model: {_cause_of(error)}") from error
    if program is None:
        raise SlimLSTMError("PyTorch's exporter returned no model")
    return Traced(program, layers, *_axes(program))


class _PlaceholderLSTM(LowRankLSTM):
    numbers: list[int]

    def _forward_packed(self, packed: PackedSequence, hx: LSTMState | None) -> tuple[PackedSequence, LSTMState]:
        raise SlimLSTMError("packed sequences cannot be written to ONNX; export the model for padded ones")

    def _run(self, x: Tensor, batch_sizes: Tensor | None, hx: LSTMState | None) -> tuple[Tensor, LSTMState]:
        count = self._directions
        if hx is None:
            shape = self.num_layers * count, x.shape[1]
            hx = x.new_zeros(*shape, self.proj_size or self.hidden_size), x.new_zeros(*shape, self.hidden_size)
        last: list[LSTMState] = []
        for layer, number in enumerate(self.numbers):
            part = slice(layer * count, (layer + 1) * count)
            x, h, c = _placeholder(x, hx[0][part], hx[1][part], number)
            last.append((h, c))
        return x, (torch.cat([h for h, _ in last]), torch.cat([c for _, c in last]))


class _PlaceholderCell(LowRankLSTMCell):
    numbers: list[int]

    def _step(self, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Direction]) -> LSTMState:
        _, h, c = _placeholder(x[None], h[None], c[None], self.numbers[0])
        return h[0], c[0]


def _placeholder(x: Tensor, h0: Tensor, c0: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Add the placeholder of a layer to the trace; return y [T, B, D P], h and c."""
    steps, batch, _ = x.shape
    y, h, c = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{PLACEHOLDER}",
        (x, h0, c0),
        {"number": number},
        dtypes=(x.dtype, h0.dtype, c0.dtype),
        shapes=((steps, batch, h0.shape[0] * h0.shape[2]), h0.shape, c0.shape),
        version=1,
    )
    return y, h, c


def _placeholder_module(host: Host, layers: list[Sequence[Direction]], has_int4: bool) -> nn.Module:
    """Return the module whose forward pass replaces the host's; append the weights of its layers to ``layers``."""
    module = build_like(host, _PlaceholderLSTM, _PlaceholderCell, host.weight)
    module.storages = dict(getattr(host.lstm, "storages", {}))
    own = _with_storages(module) if has_int4 else module.layers()
    module.numbers = list(range(len(layers), len(layers) + len(own)))
    layers += own
    return module


def _with_storages(module: Any) -> list[list[Direction]]:
    """Return a module's layers, with the storage's own name for codes of at most 4 bits, which the kernel calls int8."""
    names = iter(module.matrix_shapes)  # ih and hh of every layer and direction, in their order

    def storage(name: str, of_kernel: str) -> str:
        own = module.storages.get(name, "float32")
        return own if (storage_called(own).bits or 8) <= 4 else of_kernel

    return [
        [
            one._replace(ih_storage=storage(next(names), one.ih_storage), hh_storage=storage(next(names), one.hh_storage))
            for one in layer
        ]
        for layer in module.layers()
    ]


def _all_open(value: Any) -> Any:
    return dict.fromkeys(range(value.ndim), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None


def _cause_of(error: BaseException) -> str:
    """Return the reason at the bottom of a chain of exceptions, or slimlstm's own reason where the chain has one."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    ours = next((cause for cause in causes if isinstance(cause, SlimLSTMError)), None)
    return str(ours) if ours is not None else f"{type(causes[-1]).__name__}: {reason_of(causes[-1])}"


def _axes(program: Any) -> tuple[list[Shape], dict[Any, tuple[int, int]], dict[str, int]]:
    """Return the shapes of the inputs, the limits of open sizes, and the sizes that turned out to be closed."""
    exported = program.exported_program
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    ranges = exported.range_constraints
    # PyTorch gives an axis that must have size 1 the range of 1 to 2.
    closed = {symbol: int(limits.lower) for symbol, limits in ranges.items() if limits.upper - limits.lower <= 1}

    def known(size: Any) -> Any:
        size = size.node.expr if isinstance(size, torch.SymInt) else size
        return closed.get(size, size)

    shapes = [
        tuple(known(size) for size in values[name].shape)
        for name in exported.graph_signature.user_inputs
        if isinstance(values.get(name), Tensor)
    ]
    symbols = {symbol for shape in shapes for size in shape for symbol in getattr(size, "free_symbols", ())}
    limits = {
        symbol: (max(1, int(ranges[symbol].lower)), int(min(ranges[symbol].upper, 2**31 - 1)))
        for symbol in sorted(symbols, key=str)
        if symbol in ranges
    }
    return shapes, limits, {str(symbol): size for symbol, size in closed.items()}


@contextmanager
def _quiet() -> Generator[None]:
    """Silence the exporter's advice on packages and classes that are not the user's."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
