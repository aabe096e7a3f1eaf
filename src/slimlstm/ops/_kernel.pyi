from collections.abc import Sequence

from torch import Tensor

def names() -> list[str]:
    """Return the instruction sets that this machine can run, fastest first."""

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
        last hidden states are not finite.
        """
