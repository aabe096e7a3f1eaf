"""Rebuild the LSTM layers in a weight file as modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.sites import Site
from slimlstm.ops.weights import Matrix
from slimlstm.weight_files.matrices import find_matrices, stored_matrix


def layers_of(
    tensors: Mapping[str, Tensor], sites: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, LowRankLSTM]:
    """Return every LSTM layer among named tensors as a module of its own, in float32, with its directions.

    A layer that has a reverse direction only, as ONNX files may, becomes a module of one direction, which reads forwards.

    Args:
        tensors: see :func:`slimlstm.weight_files.read_tensors`; factors stay factors.
        sites: the site entries of a folder's ``config.json``, which name the storages.

    Returns:
        The layers by name, in their order, such as ``"encoder layer 0"``.
    """
    matrices = {site.key: (site, names) for site, names in find_matrices(tensors).items()}
    found: dict[str, LowRankLSTM] = {}
    # Files list names in any order, so sort by the numbers of the layers.
    for key in sorted(matrices, key=_natural):
        site, _ = matrices[key]
        if site.target == "hh" and not (site.reverse and key.removesuffix("_reverse") in matrices):
            name = f"{site.module} layer {site.layer}".strip() if "_l" in site.name else site.module
            found[name] = _layer(key, matrices, tensors, sites or {})
    return found


def _natural(key: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _layer(
    key: str,
    matrices: Mapping[str, tuple[Site, tuple[str, ...]]],
    tensors: Mapping[str, Tensor],
    sites: Mapping[str, Mapping[str, Any]],
) -> LowRankLSTM:
    """Return the layer that an hh matrix belongs to, with its weights, storages and reverse direction."""
    if f"{key}_reverse" in matrices:
        endings = {"": "", "_reverse": "_reverse"}
    else:
        endings = {"_reverse" if key.endswith("_reverse") else "": ""}
    layer = _empty_layer(key, len(endings) == 2, matrices, tensors)
    base = key.removesuffix("_reverse")
    for ending, own in endings.items():
        for kind in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"):
            name, place = f"{kind}_l0{own}", base.replace("weight_hh", kind) + ending
            if place in matrices:
                _set_weight(layer, name, stored_matrix(matrices[place][1], tensors))
            elif name in layer.state_dict():
                _set_weight(layer, name, tensors[place])
        for kind in ("weight_ih", "weight_hh"):
            storage = sites.get(base.replace("weight_hh", kind) + ending, {}).get("storage")
            if storage is not None:
                layer.store(f"{kind}_l0{own}", storage)
    return layer


def _empty_layer(
    key: str,
    is_bidirectional: bool,
    matrices: Mapping[str, tuple[Site, tuple[str, ...]]],
    tensors: Mapping[str, Tensor],
) -> LowRankLSTM:
    """Return a layer of the sizes of the one that an hh matrix belongs to."""
    (rows, outputs), (_, inputs) = (matrices[name][0].shape for name in (key, key.replace("weight_hh", "weight_ih")))
    return LowRankLSTM(
        inputs,
        rows // 4,
        bias=key.replace("weight_hh", "bias_hh") in tensors,
        bidirectional=is_bidirectional,
        proj_size=outputs if key.replace("weight_hh", "weight_hr") in tensors else 0,
    ).eval()


def _set_weight(layer: LowRankLSTM, name: str, matrix: Matrix) -> None:
    if isinstance(matrix, Tensor):
        layer.get_parameter(name).data = matrix.float()
    else:
        layer.set_factors(name, matrix[0].float(), matrix[1].float())
