"""Which backend every LSTM layer of a model runs with, and why."""

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
from slimlstm.ops import cpu
from slimlstm.ops.weights import Direction
from slimlstm.pipeline.report import as_text


@dataclass(frozen=True)
class LayerChoice:
    """How one layer ran.

    Attributes:
        module: dotted path of its module, "" for the model itself.
        layer: its number within the module.
        backend: a key of :data:`slimlstm.ops.BACKENDS`, or ``"nn.LSTM"`` where it is PyTorch's own module.
        reason: why that one.
        storage: what the fused kernel keeps ih and hh in, ``"int8"`` or such as ``"bfloat16, int8"``.
        instruction_set: of the fused kernel, None elsewhere.
        threads: how many PyTorch allows; the kernel takes fewer where waking them would not pay.
        calls: how many times it ran so.
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
    """What :func:`explain` found, in the order of the first calls; to print, or to read."""

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
        """The explanation as JSON types."""
        return asdict(self)


def explain(model: nn.Module, *inputs: Any, **named: Any) -> Explanation:
    """Calls ``model(*inputs, **named)`` once and tells which backend every LSTM layer in it ran with, and why.

    Gradients, autocast and threads are as around this call: under ``torch.no_grad()`` it tells of inference.

    Raises:
        SlimLSTMError: the call reached no LSTM.
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
        raise SlimLSTMError("the call reached no LSTM; give the model an input that it takes through its LSTMs")
    return Explanation([replace(choice, calls=calls) for choice, calls in found.items()])


def _choices(path: str, module: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[LayerChoice]:
    threads = torch.get_num_threads()
    if not isinstance(module, LowRankLSTM | LowRankLSTMCell):
        reason = "not compressed; LowRankLSTM.from_dense gives it the kernel without changing a weight"
        layers = getattr(module, "num_layers", 1)
        yield from (LayerChoice(path, layer, "nn.LSTM", reason, threads=threads) for layer in range(layers))
        return
    x = kwargs["input"] if "input" in kwargs else given[0]
    states = kwargs.get("hx", given[1] if len(given) > 1 else None) or ()
    sizes = x.batch_sizes if isinstance(x, PackedSequence) else None
    x = x.data if isinstance(x, PackedSequence) else x
    for layer, directions in enumerate(module.layers()):
        backend, reason = _choose(module, x, sizes, directions, states)
        storages = dict.fromkeys(kept for weights in directions for kept in (weights.ih_storage, weights.hh_storage))
        instructions = cpu.instruction_set() if backend == "fused" and not cpu.missing else None
        yield LayerChoice(path, layer, backend, reason, ", ".join(storages), instructions, threads)


def _choose(
    module: LowRankLSTM | LowRankLSTMCell,
    x: Tensor,
    sizes: Tensor | None,
    directions: Sequence[Direction],
    states: tuple[Tensor, ...],
) -> tuple[str, str]:
    if isinstance(module, LowRankLSTMCell):
        choice = ops.choose(x[None], None, directions, states)
        return (choice.backend if choice.backend == "fused" else "reference"), choice.reason
    if module.backend != "auto":
        return module.backend, f"asked for, backend={module.backend!r}"
    if sizes is None:
        x = x[:, None] if x.ndim == 2 else x.transpose(0, 1) if module.batch_first else x
    return ops.choose(x, sizes, directions, states)
