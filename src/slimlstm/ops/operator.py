"""The fused layer as one PyTorch operator, ``slimlstm::layer``, for ``torch.compile`` and ``torch.export``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimlstm.ops import cpu
from slimlstm.ops.packing import clips_of, storages_of
from slimlstm.ops.weights import Direction, LayerOutput, first_states, flat, unflattened


def run(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> LayerOutput:
    """Run a layer as :func:`slimlstm.ops.cpu.run` does, recorded by a compiler as one operator."""
    h0, c0 = first_states(x, batch_sizes, h0, c0, directions)
    storages = ",".join(storages_of(directions))
    return LayerOutput(*layer(x, batch_sizes, h0, c0, flat(directions), storages, clips_of(directions)))


@torch.library.custom_op("slimlstm::layer", mutates_args=(), device_types="cpu")
def layer(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor | None],
    storages: str,
    clips: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer whose weights are given as by ``flat``, with the storages separated by commas."""
    result = cpu.run(x, batch_sizes, h0, c0, unflattened(weights, storages.split(","), clips))
    return result.output, result.h, result.c


@layer.register_fake
def _(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor | None],
    storages: str,
    clips: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], h0.shape[0] * h0.shape[2])), torch.empty_like(h0), torch.empty_like(c0)
