"""Explain which backend each LSTM layer of a model runs with, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from slimlstm import ops
from slimlstm.errors import SlimLSTMError
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.factored import FactoredModule
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.ops import native
from slimlstm.ops.weights import Direction
from slimlstm.pipeline.report import as_text


@dataclass(frozen=True)
class LayerChoice:
    """The backend that one layer ran with.

    Attributes:
        module: the dotted path of the layer's module, "" for the model itself.
        layer: the layer's index within the module.
        backend: a key of :data:`slimlstm.ops.BACKENDS`, or ``"nn.LSTM"`` for PyTorch's own module.
        reason: why this backend was chosen.
        storage: the fused kernel's format of ih and hh: ``"int8"``, or ``"bfloat16, int8"`` if they differ.
        instruction_set: the fused kernel's instruction set, None for other backends.
        threads: the number of PyTorch's threads; the kernel uses fewer where that is faster.
        calls: how many times the layer ran with this backend.
    """

    module: str
    layer: int
    backend: str
    reason: str
    storage: str = "float32"
    instruction_set: str | None = None
    threads: int = 1
    calls: int = 1


@dataclass(frozen=True)
class Explanation:
    """Result of :func:`explain`, printable: the layers in the order of their first calls."""

    layers: list[LayerChoice]

    def __rich__(self) -> Table:
        table = Table()
        for heading in ("layer", "backend", "storage", "instructions", "threads", "calls", "why"):
            table.add_column(heading, overflow="fold")
        for one in self.layers:
            name = f"{one.module}, layer {one.layer}" if one.module else f"layer {one.layer}"
            numbers = map(str, (one.threads, one.calls))
            table.add_row(name, one.backend, one.storage, one.instruction_set or "", *numbers, one.reason)
        return table

    def __str__(self) -> str:
        return as_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON types."""
        return asdict(self)


def explain(model: nn.Module, *inputs: Any, **named: Any) -> Explanation:
    """Call ``model(*inputs, **named)`` once and return which backend each of its LSTM layers ran with, and why.

    The model runs in its current mode, with the caller's settings of gradients, autocast and threads. Call ``model.eval()``
    first to learn about inference.

    Raises:
        SlimLSTMError: the call reached no LSTM.

    Examples:
        >>> from slimlstm import LowRankLSTM
        >>> found = explain(LowRankLSTM(3, 4, backend="dense"), torch.randn(5, 1, 3))
        >>> found.layers[0].backend, found.layers[0].reason
        ('dense', "requested by backend='dense'")
    """
    found: dict[LayerChoice, int] = {}
    handles: list[Any] = []
    for path, module in model.named_modules():
        if isinstance(module, FactoredModule | nn.LSTM | nn.LSTMCell):

            def note(module: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                for choice in _choices(path, module, given, kwargs):
                    found[choice] = found.get(choice, 0) + 1

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        model(*inputs, **named)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise SlimLSTMError("the call reached no LSTM; give inputs that the model passes through its LSTMs")
    return Explanation([replace(choice, calls=calls) for choice, calls in found.items()])


def _choices(path: str, module: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[LayerChoice]:
    threads = torch.get_num_threads()
    if not isinstance(module, LowRankLSTM | LowRankLSTMCell):
        reason = "not compressed; LowRankLSTM.from_dense(lstm) would run the kernel with the same weights"
        layers = getattr(module, "num_layers", 1)
        yield from (LayerChoice(path, layer, "nn.LSTM", reason, threads=threads) for layer in range(layers))
        return
    x = kwargs["input"] if "input" in kwargs else given[0]
    states = kwargs.get("hx", given[1] if len(given) > 1 else None) or ()
    sizes = x.batch_sizes if isinstance(x, PackedSequence) else None
    x = x.data if isinstance(x, PackedSequence) else x
    for layer, directions in enumerate(module.layers()):
        backend, reason = _choose(module, x, sizes, directions, states)
        storages = dict.fromkeys(storage for weights in directions for storage in (weights.ih_storage, weights.hh_storage))
        instructions = native.instruction_set() if backend == "fused" and not native.missing else None
        yield LayerChoice(path, layer, backend, reason, ", ".join(storages), instructions, threads)


def _choose(
    module: LowRankLSTM | LowRankLSTMCell,
    x: Tensor,
    sizes: Tensor | None,
    directions: Sequence[Direction],
    states: tuple[Tensor, ...],
) -> tuple[str, str]:
    if isinstance(module, LowRankLSTMCell):
        choice = ops.choose_backend(x[None], None, directions, states, module.training)
        return (choice.backend if choice.backend == "fused" else "reference"), choice.reason
    if module.backend != "auto":
        return module.backend, f"requested by backend={module.backend!r}"
    if sizes is None:
        x = x[:, None] if x.ndim == 2 else x.transpose(0, 1) if module.batch_first else x
    return ops.choose_backend(x, sizes, directions, states, module.training)
