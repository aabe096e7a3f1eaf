"""Call the compiled CPU kernel once, for the recurrence of a layer in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.ops import dense, reference
from slimlstm.ops.packing import PackedLayer, packed_layer
from slimlstm.ops.weights import CachedLayer, Direction, LayerOutput, first_states, is_clipped

_IN_DOUBT = 2
"""Status of a kernel call whose last hidden states are not finite, or whose inputs differ so much in size that fifteen bits
do not hold them. Where inputs are rounded to int8, infinite inputs cause the first, although an LSTM with infinite inputs
may saturate and stay finite."""


def run(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, directions: Sequence[Direction]
) -> LayerOutput:
    """Run a layer over x [T, B, I], or over packed x [N, I] with ``batch_sizes`` [T]; h0 [D, B, P], c0 [D, B, H] or zeros.

    Gradients are not recorded. The caller has checked :func:`slimlstm.ops.fused.obstacle`.

    Raises:
        SlimLSTMError: the input or the states do not fit the layer.
    """
    packed = packed_layer(directions)
    inputs, outputs, hidden, number = packed.sizes
    # new_empty with one size for each dimension is the fastest of PyTorch's allocators.
    new = x.new_empty
    if batch_sizes is None:
        steps, batch, width = x.shape
        count, sizes_at = steps * batch, 0
        output = new(steps, batch, number * outputs)
    else:
        batch_sizes = batch_sizes.to("cpu", torch.int64).contiguous()
        (count, width), steps, sizes_at = x.shape, batch_sizes.shape[0], batch_sizes.data_ptr()
        batch = h0.shape[1] if h0 is not None else int(batch_sizes[0]) if steps else 0
        output = new(count, number * outputs)
    x, h0_at, c0_at = _as_stored(x), 0, 0
    fits = width == inputs
    if h0 is not None and c0 is not None:
        fits = fits and h0.shape == (number, batch, outputs) and c0.shape == (number, batch, hidden)
        h0, c0 = _as_stored(h0), _as_stored(c0)
        h0_at, c0_at = h0.data_ptr(), c0.data_ptr()
    if not fits:
        raise _misfit(x, h0, c0, packed)
    if count == 0:
        h0, c0 = first_states(x, batch_sizes, h0, c0, directions)
        return LayerOutput(output, h0.clone(), c0.clone())
    h, c = new(number, batch, outputs), new(number, batch, hidden)
    call = x.data_ptr(), sizes_at, steps, batch, count, h0_at, c0_at, output.data_ptr(), h.data_ptr(), c.data_ptr()
    cached = directions if type(directions) is CachedLayer else None
    exposures = 0 if cached is None else cached.exposures
    thoroughly = cached is None or exposures != cached.checked or not packed.counted
    while not (state := packed.layer.run(*call, thoroughly, torch.get_num_threads())):
        packed = packed_layer(directions, anew=True)
    if cached is not None:
        cached.checked = exposures
    if state == _IN_DOUBT and packed.rounds_inputs:
        again = reference.layer if is_clipped(directions) else dense.layer
        with torch.no_grad():
            return again(x, batch_sizes, *first_states(x, batch_sizes, h0, c0, directions), directions)
    return LayerOutput(output, h, c)


def _as_stored(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds its numbers, row by row; the memory of a negated view does not."""
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()


def _misfit(x: Tensor, h0: Tensor | None, c0: Tensor | None, packed: PackedLayer) -> SlimLSTMError:
    inputs, outputs, hidden, number = packed.sizes
    shapes = [None if state is None else list(state.shape) for state in (h0, c0)]
    return SlimLSTMError(
        f"the input {list(x.shape)} and the states {shapes[0]} and {shapes[1]} do not fit a layer of {inputs} inputs, "
        f"{hidden} hidden units, {outputs} outputs and {number} directions; give x [T, B, I], h0 [D, B, P] and c0 [D, B, H]"
    )
