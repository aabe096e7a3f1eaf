"""Compress one matrix: the tables of methods and storages, and the cost of a rank.

This package knows tensors only; rounding with feedback runs compiled where :mod:`slimlstm.ops` has the kernel.
"""

from slimlstm.methods.choices import Option, choose_options, efficient
from slimlstm.methods.factors import Factors, OnIteration, as_factors
from slimlstm.methods.magnitude import magnitude_mask, nonzeros_at_rank
from slimlstm.methods.matrices import (
    check_matrix,
    check_rank,
    damped,
    damping_of,
    relative_error,
    sha256_of,
    singular_values,
)
from slimlstm.methods.method import (
    DENSE,
    METHODS,
    MatrixProblem,
    Method,
    Needs,
    calibrated_methods,
    factoring_methods,
    method_called,
    register_method,
)
from slimlstm.methods.rank import (
    RankCosts,
    allocate,
    break_even_rank,
    is_smaller,
    losses_of_ranks,
    rank_for_energy,
    rank_for_fraction,
    rank_for_share,
    shares_left_out,
)
from slimlstm.methods.replacement import Replacement
from slimlstm.methods.rounding import Rounder
from slimlstm.methods.semi_nmf import semi_nmf
from slimlstm.methods.storages import (
    KERNEL_FORMATS,
    STORAGES,
    Encoded,
    Storage,
    matrix_bytes,
    register_storage,
    rounded,
    storage_called,
    stored_bytes,
)
from slimlstm.methods.svd import svd
from slimlstm.methods.weighted import MOMENT_DAMPING, WeightedSVD

__all__ = [
    "DENSE",
    "KERNEL_FORMATS",
    "METHODS",
    "MOMENT_DAMPING",
    "STORAGES",
    "Encoded",
    "Factors",
    "MatrixProblem",
    "Method",
    "Needs",
    "OnIteration",
    "Option",
    "RankCosts",
    "Replacement",
    "Rounder",
    "Storage",
    "WeightedSVD",
    "allocate",
    "as_factors",
    "break_even_rank",
    "calibrated_methods",
    "check_matrix",
    "check_rank",
    "choose_options",
    "damped",
    "damping_of",
    "efficient",
    "factoring_methods",
    "is_smaller",
    "losses_of_ranks",
    "magnitude_mask",
    "matrix_bytes",
    "method_called",
    "nonzeros_at_rank",
    "rank_for_energy",
    "rank_for_fraction",
    "rank_for_share",
    "register_method",
    "register_storage",
    "relative_error",
    "rounded",
    "semi_nmf",
    "sha256_of",
    "shares_left_out",
    "singular_values",
    "storage_called",
    "stored_bytes",
    "svd",
]
