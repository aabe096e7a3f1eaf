"""Carry out the plan of one matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from slimlstm.methods import (
    DENSE,
    METHODS,
    Factors,
    MatrixProblem,
    Replacement,
    Rounder,
    check_matrix,
    relative_error,
    sha256_of,
)
from slimlstm.ops.weights import Matrix, rebuilt
from slimlstm.pipeline.site_plan import SitePlan


def compress_matrix(
    weight: Matrix,
    plan: SitePlan,
    problem: Callable[[], MatrixProblem] | None = None,
    on_fraction: Callable[[float], None] | None = None,
    rounder: Rounder | None = None,
) -> Replacement | None:
    """Carry out one site's plan.

    Args:
        weight: the matrix [m, n], or its factors; they do not change.
        plan: method, amount and storage.
        problem: the matrix with the moments that the method needs; None for methods that need nothing.
        on_fraction: called with the fraction done, where the solver is iterative.
        rounder: rounds in the metric of the matrix's moments; None rounds to nearest.

    Returns:
        The replacement, or None where the plan leaves the matrix as it is.

    Raises:
        SlimLSTMError: the matrix is empty or not finite, the rank does not fit, or a matrix to be rounded is not float32.

    Examples:
        >>> import torch
        >>> compress_matrix(torch.eye(4), SitePlan("svd", rank=2)).rank
        2
    """
    if plan.method == DENSE and plan.storage is None:
        return None
    matrix = rebuilt(weight)
    check_matrix(matrix)
    source = sha256_of(matrix)
    if plan.method == DENSE:
        exact = weight if isinstance(weight, Tensor) else weight[0].double() @ weight[1].double()
        return _stored(Replacement(weight, DENSE, source), exact, plan.storage, rounder)

    def on_iteration(done: int, most: int) -> None:
        if on_fraction is not None:
            on_fraction(done / most)

    method = METHODS[plan.method]
    amount = plan.nonzeros if method.makes_mask else plan.rank
    found = method.solve(MatrixProblem(matrix) if problem is None else problem(), amount or 0, on_iteration)
    if isinstance(found, Factors):
        result = Replacement(
            (found.u, found.v),
            plan.method,
            source,
            relative_error=found.residual,
            iterations=found.iterations,
            converged=found.converged,
            losses=found.losses,
        )
        return _stored(result, matrix, plan.storage, rounder)
    masked = matrix * found
    dense = None if plan.storage is None else masked
    result = Replacement(dense, plan.method, source, mask=found, relative_error=relative_error(matrix, masked))
    return _stored(result, matrix, plan.storage, None)


def _stored(result: Replacement, matrix: Tensor, storage: str | None, rounder: Rounder | None) -> Replacement:
    """Return the replacement rounded to a storage; its relative error then includes the rounding."""
    if storage is None or result.weight is None:
        return result
    rounder = rounder or Rounder()
    if isinstance(result.weight, Tensor):
        weight: Matrix = rounder.matrix(result.weight, storage).clone()
        after = weight
    else:
        u, v = rounder.factors(*result.weight, matrix, storage)
        weight, after = (u, v), u.double() @ v.double()
    return dataclasses.replace(result, weight=weight, storage=storage, relative_error=relative_error(matrix, after))
