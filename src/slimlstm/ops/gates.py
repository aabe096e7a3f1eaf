"""The orders of stacked gates in the weights of other libraries; slimlstm uses PyTorch's order."""

from __future__ import annotations

import torch
from torch import Tensor

PYTORCH = "ifgo"
"""Input, forget, cell and output gate, as ``nn.LSTM`` stacks them."""
ONNX = "iofg"
"""The order of ONNX's LSTM, whose specification calls the cell gate c."""
TENSORFLOW = "igfo"
"""The order of TensorFlow's and Keras's LSTM cells, which call the cell gate j or c."""


def reordered(stacked: Tensor, to: str, source: str = PYTORCH) -> Tensor:
    """Return gates [gates·H, ...] in another order.

    Args:
        stacked: a weight or bias whose rows are the gates, one block of H rows each.
        to: the order of the result, one letter a gate.
        source: the order of ``stacked``.

    Examples:
        >>> reordered(torch.tensor([1.0, 2.0, 3.0, 4.0]), ONNX)
        tensor([1., 4., 2., 3.])
    """
    blocks = dict(zip(source, stacked.chunk(len(source)), strict=True))
    return torch.cat([blocks[gate] for gate in to])
