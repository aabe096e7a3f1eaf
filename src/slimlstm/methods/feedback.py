"""Round weights one by one, and correct later weights for the errors of earlier ones.

The loss of an error Δ [m, n] is tr(Δᵀ G Δ A), where A [n, n] is the second moment of the matrix's inputs, and G [m, m] the
second moment of the gradients at its outputs. The columns of a row are rounded in turn, and the rest of the row is
corrected in the metric A (GPTQ; Frantar et al. 2022, arXiv 2210.17323). Then the rows below are corrected for the error of
the whole row in the metric G, as in YAQA (Tseng et al. 2025, arXiv 2505.22988).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimlstm.errors import SlimLSTMError
from slimlstm.methods.low_bit import GROUP, group_scales, nearest, row_scales
from slimlstm.methods.matrices import damped
from slimlstm.ops import native

ROUNDING_DAMPING = 0.01
"""Damping of the moments, as a fraction of their mean diagonal."""
_CHUNKS = 128
"""Largest number of chunks of rows. Chunks are rounded in turn; the rows of a chunk do not correct each other."""


def round_with_feedback(weight: Tensor, across: Tensor, down: Tensor | None, bits: int) -> Tensor:
    """Return a weight [m, n] on the grid of ``bits`` bits, rounded with feedback.

    Args:
        weight: float32 [m, n]; every group of a row has its own scale.
        across: :func:`inverse_factor` [n, n] of the moment of the inputs.
        down: :func:`inverse_factor` [m, m] of the moment of the gradients; None for the identity, with which rows do not
            correct each other.
        bits: bits of a code.

    Examples:
        >>> weight, factor = torch.tensor([[0.30, 0.10, -0.20]]), inverse_factor(torch.eye(3))
        >>> bool((round_with_feedback(weight, factor, None, bits=4) - weight).abs().max() < 0.03)
        True
    """
    return _Rounding(weight, across, down, bits).run()


class _Rounding:
    """One weight as chunks of rows [k, rows, n], and the blocks of columns that share scales.

    Every step rounds one block of every chunk. A chunk is one block behind the chunk above it, whose errors it needs.
    """

    def __init__(self, weight: Tensor, across: Tensor, down: Tensor | None, bits: int) -> None:
        m, n = weight.shape
        self.shape, self.bits, self.dtype = (m, n), bits, weight.dtype
        self.rows = m if down is None else -(-m // _CHUNKS)
        self.chunks, self.blocks = -(-m // self.rows), -(-n // GROUP)
        missing = self.chunks * self.rows - m, self.blocks * GROUP - n
        padded = pad(weight.double(), (0, missing[1], 0, missing[0]))
        self.base = row_scales(padded.float(), bits).view(self.chunks, self.rows)
        # [chunk, block, row, column]: the weights as corrected by the rows above, and corrections by earlier columns.
        self.wanted = padded.view(self.chunks, self.rows, self.blocks, GROUP).transpose(1, 2).contiguous()
        self.corrections, self.result = torch.zeros_like(self.wanted), torch.zeros_like(self.wanted)
        self.across, self.down = _padded(across, missing[1]), None if down is None else _padded(down, missing[0])
        self.diagonal = torch.stack([self.across[own, own] for own in map(self._columns, range(self.blocks))])

    def run(self) -> Tensor:
        for step in range(self.chunks + self.blocks - 1):
            first = max(0, step - self.blocks + 1)
            chunks = torch.arange(first, min(step + 1, self.chunks), device=self.wanted.device)
            errors = self._round(chunks, step - chunks)
            for index, chunk in enumerate(chunks.tolist()):
                self._correct(chunk, step - chunk, errors[index])
        m, n = self.shape
        return self.result.transpose(1, 2).reshape(self.chunks * self.rows, -1)[:m, :n].to(self.dtype)

    def _round(self, chunks: Tensor, blocks: Tensor) -> Tensor:
        """Round one block of each of these chunks; return the errors [k, rows, GROUP], divided by the factor's diagonal."""
        work = self.wanted[chunks, blocks] + self.corrections[chunks, blocks]
        rounding = round_blocks_compiled if work.is_cpu and not native.missing else round_blocks
        errors, self.result[chunks, blocks] = rounding(work, self.diagonal[blocks], self.base[chunks], self.bits)
        return errors

    def _correct(self, chunk: int, block: int, errors: Tensor) -> None:
        """Correct the blocks to the right of a rounded block, and the chunks below it."""
        if block + 1 < self.blocks:
            later = errors @ self.across[self._columns(block), GROUP * (block + 1) :]
            self.corrections[chunk, block + 1 :] -= later.unflatten(1, (-1, GROUP)).transpose(0, 1)
        if self.down is not None and chunk + 1 < self.chunks:
            own, below = slice(chunk * self.rows, (chunk + 1) * self.rows), slice((chunk + 1) * self.rows, None)
            error = self.wanted[chunk, block] - self.result[chunk, block]
            solved = torch.linalg.solve_triangular(self.down[own, own], error, upper=True)
            self.wanted[chunk + 1 :, block] -= (self.down[own, below].T @ solved).unflatten(0, (-1, self.rows))

    @staticmethod
    def _columns(block: int) -> slice:
        return slice(GROUP * block, GROUP * (block + 1))


def round_blocks(work: Tensor, factor: Tensor, base: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round blocks of weights, and correct later columns of a row for the errors of earlier ones.

    Args:
        work: weights, float64 [k, rows, GROUP]; overwritten.
        factor: the part of :func:`inverse_factor` for the columns of each block, float64 [k, GROUP, GROUP].
        base: :func:`row_scales`, float32 [k, rows].
        bits: bits of a code.

    Returns:
        Errors divided by the factor's diagonal, and weights on the grid, both float64 [k, rows, GROUP].
    """
    scale = group_scales(work.float(), bits, base)
    errors, rounded = torch.empty_like(work), torch.empty_like(work)
    for index in range(GROUP):
        column = work[..., index]
        rounded[..., index] = nearest(column.float(), scale, bits)
        error = torch.sub(column, rounded[..., index], out=errors[..., index]).div_(factor[:, None, index, index])
        work[..., index + 1 :] -= error[..., None] * factor[:, None, index, index + 1 :]
    return errors, rounded


def round_blocks_compiled(work: Tensor, factor: Tensor, base: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Do what :func:`round_blocks` does on the CPU, compiled: the order of its sums differs."""
    from slimlstm.ops import _kernel  # pyright: ignore[reportMissingModuleSource]  # absent without a compiler

    work, factor, base = work.contiguous(), factor.contiguous(), base.contiguous()
    errors, rounded = torch.empty_like(work), torch.empty_like(work)
    addresses = (tensor.data_ptr() for tensor in (work, factor, base, errors, rounded))
    _kernel.round_blocks(work.shape[0], work.shape[1], bits, *addresses)
    return errors, rounded


def _padded(factor: Tensor, missing: int) -> Tensor:
    """Return a factor with ones for ``missing`` more rows and columns."""
    return torch.block_diag(factor, torch.eye(missing, dtype=factor.dtype, device=factor.device)) if missing else factor


def inverse_factor(moment: Tensor) -> Tensor:
    """Return the upper Cholesky factor [n, n] of the inverse of a damped moment, [n, n] or the diagonal [n].

    Raises:
        SlimLSTMError: the moment is not finite.
    """
    full = torch.diag(moment) if moment.ndim == 1 else moment
    full = full.double()
    if not bool(torch.isfinite(full).all()):
        raise SlimLSTMError("the moments hold NaN or infinite numbers; were the batches finite?")
    lower = torch.linalg.cholesky(damped(full, ROUNDING_DAMPING))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
