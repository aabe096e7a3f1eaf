"""The compressed form of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Replacement:
    """The compressed form of one matrix W [m, n].

    Attributes:
        weight: the matrix W' [m, n], or its factors (U [m, r], V [r, n]). None where a mask is set and nothing was rounded:
            the weights then stay as they are under the mask.
        mask: a boolean mask [m, n] of the weights that stay, or None.
        storage: a key of :data:`slimlstm.methods.STORAGES` that ``weight`` is rounded to; None for the matrix's own dtype.
        method: the method that made it, or ``"dense"``.
        source_sha256: the SHA-256 of W (:func:`slimlstm.methods.sha256_of`).
        relative_error: ‖W - W'‖_F / ‖W‖_F, rounding included.
        iterations, converged: the iterations of an iterative solver, and whether it converged; 0 and True for a direct one.
        losses: [k], the loss of leaving out each direction, largest first; None where the method does not rank them.
    """

    weight: Tensor | tuple[Tensor, Tensor] | None
    method: str
    source_sha256: str
    mask: Tensor | None = None
    storage: str | None = None
    relative_error: float = 0.0
    iterations: int = 0
    converged: bool = True
    losses: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(U, V), or None for a dense replacement."""
        return self.weight if isinstance(self.weight, tuple) else None

    @property
    def dense(self) -> Tensor | None:
        """The rounded matrix [m, n], or None for factors and for weights that stay as they are."""
        return self.weight if isinstance(self.weight, Tensor) else None

    @property
    def rank(self) -> int | None:
        """The rank r of the factors, or None for a dense replacement."""
        return None if self.factors is None else self.factors[0].shape[1]

    def effective(self, matrix: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Return the weight that the model uses from now on in place of ``matrix``."""
        if self.weight is not None:
            return self.weight
        return matrix * self.mask if self.mask is not None and isinstance(matrix, Tensor) else matrix
