"""Checkpoints of a training: tensors, the place in the run and its settings, in one safetensors file.

A checkpoint holds weights as ``model.NAME``, the optimizer's moments as ``moment.INDEX.KEY``, and whatever else a training
needs; its metadata are JSON texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimlstm.files import replacing

Metadata = dict[str, Any]
"""JSON types by name, such as the place in the run and the settings."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors, and JSON types by name, as a safetensors file that replaces ``path`` once it is complete.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "checkpoint.safetensors"
        >>> write_tensors(path, {"model.bias": torch.zeros(2)}, {"place": {"epoch": 3}})
        >>> tensors, metadata = read_tensors(path)
        >>> tensors["model.bias"].tolist(), metadata["place"]["epoch"]
        ([0.0, 0.0], 3)
    """
    texts = None if metadata is None else {name: json.dumps(value) for name, value in metadata.items()}
    with replacing(path) as draft:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, draft, texts)


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Metadata]:
    """Return the tensors, on ``device``, and the metadata of a file that :func:`write_tensors` wrote."""
    with safe_open(path, "pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return tensors, {name: json.loads(text) for name, text in (file.metadata() or {}).items()}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under names that begin with ``prefix`` and a dot.

    Examples:
        >>> list(with_prefix("model", {"bias": torch.zeros(1)}))
        ['model.bias']
    """
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix`` and a dot, under the rest of their names.

    Examples:
        >>> list(without_prefix("model", {"model.bias": torch.zeros(1), "moment.0.step": torch.zeros(1)}))
        ['bias']
    """
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as tensors named ``moment.INDEX.KEY``."""
    state: dict[int, dict[str, Tensor | None]] = optimizer.state_dict()["state"]
    return {
        f"moment.{index}.{key}": value
        for index, moments in state.items()
        for key, value in moments.items()
        if value is not None
    }


def restore_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that :func:`moments_of` returned; its options stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in without_prefix("moment", tensors).items():
        index, key = name.split(".")
        # Adam counts its steps on the CPU.
        state.setdefault(int(index), {})[key] = tensor.cpu() if key == "step" else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
