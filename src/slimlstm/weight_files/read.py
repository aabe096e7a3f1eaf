"""Read weight files: safetensors, PyTorch's checkpoints, ``.onnx``, and folders that slimlstm saved."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from slimlstm.errors import SlimLSTMError, refusing
from slimlstm.files import check_holds_model, check_regular, memory_limit, path_of
from slimlstm.folders import CONFIG, SCALE, read_folder
from slimlstm.methods import Encoded
from slimlstm.onnx.find import read_tensors_of
from slimlstm.weight_files.check import check_tensors
from slimlstm.weight_files.computed import with_whole_weights
from slimlstm.weight_files.pickled import chosen, read_state_dicts

Tensors = dict[str, Tensor]


def read_tensors(path: str | os.PathLike[str], part: str | None = None) -> Tensors:
    """Return all tensors of a weight file, by name, on the CPU.

    A state dict inside another dictionary, a list or a pickled module is found. Weights under PyTorch's pruning, weight
    norm and spectral norm are computed. From an ONNX file, the weights of its LSTMs are returned, nested graphs included,
    under the names of ``nn.LSTM``.

    Args:
        path: a file or folder. The content decides how it is read, and the ending only where the content does not.
        part: the keys, joined by dots, that lead to one state dict of a checkpoint with several, such as ``"ema.model"``.
            The name of an outer dictionary selects all state dicts below it.

    Raises:
        SlimLSTMError: the file is missing, damaged or of another kind, or holds recurrent weights that cannot be read or
            several sets of them.
    """
    return read_weights(path, part)[0]


def read_weights(path: str | os.PathLike[str], part: str | None = None) -> tuple[Tensors, list[str]]:
    """Return the tensors as :func:`read_tensors` does, and notes on what was computed or stays as it is."""
    path = path_of(path, "path", "name a weight file or a folder")
    with refusing(f"{path} cannot be read"):
        tensors, notes = _whole(path, part)
        return tensors, notes + check_tensors(tensors, memory_limit(path))


def _whole(path: Path, part: str | None) -> tuple[Tensors, list[str]]:
    if path.is_dir():
        if part is not None:
            raise SlimLSTMError(f"{path} is a folder and has no parts; leave --part out")
        if (path / CONFIG).exists():
            return read_folder(path)[1], []
        raise SlimLSTMError(f"{path} is a folder without {CONFIG}; name a weight file, or a folder that slimlstm saved")
    check_regular(path)
    reader = _reader_of(path)
    if part is not None and reader is not _read_pickled:
        raise SlimLSTMError(f"{path} is no PyTorch checkpoint and has no parts; leave --part out")
    return with_whole_weights(_read_pickled(path, part) if reader is _read_pickled else reader(path))


def _reader_of(path: Path) -> Callable[..., Tensors]:
    """Return the reader of a file, by its first bytes and then by its ending."""
    if path.suffix.lower() == ".onnx":
        return read_tensors_of
    check_holds_model(path)
    with path.open("rb") as stream:
        start = stream.read(9)
    if start[8:] == b"{":
        return _read_safetensors
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _read_pickled
    pickled = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
    reader = {".safetensors": _read_safetensors, **dict.fromkeys(pickled, _read_pickled)}.get(path.suffix.lower())
    if reader is None:
        raise SlimLSTMError(
            f"{path} ends in {path.suffix or 'nothing'}, and its content is none that can be read: safetensors, PyTorch's "
            "checkpoints (.pt, .pth, .ckpt, .bin) and .onnx"
        )
    return reader


def _read_pickled(path: Path, part: str | None = None) -> Tensors:
    return {name: tensor.detach() for name, tensor in chosen(read_state_dicts(path), part, path).items()}


def _read_safetensors(path: Path) -> Tensors:
    with refusing(f"{path} is no intact safetensors file"):
        tensors = load_file(path)
    # A folder's weights file may be given without its config.json.
    for name, value in list(tensors.items()):
        scale = tensors.get(name + SCALE)
        if value.dtype == torch.int8 and scale is not None and scale.shape == value.shape[:1]:
            tensors[name] = Encoded(value, tensors.pop(name + SCALE)).decoded()
    return tensors
