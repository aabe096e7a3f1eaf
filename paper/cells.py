"""Cells of the paper's tables: a model compressed by one method, at one target and rank, and cells of the same bytes."""

from __future__ import annotations

from torch import Tensor, nn

import slimlstm as sl
from paper.methods import TOGETHER, is_calibrated
from slimlstm.calibration.moments import Calibration
from slimlstm.evaluate import NextTokens, pieces
from slimlstm.pipeline.config import AUTO, Target, configuration
from slimlstm.progress import Progress

CALIBRATION_TOKENS = 60_000
"""Tokens of training text to calibrate on."""
CALIBRATION_STREAMS, CALIBRATION_STEPS = 60, 70


def calibration_batches(tokens: Tensor) -> list[tuple[int, Tensor]]:
    """Return the batches that calibrate on training text, token ids [N]."""
    return pieces(tokens, streams=CALIBRATION_STREAMS, steps=CALIBRATION_STEPS)


def factor_bytes(model: nn.Module, target: Target, rank: int) -> int:
    """Return the bytes of float32 factors of one rank; a matrix whose factors would be no smaller stays dense.

    Examples:
        >>> factor_bytes(nn.LSTM(8, 16), "hh", 2)
        640
    """
    shapes = [site.shape for site in sl.find_sites(model) if target in (site.target, "both")]
    return sum(4 * min(rank * (m + n), m * n) for m, n in shapes)


def compress_cell_(
    model: nn.Module,
    method: str,
    target: Target,
    rank: int,
    *,
    calibration: Calibration | None = None,
    tokens: Tensor | None = None,
    progress: Progress | None = None,
) -> sl.Report:
    """Compress the model of one cell in place.

    Args:
        model: a language model that was not compressed before.
        method: a registered method, or :data:`paper.methods.TOGETHER`, which gets the bytes of float32 factors of the rank.
        target, rank: of the cell.
        calibration: for methods that need it.
        tokens: training text for the same methods, token ids [N]; with it, factors are fitted again, and plans compared.
        progress: see :func:`slimlstm.compress_`.

    Examples:
        >>> report = compress_cell_(nn.Sequential(nn.LSTM(8, 16)), "svd", "hh", 2)
        >>> report.sites[0].rank
        2
    """
    if method == TOGETHER:
        size = factor_bytes(model, target, rank)
        rule = configuration("fisher", bytes=size, storage=AUTO, target=target)
    else:
        rule = configuration(method, rank=rank, target=target)
    if not is_calibrated(method) or tokens is None:
        return sl.compress_(model, rule, calibration=calibration, progress=progress)
    batches = calibration_batches(tokens)
    return sl.compress_(model, rule, calibration=calibration, batches=batches, loss=NextTokens(), progress=progress)
