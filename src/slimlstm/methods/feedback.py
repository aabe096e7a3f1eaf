"""Round weights column by column, and correct later columns for the errors of earlier ones.

Source: GPTQ (Frantar et al. 2022, arXiv 2210.17323). The loss of an error Δ [m, n] is tr(Δ H Δᵀ), where H is the second
moment of the matrix's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods.low_bit import GROUP, group_scales, grouped, nearest, row_scales, spread

DAMPING = 0.01
"""Damping of the moments, as a fraction of their mean diagonal."""


def round_columns(weight: Tensor, moment: Tensor, bits: int, factor: Tensor | None = None) -> Tensor:
    """Return a weight [m, n] on the grid of ``bits`` bits, rounded with feedback.

    Args:
        weight: float32 [m, n]; every group of a row has its own scale.
        moment: H [n, n], or [n] for a diagonal one.
        bits: bits of a code.
        factor: :func:`inverse_factor` of the moment, if it is known already.

    Examples:
        >>> weight = torch.tensor([[0.30, 0.10, -0.20]])
        >>> rounded = round_columns(weight, torch.eye(3), bits=4)
        >>> bool((rounded - weight).abs().max() < 0.03)
        True
    """
    return _round(weight, inverse_factor(moment) if factor is None else factor, bits, by_row=False)


def round_rows(weight: Tensor, moment: Tensor, bits: int, factor: Tensor | None = None) -> Tensor:
    """Return a weight [m, n] on the grid of ``bits`` bits, rounded row by row with feedback to later rows.

    The loss of an error Δ is tr(Δᵀ H Δ), where H [m, m] is the second moment of the gradients at the matrix's outputs.
    """
    return _round(weight.T, inverse_factor(moment) if factor is None else factor, bits, by_row=True).T.contiguous()


def _round(weight: Tensor, factor: Tensor, bits: int, *, by_row: bool) -> Tensor:
    """Round the columns of ``weight`` [m, n] in turn; ``by_row`` says that groups lie along its columns, not its rows."""
    work = weight.double().clone()
    result = torch.empty_like(work)
    base = None if by_row else row_scales(weight.float(), bits)
    for start in range(0, weight.shape[1], GROUP):
        stop = min(start + GROUP, weight.shape[1])
        scale = _block_scales(work[:, start:stop].float(), bits, base)
        errors = torch.empty_like(work[:, start:stop])
        for index in range(start, stop):
            column = work[:, index]
            result[:, index] = nearest(column.float(), scale[:, index - start], bits)
            errors[:, index - start] = (column - result[:, index]) / factor[index, index]
            # Correct the rest of the block now, and the columns behind it once for the whole block.
            work[:, index + 1 : stop] -= errors[:, index - start, None] * factor[index, index + 1 : stop]
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return result.to(weight.dtype)


def _block_scales(block: Tensor, bits: int, base: Tensor | None) -> Tensor:
    """Return the scale of every weight in a block [m, k] of columns.

    Args:
        block: the columns.
        bits: bits of a code.
        base: the scales of the rows [m]; None where groups lie along the columns.
    """
    if base is None:
        rows = block.T.contiguous()
        return spread(group_scales(grouped(rows), bits, row_scales(rows, bits)[:, None]), rows.shape[1]).T
    return group_scales(block, bits, base)[:, None].expand_as(block)


def inverse_factor(moment: Tensor) -> Tensor:
    """Return the upper Cholesky factor [n, n] of the inverse of the damped moment.

    Raises:
        SlimLSTMError: the moment is not finite.
    """
    full = torch.diag(moment) if moment.ndim == 1 else moment
    full = full.double()
    if not bool(torch.isfinite(full).all()):
        raise SlimLSTMError("the moments hold NaN or infinite numbers; were the batches finite?")
    damping = DAMPING * float(full.diagonal().mean()) or 1.0
    damped = full + damping * torch.eye(len(full), dtype=torch.float64, device=full.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
