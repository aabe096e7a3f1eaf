"""The checkpoint file of a training run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError, refusing
from slimlstm.files import check_regular, replacing, sha256

_FORMAT = "slimlstm.tuning 3"
_DIGITS = 64
"""Bytes at the end of the file: the SHA-256 of everything before."""


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint to the file ``path``, replacing an old one.

    Args:
        path: the file.
        content: tensors, numbers, strings, and lists and dictionaries of them.
    """
    stream = io.BytesIO()
    torch.save({"format": _FORMAT, **content}, stream)
    written = stream.getvalue()
    with replacing(path) as draft:
        draft.write_bytes(written + sha256(written).encode())


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint, or None if the file does not exist.

    Raises:
        SlimLSTMError: the file is damaged, or is not a checkpoint of ``finetune``.
    """
    if not path.exists():
        return None
    check_regular(path)
    with refusing(f"the checkpoint {path} cannot be read, so delete it, or name another file"):
        written = path.read_bytes()
        if written[-_DIGITS:] != sha256(written[:-_DIGITS]).encode():
            raise SlimLSTMError(
                f"{path} is damaged or not a checkpoint of finetune: it does not end in the SHA-256 of its content; "
                "delete it, or name another file"
            )
        content = torch.load(io.BytesIO(written[:-_DIGITS]), map_location="cpu", weights_only=True)
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


def check_same_model(
    path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], norms: Mapping[str, float]
) -> None:
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
