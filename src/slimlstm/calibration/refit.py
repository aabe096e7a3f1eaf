"""Fit factors again to the inputs that they see once the whole model is compressed.

Errors made in lower layers and at earlier steps change a matrix's inputs: z' instead of the uncompressed model's z.
Matrices whose products are added into the same gates form a group: for an LSTM, z = [x; h] and W = [W_ih W_hh]. The gates
should receive W z, and they receive W' z'. Each matrix is therefore replaced by the ridge regression of its share of W z on
its own part of z', with the group's other matrices fixed. The method then truncates this regression to the matrix's rank: a
reduced-rank regression (Izenman 1975) on the moments E[z' z'ᵀ] and E[z z'ᵀ].

Zhang et al. (2016) account for changed inputs in the same way in convolutional networks, one layer after another. A
recurrence has no such order, because its inputs depend on its own outputs; so all matrices are fitted at once, and the
passes are repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slimlstm.calibration.held_out import split_batches
from slimlstm.calibration.recorder import Keys, Rows
from slimlstm.errors import SlimLSTMError
from slimlstm.methods import MOMENT_DAMPING, damped, damping_of
from slimlstm.ops.weights import Matrix, rebuilt
from slimlstm.progress import Progress, shown

Solve = Callable[[Tensor, Tensor], Matrix]
"""Compresses a matrix B [m, n], given the moment A [n, n] of its inputs. Returns factors, or a rounded matrix [m, n]."""

_ALTERNATIONS = 2
"""How often the matrices of a group are fitted in turn on the moments of one pass."""


class FittingError(SlimLSTMError):
    """Factors cannot be fitted again."""


class CallMismatchError(FittingError):
    """The compressed model called its LSTMs more often, or less often, than the uncompressed one."""


@dataclass(frozen=True)
class Observation:
    """One batch as both models saw it.

    Attributes:
        number: the batch's position in the pass, counted from 0.
        dense: the rows of the uncompressed model, by the keys of each group of matrices.
        compressed: the rows of the compressed model; the same groups, and as many rows in each.
        costs: the compressed model's loss at every prediction, of any shape; None where the batch does not judge.
    """

    number: int
    dense: Mapping[Keys, Rows]
    compressed: Mapping[Keys, Rows]
    costs: Tensor | None = None


class Observer(Protocol):
    """Runs the uncompressed and a compressed model side by side over the same batches."""

    @property
    def batch_count(self) -> int:
        """The number of batches in one pass."""
        ...

    @property
    def has_costs(self) -> bool:
        """Whether observations carry costs, so that held-out batches can judge the factors."""
        ...

    def observe(self, weights: Mapping[str, Matrix], fitting: range, judging: range) -> Generator[Observation]:
        """Yield the observations of one pass, in the order of the batches; restore all state when closed.

        Args:
            weights: the compressed matrices by key, as factors or dense; all others stay uncompressed.
            fitting: the numbers of the batches whose rows are needed. Gradients in ``Observation.dense``, where given,
                mark the rows that count.
            judging: the numbers of the batches whose costs are needed. Batches in neither range may be skipped.
        """
        ...


def fit_to_new_inputs(
    observer: Observer,
    matrices: Mapping[str, Tensor],
    weights: Mapping[str, Matrix],
    solvers: Mapping[str, Solve],
    passes: int,
) -> tuple[int, dict[str, Matrix]]:
    """Fit compressed matrices again in every pass over the observer's batches; no model changes.

    Where the observer has costs, the last fifth of the batches only judges; fewer than five batches all fit and judge.

    Args:
        observer: runs both models on the batches.
        matrices: the uncompressed matrices [m, n] by key; at least every matrix in a group that the observer reports.
        weights: the compressed matrices by key, as factors or dense.
        solvers: the function that compresses each matrix that is to be fitted, by key.
        passes: how often to fit, at least once.

    Returns:
        The number of the pass with the lowest mean cost, 0 for the given weights, and all compressed matrices after this
        pass. Without costs, the last pass and its matrices.

    Raises:
        CallMismatchError: the number of calls of an LSTM depends on its weights, so that rows cannot be paired.
    """
    exact = {key: matrix.double() for key, matrix in matrices.items()}
    now, lowest, best = dict(weights), math.inf, (0, dict(weights))
    fitting, judging = split_batches(observer.batch_count, observer.has_costs)
    for number in range(passes + 1):
        is_last = number == passes
        if is_last and not observer.has_costs:
            return number, now
        with shown(f"fitting again, pass {number + 1} of {passes + 1}") as progress:
            moments, cost = _one_pass(observer, now, range(0) if is_last else fitting, judging, progress)
        if cost < lowest:
            lowest, best = cost, (number, now)
        if not is_last:
            now = _fitted(moments, exact, now, solvers)
    return best


def _one_pass(
    observer: Observer, weights: Mapping[str, Matrix], fitting: range, judging: range, progress: Progress
) -> tuple[dict[Keys, PairedMoments], float]:
    """Return the moments of every group over the fitting batches, and the mean cost of the judging batches."""
    found: dict[Keys, PairedMoments] = {}
    costs: list[Tensor] = []
    # Closed even when this loop raises, so that the observer restores the random state at once.
    with closing(observer.observe(weights, fitting, judging)) as observations:
        for seen in observations:
            if _row_counts(seen.dense) != _row_counts(seen.compressed):
                raise CallMismatchError("the number of steps that an LSTM takes depends on its weights")
            for keys, rows in seen.dense.items() if seen.number in fitting else ():
                if keys not in found:
                    found[keys] = PairedMoments([part.shape[1] for part in rows.inputs])
                found[keys].add(rows, seen.compressed[keys])
            if seen.costs is not None and seen.number in judging:
                costs.append(seen.costs.detach().double().flatten())
            # The judging batches end with the last batch. Asking the observer for its count may iterate over all batches.
            progress(f"batch {seen.number + 1}", (seen.number + 1) / max(judging.stop, 1))
    cost = float(torch.cat(costs).mean()) if costs else 0.0
    return {keys: moments for keys, moments in found.items() if moments.rows}, cost


def _row_counts(seen: Mapping[Keys, Rows]) -> dict[Keys, int]:
    return {keys: len(rows.inputs[0]) for keys, rows in seen.items()}


def _fitted(
    moments: Mapping[Keys, PairedMoments],
    matrices: Mapping[str, Tensor],
    weights: Mapping[str, Matrix],
    solvers: Mapping[str, Solve],
) -> dict[str, Matrix]:
    """Return ``weights`` with every matrix that has a solver fitted to the moments of its group."""
    after = dict(weights)
    for keys, paired in moments.items():
        for _ in range(_ALTERNATIONS):
            # hh first: it receives the errors of every earlier step.
            for index in reversed(range(len(keys))):
                if keys[index] in solvers:
                    current = [_dense(key, after, matrices) for key in keys]
                    fitted = paired.regression([matrices[key] for key in keys], current, index)
                    after[keys[index]] = solvers[keys[index]](*fitted)
    return after


def _dense(key: str, weights: Mapping[str, Matrix], matrices: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix [m, n] that the compressed model uses now, in float64."""
    return rebuilt(weights[key]).detach().double() if key in weights else matrices[key]


class PairedMoments:
    """Sums of z' z'ᵀ and z z'ᵀ [n, n] over N rows, with inputs z of the uncompressed and z' of the compressed model.

    Args:
        widths: the input sizes of the group's matrices, which sum to n; for an LSTM, (I, P).
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self.rows = 0
        size = sum(widths)
        self.own = self.cross = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        ends = [sum(widths[: index + 1]) for index in range(len(widths))]
        self.parts = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]

    def add(self, dense: Rows, compressed: Rows) -> None:
        """Add the rows of one batch, except rows that the uncompressed model's loss does not depend on."""
        z, own = torch.cat(dense.inputs, dim=1), torch.cat(compressed.inputs, dim=1)
        if z.dtype != torch.float64:
            z, own = z.float(), own.float()
        if dense.reached is not None:
            z, own = z[dense.reached], own[dense.reached]
        self.rows += len(z)
        self.own = self.own.to(z.device) + (own.T @ own).double()
        self.cross = self.cross.to(z.device) + (z.T @ own).double()

    def regression(self, dense: Sequence[Tensor], now: Sequence[Tensor], index: int) -> tuple[Tensor, Tensor]:
        """Return the best matrix B [m, n] at ``index`` in the group, and the damped moment A [n, n] of its inputs.

        B minimises E‖W z - W'_other z'_other - B z'_own‖² + λ ‖B - W_own‖². With N rows for n inputs,
        λ = (``MOMENT_DAMPING`` + n / N) times the mean of A's diagonal, so that B stays near W where the rows are too few.

        Args:
            dense: the group's uncompressed matrices.
            now: the group's matrices as the compressed model uses them.
            index: the position of the matrix to fit.
        """
        own = self.parts[index]
        moment = self.own[own, own] / self.rows
        wanted = torch.cat(list(dense), dim=1) @ self.cross[:, own]
        for other, part in enumerate(self.parts):
            if other != index:
                wanted = wanted - now[other] @ self.own[part, own]
        wanted = wanted / self.rows
        share = MOMENT_DAMPING + len(moment) / self.rows
        strength, damped_moment = damping_of(moment, share), damped(moment, share)
        return torch.linalg.solve(damped_moment, (wanted + strength * dense[index]).T).T, damped_moment
