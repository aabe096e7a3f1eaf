"""Official files of ELMo: ``options.json`` and ``weights.hdf5``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from paper.elmo import BiLM
from paper.elmo_config import ELMoConfig
from slimlstm.errors import SlimLSTMError, refusing
from slimlstm.files import check_memory, check_regular, memory_limit, replacing, write_json
from slimlstm.ops.gates import PYTORCH, TENSORFLOW, reordered


def load_bilm(folder: str | Path) -> BiLM:
    """Read a language model in the official format, ``*options.json`` and ``*weights*.hdf5``; it is in evaluation mode.

    Raises:
        SlimLSTMError: a file is missing, damaged, or does not fit the other.
        ImportError: h5py is not installed.
    """
    folder = Path(folder)
    found = sorted(folder.glob("*options.json")), sorted(folder.glob("*weights*.hdf5"))
    if [len(paths) for paths in found] != [1, 1]:
        raise SlimLSTMError(
            f"{folder} has {len(found[0])} files *options.json and {len(found[1])} files *weights*.hdf5; "
            "an ELMo has one of each"
        )
    return read_bilm(found[0][0], found[1][0])


def read_bilm(options: str | Path, weights: str | Path) -> BiLM:
    """Read the two files of a language model, as :func:`load_bilm` does."""
    h5py: Any = __import__("h5py")
    for path in (options, weights):
        check_regular(path)
    with refusing(f"{options} cannot be read"):
        config = ELMoConfig.from_options(json.loads(Path(options).read_text(encoding="utf-8")))
        check_memory(_bytes_of(config), memory_limit(weights), f"the model of {options}")
        model = BiLM(config)
        expected = official_tensors(model)
    with refusing(f"{weights} does not hold the weights of an ELMo"), h5py.File(weights, "r") as file:
        tensors = {name: _read_array(file[name], name, tensor.shape) for name, tensor in expected.items()}
    _copy_official_(model, tensors)
    return model.eval()


def _bytes_of(config: ELMoConfig) -> int:
    """Return the bytes of a model's matrices, which make up nearly all of it."""
    width = sum(number for _, number in config.filters)
    convolutions = sum(size * number for size, number in config.filters) * config.character_size
    highways = config.num_highways * 2 * width * width
    lstms = 2 * config.num_layers * 9 * config.hidden_size * config.proj_size
    return 4 * (convolutions + highways + width * config.proj_size + lstms)


def _read_array(array: Any, name: str, shape: torch.Size) -> Tensor:
    if tuple(array.shape) != tuple(shape):
        raise SlimLSTMError(f"{name} of the weights is {list(array.shape)}; the options imply {list(shape)}")
    return torch.from_numpy(array[...]).float()


def save_bilm(model: BiLM, folder: str | Path) -> None:
    """Write ``options.json`` and ``weights.hdf5`` in the official format into ``folder``.

    Raises:
        SlimLSTMError: the model is compressed; write it with :func:`slimlstm.save`.
        ImportError: h5py is not installed.
    """
    h5py: Any = __import__("h5py")
    if not all(isinstance(lstm, nn.LSTM) for lstm in (*model.forward_lstms, *model.backward_lstms)):
        raise SlimLSTMError("the official format holds dense matrices; write a compressed model with slimlstm.save")
    write_json(Path(folder) / "options.json", model.config.to_options())
    with replacing(Path(folder) / "weights.hdf5") as draft, h5py.File(draft, "w") as file:
        for name, tensor in official_tensors(model).items():
            file[name] = tensor.float().cpu().numpy()


def official_tensors(model: BiLM) -> dict[str, Tensor]:
    """Return the weights by their names in the official file, in its layout.

    Matrices apply from the right, gates are in the order i, g, f, o, and readers add 1 to the bias of f.
    """
    encoder, size = model.encoder, model.encoder.projection.in_features
    found = {
        "char_embed": encoder.embedding.weight[1:],
        "CNN_proj/W_proj": encoder.projection.weight.t(),
        "CNN_proj/b_proj": encoder.projection.bias,
    }
    for index, convolution in enumerate(cast(Sequence[nn.Conv1d], encoder.convolutions)):
        assert convolution.bias is not None  # noqa: S101 (the type allows it)
        found[f"CNN/W_cnn_{index}"] = convolution.weight.permute(2, 1, 0)[None]
        found[f"CNN/b_cnn_{index}"] = convolution.bias
    for index, highway in enumerate(cast(Sequence[nn.Linear], encoder.highway.layers)):
        for part, name in ((slice(size), "transform"), (slice(size, None), "carry")):
            found[f"CNN_high_{index}/W_{name}"] = highway.weight[part].t()
            found[f"CNN_high_{index}/b_{name}"] = highway.bias[part]
    for path, lstm in _lstms(model).items():
        bias = reordered(lstm["bias_ih_l0"] + lstm["bias_hh_l0"], TENSORFLOW)
        hidden = len(bias) // 4
        bias[2 * hidden : 3 * hidden] -= 1.0
        matrices = torch.cat([lstm["weight_ih_l0"], lstm["weight_hh_l0"]], dim=1)
        found |= {
            f"{path}/W_0": reordered(matrices, TENSORFLOW).t(),
            f"{path}/B": bias,
            f"{path}/W_P_0": lstm["weight_hr_l0"].t(),
        }
    return {name: tensor.detach() for name, tensor in found.items()}


def _copy_official_(model: BiLM, tensors: Mapping[str, Tensor]) -> None:
    """Copy official tensors into the model, the inverse of :func:`official_tensors`."""
    encoder, size = model.encoder, model.encoder.projection.in_features
    with torch.no_grad():
        encoder.embedding.weight[1:] = tensors["char_embed"]
        encoder.projection.weight.copy_(tensors["CNN_proj/W_proj"].t())
        encoder.projection.bias.copy_(tensors["CNN_proj/b_proj"])
        for index, convolution in enumerate(cast(Sequence[nn.Conv1d], encoder.convolutions)):
            assert convolution.bias is not None  # noqa: S101 (the type allows it)
            convolution.weight.copy_(tensors[f"CNN/W_cnn_{index}"][0].permute(2, 1, 0))
            convolution.bias.copy_(tensors[f"CNN/b_cnn_{index}"])
        for index, highway in enumerate(cast(Sequence[nn.Linear], encoder.highway.layers)):
            for part, name in ((slice(size), "transform"), (slice(size, None), "carry")):
                highway.weight[part] = tensors[f"CNN_high_{index}/W_{name}"].t()
                highway.bias[part] = tensors[f"CNN_high_{index}/b_{name}"]
        for path, lstm in _lstms(model).items():
            matrices, hidden = reordered(tensors[f"{path}/W_0"].t(), PYTORCH, TENSORFLOW), model.config.hidden_size
            lstm["weight_ih_l0"].copy_(matrices[:, : model.config.proj_size])
            lstm["weight_hh_l0"].copy_(matrices[:, model.config.proj_size :])
            lstm["weight_hr_l0"].copy_(tensors[f"{path}/W_P_0"].t())
            lstm["bias_ih_l0"].copy_(reordered(tensors[f"{path}/B"], PYTORCH, TENSORFLOW))
            lstm["bias_ih_l0"][hidden : 2 * hidden] += 1.0
            lstm["bias_hh_l0"].zero_()


def _lstms(model: BiLM) -> dict[str, dict[str, Tensor]]:
    """Return the parameters of every layer by the path of its cell in the official file."""
    return {
        f"RNN_{index}/RNN/MultiRNNCell/Cell{layer}/LSTMCell": dict(lstm.named_parameters())
        for index, lstms in enumerate((model.forward_lstms, model.backward_lstms))
        for layer, lstm in enumerate(lstms)
    }
