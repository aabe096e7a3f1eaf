"""Trained language models that the repository stores: int8 matrices and a bfloat16 embedding, in small files.

The folder ``models/NAME`` holds what :func:`slimlstm.save` writes, its weights file cut into parts, ``vocab.txt`` and
``training.json``.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch

import slimlstm as sl
from slimlstm.demo.awd_lstm import AWDLSTM, config_of, load_awd_lstm
from slimlstm.demo.corpora import Vocabulary
from slimlstm.errors import SlimLSTMError
from slimlstm.files import replacing, write_text
from slimlstm.folders import CONFIG, read_folder

MODELS = Path(__file__).parents[1] / "models"
PART_BYTES = 11_500_000


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


def save_language_model(model: AWDLSTM, vocabulary: Vocabulary, folder: Path, *, part_bytes: int = PART_BYTES) -> None:
    """Write a dense model, rounded, and its vocabulary.

    Args:
        model: stays as it is; its matrices are written as int8 rows, its embedding in bfloat16.
        vocabulary: written to ``vocab.txt``.
        folder: made if missing. A model that was stored there before is replaced.
        part_bytes: size of the largest file.
    """
    rounded = copy.deepcopy(model).cpu()
    sl.compress_(rounded, sl.Quantize("int8"))
    rounded.embedding.weight.data = rounded.embedding.weight.data.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        sl.save(rounded, scratch)
        (weights,) = Path(scratch).glob("*.safetensors")
        content, config = weights.read_bytes(), (Path(scratch) / CONFIG).read_text(encoding="utf-8")
    parts = [content[start : start + part_bytes] for start in range(0, len(content), part_bytes)]
    paths = [folder / f"{weights.name}.part{index}" for index in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        with replacing(path) as draft:
            draft.write_bytes(part)
    write_text(folder / "vocab.txt", "".join(word + "\n" for word in vocabulary.words))
    write_text(folder / CONFIG, config)
    for stale in set(folder.glob("*.safetensors.part*")) - set(paths):
        stale.unlink()


def load_language_model(folder: Path) -> AWDLSTM:
    """Return the dense model in a folder, in float32 and evaluation mode.

    The folder is one that :func:`save_language_model` wrote, or any that
    :func:`slimlstm.demo.awd_lstm.load_awd_lstm` reads.

    Raises:
        SlimLSTMError: a file is missing or damaged, or does not hold an AWD-LSTM.
    """
    parts = sorted(folder.glob("*.safetensors.part*"), key=lambda path: int(path.suffix.removeprefix(".part")))
    if not parts:
        return load_awd_lstm(folder)
    if len({path.stem for path in parts}) > 1:
        raise SlimLSTMError(f"{folder} has parts of several weights files; delete it and check it out again")
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch)
        (whole / parts[0].stem).write_bytes(b"".join(path.read_bytes() for path in parts))
        (whole / CONFIG).write_bytes((folder / CONFIG).read_bytes())
        _, tensors = read_folder(whole)
    state = {name: tensor.float() for name, tensor in tensors.items()}
    model = AWDLSTM(config_of(state))
    model.load_state_dict(state)
    return model.eval()
