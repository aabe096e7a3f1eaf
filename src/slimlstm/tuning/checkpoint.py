"""The checkpoint file of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.files import replacing

_FORMAT = "slimlstm.tuning 1"


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file ``path`` by a checkpoint with this content: tensors, numbers, strings, lists and dictionaries."""
    with replacing(path) as draft, draft.open("wb") as stream:
        torch.save({"format": _FORMAT, **content}, stream)


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint, or None if the file does not exist.

    Raises:
        SlimLSTMError: the file is damaged, or is not a checkpoint of ``finetune``.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise exceptions of many classes
        raise SlimLSTMError(
            f"the checkpoint {path} cannot be read ({reason_of(error)}); delete it, or name another file"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise SlimLSTMError(f"{path} is not a checkpoint of finetune; name another file")
    return content


def check_settings(path: Path, written: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise SlimLSTMError unless a checkpoint's run had these settings."""
    for name, value in settings.items():
        if written[name] != value:
            raise SlimLSTMError(
                f"{path} belongs to a run with {name}={written[name]}, not {value}; use that value, or name another file"
            )


def check_model(path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], norms: Mapping[str, float]) -> None:
    """Raise SlimLSTMError unless a checkpoint's run began with a model of these names, shapes and norms."""
    same = content["tensors"].keys() == tensors.keys() and all(
        content["tensors"][name].shape == tensor.shape
        # Factors that are computed again may differ in their last digits.
        and math.isclose(content["norms"][name], norms[name], rel_tol=1e-3, abs_tol=1e-9)
        for name, tensor in tensors.items()
    )
    if not same:
        raise SlimLSTMError(
            f"{path} belongs to a run that began with another model: names, shapes or weights differ; "
            "give the model as it was before that run, or name another file"
        )
