"""The model card of a folder: a ``README.md`` with the sizes of all matrices and the code that loads the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slimlstm.errors import SlimLSTMError
from slimlstm.files import check_regular, write_text
from slimlstm.methods import matrix_bytes

CARD = "README.md"
MARK = "<!-- slimlstm wrote this card, and writes it again on every save. Delete this line to keep your own. -->"


def write_card(folder: Path, sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the card of a folder; a ``README.md`` without slimlstm's mark stays as it is.

    Args:
        folder: the folder of a model.
        sites: the entries of its compressed sites in ``config.json``.
    """
    path = folder / CARD
    if _is_ours(path):
        write_text(path, model_card(folder.absolute().name, sites))


def _is_ours(path: Path) -> bool:
    """Return whether a file is missing, or is a card by slimlstm whose mark the user has not deleted."""
    if path.is_symlink() or not path.exists():
        return not path.is_symlink()
    try:
        check_regular(path)
        return MARK in path.read_text(encoding="utf-8")
    except (OSError, ValueError, SlimLSTMError):
        return False


def model_card(name: str, sites: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a card in the style of Hugging Face.

    Args:
        name: the name of the folder.
        sites: the entries of its compressed sites in ``config.json``.

    Examples:
        >>> sites = {"lstm.weight_hh_l0": {"shape": [64, 16], "dtype": "float32", "storage": "int8"}}
        >>> print(model_card("small", sites).splitlines()[10])
        The compressed matrices take 1,280 bytes instead of 4,096 (31.2%).
    """
    rows, before, after = list[str](), 0, 0
    for key, site in sites.items():
        m, n = site["shape"]
        itemsize = getattr(torch, site["dtype"]).itemsize
        now = matrix_bytes((m, n), site.get("rank"), site.get("storage"), itemsize)
        whole = matrix_bytes((m, n), None, None, itemsize)
        before, after = before + whole, after + now
        method = site.get("method", "dense")
        amount = f"rank {site['rank']}" if "rank" in site else f"{site['kept']:,} weights" if "kept" in site else ""
        form = ", ".join(filter(None, ("" if method == "dense" else method, amount, site.get("storage"))))
        rows.append(f"| `{key}` | {m} x {n} | {form} | {whole:,} | {now:,} |")
    lines = [
        "---",
        "library_name: slimlstm",
        "tags:",
        "- lstm",
        "- model-compression",
        "---",
        MARK,
        "",
        "# LSTM model, compressed",
        "",
        f"The compressed matrices take {after:,} bytes instead of {before:,} ({after / max(before, 1):.1%}).",
        "",
        "```python",
        "import slimlstm as sl",
        "model = MyModel()  # the class of the uncompressed model",
        f"sl.load({name!r}, model)",
        "```",
        "",
        "| matrix | shape | form | bytes before | bytes |",
        "| --- | --- | --- | ---: | ---: |",
        *rows,
        "",
        "The other parameters are as they were. Made by slimlstm.",
    ]
    return "\n".join(lines) + "\n"
