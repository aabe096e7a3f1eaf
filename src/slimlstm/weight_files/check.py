"""Check that every tensor with the name of a recurrent weight is understood, and that the tensors of a layer fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.files import check_memory
from slimlstm.modules.sites import SITE_NAME, Site
from slimlstm.weight_files.matrices import find_matrices, shape_of_stored

_MOST_NAMED = 5


def check_tensors(tensors: Mapping[str, Tensor], limit: int) -> list[str]:
    """Check named tensors; return notes on recurrent layers of other kinds, which stay as they are.

    Args:
        tensors: named tensors; see :func:`slimlstm.weight_files.computed.with_whole_weights`.
        limit: the most bytes that all matrices together may take, with factors multiplied.

    Raises:
        SlimLSTMError: a recurrent weight is not part of a layer, tensors of a layer do not fit each other, or the matrices
            take more than ``limit`` bytes.
    """
    matrices = find_matrices(tensors)
    _check(problem for name, tensor in tensors.items() for problem in _plain_problems(name, tensor))
    _check(problem for site, names in matrices.items() for problem in _site_problems(site, names, tensors))
    needed = sum(site.shape[0] * site.shape[1] * _itemsize(tensors[names[0]]) for site, names in matrices.items())
    check_memory(needed, limit, "the recurrent matrices")
    read = {name for names in matrices.values() for name in names} | {site.key for site in matrices}
    others = [name for name in tensors if _names_a_matrix(name) and name not in read]
    gated = {name for name in others if _is_of_other_cell(name, tensors)}
    _check(f"{name} {list(tensors[name].shape)} is in no LSTM, GRU or RNN" for name in others if name not in gated)
    modules = sorted({name.rpartition(".")[0] or "the model itself" for name in gated})
    return [f"{module} is a GRU or plain RNN and stays as it is" for module in modules]


def check_holds_lstm(path: Path, sites: Collection[Site]) -> None:
    """Raise :class:`SlimLSTMError` if a file has no sites."""
    if not sites:
        raise SlimLSTMError(
            f"{path} holds no weights of an LSTM: no names such as weight_hh_l0 with shapes [4H, H]; give a file that does"
        )


def _itemsize(tensor: Tensor) -> int:
    return max(4, tensor.element_size())


def _check(problems: Iterator[str]) -> None:
    found = list(problems)
    if found:
        more = f"; and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise SlimLSTMError(
            f"{'; '.join(found[:_MOST_NAMED])}{more}. Give the state_dict of a whole model, or compress the live model"
        )


def _names_a_matrix(name: str) -> bool:
    return SITE_NAME.fullmatch(_last(name)) is not None


def _last(name: str) -> str:
    return name.removesuffix("_raw").rpartition(".")[2]


def _plain_problems(name: str, tensor: Tensor) -> Iterator[str]:
    if not name.isprintable():
        yield f"{name!r} is no name for a tensor"
    if _names_a_matrix(name) and not tensor.is_floating_point():
        yield f"{name} holds {tensor.dtype} without a scale that says what its numbers mean"


def _site_problems(site: Site, names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    parts = [tensors[name] for name in names]
    if len(parts) == 2:
        is_mask = parts[1].dtype == torch.bool
        fits = parts[0].shape == parts[1].shape if is_mask else parts[0].shape[-1] == parts[1].shape[0]
        if not fits or not parts[0].numel() or not parts[0].is_floating_point() or parts[1].is_complex():
            yield f"{names[0]} {list(parts[0].shape)} and {names[1]} {list(parts[1].shape)} do not fit each other"
    biases = {name: tensors.get(site.key.replace(f"weight_{site.target}", name)) for name in ("bias_ih", "bias_hh")}
    present = [tensor for tensor in biases.values() if tensor is not None]
    if len(present) == 1:
        yield f"{site.key} has one bias beside it, where an LSTM has two or none"
    for name, bias in biases.items():
        if bias is not None and (bias.shape != (site.shape[0],) or not bias.is_floating_point()):
            yield f"{name} {list(bias.shape)} of {site.key} does not fit its {site.shape[0]} rows"
    projection = tensors.get(site.key.replace("weight_hh", "weight_hr")) if site.target == "hh" else None
    if projection is not None and (tuple(projection.shape) != (site.shape[1], site.shape[0] // 4)):
        yield f"weight_hr {list(projection.shape)} does not fit {site.key} {list(site.shape)}"


def _is_of_other_cell(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a weight is one of a pair with the shapes of a GRU (3H rows) or a plain RNN (H rows)."""
    ih, hh = tensors.get(name.replace("weight_hh", "weight_ih")), tensors.get(name.replace("weight_ih", "weight_hh"))
    if ih is None or hh is None or ih.ndim != 2 or hh.ndim != 2:
        return False
    return len(ih) == len(hh) and len(hh) in (hh.shape[1], 3 * hh.shape[1]) and shape_of_stored((name,), tensors) != (0, 0)
