"""Read weight files: ``.safetensors``, ``.pt`` and ``.pth``, ``.onnx``, and folders that slimlstm saved."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.folders import CONFIG, SCALE, read_folder
from slimlstm.methods import Encoded
from slimlstm.onnx.find import read_tensors_of
from slimlstm.weight_files.matrices import find_matrices

Tensors = dict[str, Tensor]


def read_tensors(path: Path) -> Tensors:
    """Return all tensors of a weight file, by name, on the CPU.

    A state dict inside another dictionary is found. An ONNX file gives the weights of its LSTM nodes, nested graphs
    included, under the names of ``nn.LSTM``.

    Raises:
        SlimLSTMError: the file is missing, damaged, of another kind, or holds more than data.
    """
    if path.is_dir():
        if (path / CONFIG).exists():
            return read_folder(path)[1]
        raise SlimLSTMError(f"{path} is a folder without {CONFIG}; name a weight file, or a folder that slimlstm saved")
    if not path.is_file():
        raise SlimLSTMError(f"{path} does not exist")
    readers = {".safetensors": _read_safetensors, ".pt": _read_torch, ".pth": _read_torch, ".bin": _read_torch}
    reader = {**readers, ".ckpt": _read_torch, ".onnx": read_tensors_of}.get(path.suffix.lower())
    if reader is None:
        raise SlimLSTMError(f"{path} ends in {path.suffix or 'nothing'}; .safetensors, .pt, .pth and .onnx can be read")
    return reader(path)


def _read_safetensors(path: Path) -> Tensors:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SlimLSTMError(f"{path} is no intact safetensors file: {reason_of(error)}") from error
    # A folder's weights file may be given without its config.json.
    for name, value in list(tensors.items()):
        scale = tensors.get(name + SCALE)
        if value.dtype == torch.int8 and scale is not None and scale.shape == value.shape[:1]:
            tensors[name] = Encoded(value, tensors.pop(name + SCALE)).decoded()
    return tensors


def _read_torch(path: Path) -> Tensors:
    try:
        # PyTorch warns of old protocols and TorchScript archives, which then load, or fail with an error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SlimLSTMError(
            f"{path} holds pickled code, which is not run here; load it where its code is and save "
            f"model.state_dict() instead ({reason_of(error)})"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler fail in many ways
        raise SlimLSTMError(f"{path} is no intact PyTorch checkpoint: {reason_of(error)}") from error
    candidates = list(_state_dicts(content, "", set()))
    with_lstm = [(prefix, state) for prefix, state in candidates if find_matrices(state)] or candidates
    if len(with_lstm) == 1:
        return with_lstm[0][1]
    return {prefix + name: tensor for prefix, state in with_lstm for name, tensor in state.items()}


def _state_dicts(content: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensors]]:
    """Yield the dictionaries of tensors in a checkpoint, each once, with the path that leads to it."""
    if not isinstance(content, Mapping) or id(content) in seen:
        return
    seen.add(id(content))
    items = {str(key): value for key, value in cast(Mapping[object, object], content).items()}
    tensors = {key: value for key, value in items.items() if isinstance(value, Tensor)}
    if tensors:
        yield prefix, tensors
    for key, value in items.items():
        yield from _state_dicts(value, f"{prefix}{key}.", seen)
