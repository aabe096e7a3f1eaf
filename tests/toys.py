"""A method and a storage from outside the library, one row each; the recipes load this file as a plugin."""

import torch

from slimlstm.methods import Encoded, Method, Storage, as_factors, register_method, register_storage

METHOD, STORAGE = "leading-columns", "float16"


def leading_columns(problem, rank, _on_iteration):
    """Zero all but the first columns: W ≈ W[:, :r] [I 0]."""
    v = torch.eye(rank, problem.matrix.shape[1], dtype=problem.matrix.dtype)
    return as_factors(problem.matrix, problem.matrix[:, :rank].clone(), v)


register_method(METHOD, Method(leading_columns))
register_storage(STORAGE, Storage(lambda weight: Encoded(weight.half()), torch.float16))
