from collections.abc import Sequence

from torch import Tensor

def names() -> list[str]:
    """Return the instruction sets that this machine can run, fastest first."""

def round_blocks(count: int, rows: int, bits: int, work: int, factor: int, base: int, errors: int, rounded: int, /) -> None:
    """Round ``count`` blocks of ``rows`` rows with feedback, on contiguous memory at the given addresses."""

class Layer:
    """Packed weights of one layer of one or two directions.

    Args:
        isa: one of :func:`names`.
        directions: for each direction seven arrays, in the order of :func:`slimlstm.ops.weights.flat`.
        storages: for each direction the storage of ih, and of hh and hr; "int4" means int8 weights, packed in four bits
            where these hold them exactly.
        clips: for each direction the bounds of cells and of projections; infinity for no bound.
        gains: for each direction four row norms, for V and for U (or the dense matrix) of ih and then of hh.
    """

    def __init__(
        self,
        isa: str,
        directions: Sequence[Sequence[Tensor | None]],
        storages: Sequence[str],
        clips: Sequence[float],
        gains: Sequence[float],
        /,
    ) -> None: ...
    def bytes(self) -> int:
        """Return the bytes of all packed matrices, without the scales of rows."""

    def run(
        self,
        x: int,
        batch_sizes: int,
        steps: int,
        batch: int,
        rows: int,
        h0: int,
        c0: int,
        output: int,
        h: int,
        c: int,
        thoroughly: bool,
        threads: int,
        /,
    ) -> int:
        """Run the layer on contiguous memory at the given addresses; 0 for absent ``batch_sizes``, ``h0`` and ``c0``.

        Return 0, without running it, if ``thoroughly`` and the weights have changed since they were packed; 1; or 2 if the
        last hidden states are not finite, or inputs are rounded to int8 so coarsely that gates would move.
        """

class Cells:
    """The elementwise part of training steps, in one instruction set of :func:`names`.

    Both methods take addresses of contiguous memory, 0 where an optional one is absent, for [rows, hidden] and gates
    [rows, 4 hidden]. With ``is_half``, results of products and numbers for products are bfloat16; the rest is float32.
    """

    def __init__(self, isa: str, /) -> None: ...
    def forward(
        self,
        rows: int,
        hidden: int,
        is_half: bool,
        gates: int,
        recurrent: int,
        c_before: int,
        activations: int,
        c: int,
        h: int,
        h_half: int,
        /,
    ) -> None:
        """Write activations, c and h from the sum of ``gates`` and, unless absent, ``recurrent``."""
    def backward(
        self,
        rows: int,
        hidden: int,
        is_half: bool,
        activations: int,
        c_before: int,
        c: int,
        d_output: int,
        d_h: int,
        d_c: int,
        d_gates: int,
        /,
    ) -> None:
        """Write the gradients of the gates, and replace the gradient of c by the one of ``c_before``."""
    def forward_all(
        self,
        steps: int,
        batch: int,
        hidden: int,
        reverse: bool,
        from_zero: bool,
        factors: Sequence[tuple[int, int, int, int, int]],
        activations: int,
        c: int,
        h: int,
        /,
    ) -> None:
        """Run all steps of a direction with small matrices in float32.

        Each of the one or two factors is an address, the numbers of inputs and outputs, and the distances between two
        inputs and two outputs in floats.
        """
    def backward_all(
        self,
        steps: int,
        batch: int,
        hidden: int,
        reverse: bool,
        factors: Sequence[tuple[int, int, int, int, int]],
        activations: int,
        c: int,
        d_output: int,
        d_c: int,
        d_h0: int,
        d_gates: int,
        /,
    ) -> None:
        """Backpropagate through all steps; the factors multiply gradients of gates to gradients of h."""
