"""The table of methods. A new method is one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods.factors import Factors, OnIteration
from slimlstm.methods.magnitude import magnitude_mask
from slimlstm.methods.matrices import singular_values
from slimlstm.methods.semi_nmf import semi_nmf
from slimlstm.methods.svd import svd
from slimlstm.methods.weighted import WeightedSVD

DENSE = "dense"
"""The name that plans give to a matrix that stays whole."""


class Needs(IntEnum):
    """Statistics that a method needs beside the matrix; each value includes the ones before it."""

    NOTHING = 0
    INPUTS = 1
    """The second moment of the matrix's inputs: calibration on batches."""
    GRADIENTS = 2
    """The second moment of the gradients at its outputs too: calibration on batches with a loss."""


@dataclass(frozen=True)
class MatrixProblem:
    """One matrix to compress.

    Attributes:
        matrix: W [m, n].
        inputs: A, the second moment of the inputs of W, [n, n]; None for methods that need no moments.
        gradients: G, the second moment of the gradients at the outputs of W, [m, m]; None for methods that do not need it.
    """

    matrix: Tensor
    inputs: Tensor | None = None
    gradients: Tensor | None = None

    @cached_property
    def weighted(self) -> WeightedSVD:
        """The decomposition that serves every rank in the metric of the moments, computed once."""
        inputs = self.inputs
        if inputs is None:
            inputs = torch.ones(self.matrix.shape[1], dtype=torch.float64, device=self.matrix.device)
        return WeightedSVD(self.matrix, inputs, self.gradients)


@dataclass(frozen=True)
class Method:
    """How one matrix is compressed.

    Attributes:
        solve: takes a problem, an amount and a callback for iterations (or None). Returns the factors of rank r, where the
            amount is a rank; or a boolean mask [m, n] of the weights that stay, where it is a number of nonzeros.
        needs: which moments the problem has to hold.
        spectrum: takes a problem; returns [k], the loss of leaving out each direction, largest first, in one unit for all
            matrices. None where the method has no such spectrum, so that ranks cannot be chosen by energy or globally.
        makes_mask: whether the amount is a number of nonzeros.

    Examples:
        A method that zeroes all but the first columns is one row::

            def leading_columns(problem, rank, on_iteration=None):
                v = torch.eye(rank, problem.matrix.shape[1], dtype=problem.matrix.dtype)
                return as_factors(problem.matrix, problem.matrix[:, :rank].clone(), v)

            slimlstm.register_method("leading-columns", Method(leading_columns))
    """

    solve: Callable[[MatrixProblem, int, OnIteration | None], Factors | Tensor]
    needs: Needs = Needs.NOTHING
    spectrum: Callable[[MatrixProblem], Tensor] | None = None
    makes_mask: bool = False


def _svd(problem: MatrixProblem, rank: int, _on_iteration: OnIteration | None) -> Factors:
    return svd(problem.matrix, rank)


def _squared_singular_values(problem: MatrixProblem) -> Tensor:
    return singular_values(problem.matrix).square()


def _semi_nmf(problem: MatrixProblem, rank: int, on_iteration: OnIteration | None) -> Factors:
    return semi_nmf(problem.matrix, rank, on_iteration)


def _weighted(problem: MatrixProblem, rank: int, _on_iteration: OnIteration | None) -> Factors:
    return problem.weighted.factors(rank)


def _weighted_losses(problem: MatrixProblem) -> Tensor:
    return problem.weighted.losses


def _magnitude(problem: MatrixProblem, nonzeros: int, _on_iteration: OnIteration | None) -> Tensor:
    return magnitude_mask(problem.matrix, nonzeros)


METHODS: dict[str, Method] = {
    "svd": Method(_svd, spectrum=_squared_singular_values),
    "semi-nmf": Method(_semi_nmf),
    "activation": Method(_weighted, Needs.INPUTS, _weighted_losses),
    "fisher": Method(_weighted, Needs.GRADIENTS, _weighted_losses),
    "prune": Method(_magnitude, makes_mask=True),
}
"""Every method by the name that plans, configurations and the command use; add a row by :func:`register_method`."""


def register_method(name: str, method: Method) -> None:
    """Add a row to the table of methods, for configurations, plans, the command and the recipes.

    Raises:
        SlimLSTMError: the name is taken, or is no non-empty string.

    Examples:
        >>> register_method("svd", METHODS["svd"])
        Traceback (most recent call last):
        slimlstm.errors.SlimLSTMError: a method called 'svd' exists already; choose another name
    """
    if type(name) is not str or not name:
        raise SlimLSTMError(f"a method's name is a non-empty string, not {name!r}")
    if name in (*METHODS, DENSE):
        raise SlimLSTMError(f"a method called {name!r} exists already; choose another name")
    METHODS[name] = method


def method_called(name: object) -> Method:
    """Return the row of a method.

    Raises:
        SlimLSTMError: no method has that name.

    Examples:
        >>> method_called("svd").needs.name
        'NOTHING'
    """
    found = METHODS.get(name) if isinstance(name, str) else None
    if found is None:
        raise SlimLSTMError(f"no method is called {name!r}; the methods are {', '.join(map(repr, METHODS))}")
    return found


def factoring_methods() -> list[str]:
    """Return the names of all methods that return factors of a rank."""
    return [name for name, method in METHODS.items() if not method.makes_mask]


def calibrated_methods() -> list[str]:
    """Return the names of all methods that need moments."""
    return [name for name, method in METHODS.items() if method.needs > Needs.NOTHING]
