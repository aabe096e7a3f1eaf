"""Find recurrent matrices among named tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from slimlstm.modules.sites import SITE_NAME, Site
from slimlstm.ops.weights import Matrix, rebuilt

_PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.(weight_[^.]*)\.original")


def find_matrices(tensors: Mapping[str, Tensor]) -> dict[Site, tuple[str, ...]]:
    """Return the recurrent matrices among named tensors, each with the names of the tensors that hold it.

    A dense matrix is held by one tensor, factors by two, and a masked matrix by its own tensor and its mask. Matrices of a
    GRU or a plain RNN, recognised by their shapes, are left out.
    """
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for name in tensors:
        for canonical, stored_in in _as_matrix(name, tensors):
            module, _, weight = canonical.rpartition(".")
            # A weight-drop LSTM may hold the raw weight and a dropped copy of it.
            if SITE_NAME.fullmatch(weight) and ((module, weight) not in found or name.endswith("_raw")):
                found[module, weight] = stored_in
    return {
        Site(
            module, weight, shape_of_stored(stored_in, tensors), _rank(stored_in, tensors), _nonzeros(stored_in, tensors)
        ): stored_in
        for (module, weight), stored_in in found.items()
        if _is_lstm(module, weight, found, tensors)
    }


def matrix_of(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix [m, n] in the named tensors: a matrix, a matrix and its mask, or two factors."""
    return rebuilt(stored_matrix(names, tensors))


def stored_matrix(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Matrix:
    """Return the matrix [m, n], with its mask applied, or its factors (U, V)."""
    first, last = tensors[names[0]], tensors[names[-1]]
    if len(names) == 1:
        return first
    return first * last if last.dtype == torch.bool else (first, last)


def _as_matrix(name: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the canonical name of the matrix that a tensor holds alone or first, and the names of all its tensors."""
    match = _PARAMETRIZED.fullmatch(name)
    if match:
        mask = f"{name.removesuffix('original')}0.mask"
        yield ".".join(part for part in match.groups() if part), (name, mask) if mask in tensors else (name,)
    elif name.endswith("_u") and f"{name[:-2]}_v" in tensors:
        yield name[:-2], (name, f"{name[:-2]}_v")
    else:
        module, _, weight = name.removesuffix("_raw").rpartition(".")
        inner = f"{module}.module.{weight}" if module else f"module.{weight}"
        # A weight-drop wrapper may hold the raw weight itself, and call its LSTM "module".
        is_wrapper = name.endswith("_raw") and inner.replace("weight_hh", "weight_ih") in tensors
        yield inner if is_wrapper else name.removesuffix("_raw"), (name,)


def shape_of_stored(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (m, n) of a matrix or of the product of its factors; (0, 0) for tensors that are no matrices."""
    first, last = tensors[names[0]].shape, tensors[names[-1]].shape
    return (first[0], last[1]) if len(first) == 2 and len(last) == 2 else (0, 0)


def _rank(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> int | None:
    return tensors[names[0]].shape[1] if len(names) == 2 and tensors[names[1]].dtype != torch.bool else None


def _nonzeros(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> int | None:
    return int(tensors[names[1]].sum()) if len(names) == 2 and tensors[names[1]].dtype == torch.bool else None


def _is_lstm(
    module: str, weight: str, found: Mapping[tuple[str, str], tuple[str, ...]], tensors: Mapping[str, Tensor]
) -> bool:
    """Return whether ih and hh of this layer exist with 4H rows, where H is the width of hh or of its projection."""
    suffix = weight[len("weight_ih") :]
    ih, hh = found.get((module, f"weight_ih{suffix}")), found.get((module, f"weight_hh{suffix}"))
    if ih is None or hh is None:
        return False
    (rows, inputs), (hh_rows, outputs) = shape_of_stored(ih, tensors), shape_of_stored(hh, tensors)
    projection = tensors.get(f"{module}.weight_hr{suffix}" if module else f"weight_hr{suffix}")
    hidden = outputs if projection is None else projection.shape[-1]
    return inputs > 0 and rows == hh_rows == 4 * hidden
