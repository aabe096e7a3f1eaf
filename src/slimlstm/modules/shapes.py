"""Arguments and matrix shapes of LSTMs and their cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

LSTMState = tuple[Tensor, Tensor]
"""The hidden state h and the cell state c."""


def lstm_matrix_shapes(
    input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, proj_size: int, **_: Any
) -> dict[str, tuple[int, int]]:
    """Names and shapes of the recurrent matrices of an ``nn.LSTM``: ih [4H, I], hh [4H, P]."""
    shapes: dict[str, tuple[int, int]] = {}
    outputs, endings = proj_size or hidden_size, ("", "_reverse") if bidirectional else ("",)
    for layer in range(num_layers):
        inputs = input_size if layer == 0 else outputs * len(endings)
        for ending in endings:
            shapes[f"weight_ih_l{layer}{ending}"] = (4 * hidden_size, inputs)
            shapes[f"weight_hh_l{layer}{ending}"] = (4 * hidden_size, outputs)
    return shapes


def cell_matrix_shapes(input_size: int, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the recurrent matrices of an ``nn.LSTMCell``."""
    return {"weight_ih": (4 * hidden_size, input_size), "weight_hh": (4 * hidden_size, hidden_size)}


def lstm_arguments(lstm: nn.Module) -> dict[str, Any]:
    """What an ``nn.LSTM`` like this one is made with, device and dtype aside."""
    names: Sequence[str] = (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    )
    return {name: getattr(lstm, name, 0) for name in names}


def clips(lstm: nn.Module) -> dict[str, Any]:
    """The bounds that an LSTM clips its cells and projections to, None where it does not."""
    return {name: getattr(lstm, name, None) for name in ("cell_clip", "proj_clip")}
