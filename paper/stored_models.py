"""Trained language models that the repository stores: int8 matrices and a bfloat16 embedding, in small files.

The folder ``models/NAME`` holds what :func:`slimlstm.save` writes, ``vocab.txt`` and ``training.json``.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

import slimlstm as sl
from slimlstm.demo.awd_lstm import AWDLSTM, config_of, load_awd_lstm
from slimlstm.demo.corpora import Vocabulary
from slimlstm.errors import SlimLSTMError
from slimlstm.files import write_text
from slimlstm.folders import CONFIG, read_folder

MODELS = Path(__file__).parents[1] / "models"
MAX_SHARD_BYTES = 11_500_000


def model_folder(name: str) -> Path:
    """Return the folder of a model: ``name`` itself if such a folder exists, else ``models/NAME``; for ``argparse``.

    Raises:
        argparse.ArgumentTypeError: neither exists.
    """
    for folder in (Path(name), MODELS / name):
        if folder.is_dir():
            return folder
    stored = ", ".join(sorted(path.name for path in MODELS.glob("*"))) or "none"
    raise argparse.ArgumentTypeError(f"no folder {name}, and no stored model of that name; stored models: {stored}")


def save_language_model(
    model: AWDLSTM, vocabulary: Vocabulary, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a dense model, rounded, and its vocabulary.

    Args:
        model: stays as it is; its matrices are written as int8 rows, its embedding in bfloat16.
        vocabulary: written to ``vocab.txt``.
        folder: made if missing. A model that was stored there before is replaced.
        max_shard_bytes: size of the largest weights file.
    """
    rounded = copy.deepcopy(model).cpu()
    sl.compress_(rounded, sl.Quantize("int8"))
    rounded.embedding.weight.data = rounded.embedding.weight.data.to(torch.bfloat16)
    write_text(folder / "vocab.txt", "".join(word + "\n" for word in vocabulary.words))
    sl.save(rounded, folder, max_shard_bytes=max_shard_bytes)


def load_language_model(folder: Path) -> AWDLSTM:
    """Return the dense model in a folder, in float32 and evaluation mode.

    The folder is one that :func:`save_language_model` wrote, or any that
    :func:`slimlstm.demo.awd_lstm.load_awd_lstm` reads.

    Raises:
        SlimLSTMError: a file is missing or damaged, or does not hold an AWD-LSTM.
    """
    if not (folder / CONFIG).exists():
        return load_awd_lstm(folder)
    config, tensors = read_folder(folder)
    smaller = [key for key, site in config["sites"].items() if "rank" in site or "kept" in site]
    if smaller:
        raise SlimLSTMError(f"{folder} holds a compressed model ({smaller[0]} is not dense); give the dense one")
    state = {name: tensor.float() for name, tensor in tensors.items()}
    model = AWDLSTM(config_of(state))
    model.load_state_dict(state)
    return model.eval()
