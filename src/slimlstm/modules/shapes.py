"""Arguments and matrix shapes of LSTMs and their cells."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

LSTMState = tuple[Tensor, Tensor]
"""The hidden state h and the cell state c."""

_ARGUMENTS = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
)


def lstm_matrix_shapes(
    input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, proj_size: int, **_: Any
) -> dict[str, tuple[int, int]]:
    """Return the shapes of an LSTM's recurrent matrices by name: ih [4H, I] and hh [4H, P].

    Examples:
        >>> lstm_matrix_shapes(input_size=3, hidden_size=4, num_layers=1, bidirectional=False, proj_size=0)
        {'weight_ih_l0': (16, 3), 'weight_hh_l0': (16, 4)}
    """
    shapes: dict[str, tuple[int, int]] = {}
    outputs, endings = proj_size or hidden_size, ("", "_reverse") if bidirectional else ("",)
    for layer in range(num_layers):
        inputs = input_size if layer == 0 else outputs * len(endings)
        for ending in endings:
            shapes[f"weight_ih_l{layer}{ending}"] = (4 * hidden_size, inputs)
            shapes[f"weight_hh_l{layer}{ending}"] = (4 * hidden_size, outputs)
    return shapes


def cell_matrix_shapes(input_size: int, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of an LSTM cell's recurrent matrices by name.

    Examples:
        >>> cell_matrix_shapes(input_size=3, hidden_size=4)
        {'weight_ih': (16, 3), 'weight_hh': (16, 4)}
    """
    return {"weight_ih": (4 * hidden_size, input_size), "weight_hh": (4 * hidden_size, hidden_size)}


def lstm_arguments(lstm: nn.Module) -> dict[str, Any]:
    """Return the arguments that make an ``nn.LSTM`` like this one, except device and dtype.

    Examples:
        >>> lstm_arguments(nn.LSTM(3, 4, num_layers=2))["num_layers"]
        2
    """
    return {name: getattr(lstm, name, 0) for name in _ARGUMENTS}


def clips(lstm: nn.Module) -> dict[str, Any]:
    """Return the bounds on an LSTM's cells and projected outputs, None where it has none.

    Examples:
        >>> clips(nn.LSTM(3, 4))
        {'cell_clip': None, 'proj_clip': None}
    """
    return {name: getattr(lstm, name, None) for name in ("cell_clip", "proj_clip")}
