"""``slimlstm bench``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from slimlstm.cli.options import Json, Keep, Method, Part, Rank, Request, Storage, Targets
from slimlstm.cli.output import progress_bar, show
from slimlstm.errors import SlimLSTMError

if TYPE_CHECKING:
    from torch import Tensor

    from slimlstm.modules.lstm import LowRankLSTM
    from slimlstm.pipeline.config import Target


def command(
    file: Annotated[
        str, typer.Argument(help="A .safetensors, .pt, .pth or .onnx file, the folder of an AWD-LSTM, or 'embedded'.")
    ],
    compressed: Annotated[Path | None, typer.Option(help="A compressed folder of the same model.")] = None,
    method: Method = "svd",
    rank: Rank = None,
    keep: Keep = None,
    target: Targets = "both",
    storage: Storage = None,
    part: Part = None,
    steps: Annotated[int, typer.Option(help="Time steps per call.")] = 35,
    batch: Annotated[int, typer.Option(help="Sequences per call.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads per engine.")] = 1,
    as_json: Json = False,
) -> None:
    """Time LSTM layers in slimlstm and in other engines.

    Dense layers run in every engine, compressed ones in slimlstm and in the engines that can, by turns.
    """
    from slimlstm.bench import bench_layers
    from slimlstm.weight_files import layers_of

    request = Request(method, rank, keep, target, storage)
    if request.has_size_or_storage() and compressed is not None:
        raise SlimLSTMError("--compressed excludes --rank, --keep and --storage; give the folder, or how to compress")
    layers = _layers(file, part)
    changed = layers if compressed is None else layers_of(*_tensors_and_sites(compressed))
    if request.has_size_or_storage():
        changed = _compressed_copy(layers, request)
    with progress_bar("timing") as progress:
        found = bench_layers(layers, changed, steps=steps, batch=batch, threads=threads, progress=progress)
    show({"file": file, **found.to_dict()}, as_json, found)


def _compressed_copy(layers: dict[str, LowRankLSTM], request: Request) -> dict[str, LowRankLSTM]:
    from torch.nn import ModuleList

    from slimlstm.compress import compress_
    from slimlstm.pipeline.config import Quantize

    changed = copy.deepcopy(layers)
    holder, storage = ModuleList(changed.values()), request.storage_of_masked()
    compress_(holder, request.configuration())
    if storage is not None:
        compress_(holder, Quantize(storage, cast("Target", request.target)))
    return changed


def _layers(name: str, part: str | None = None) -> dict[str, LowRankLSTM]:
    from slimlstm.demo import model as embedded
    from slimlstm.demo.awd_lstm import load_awd_lstm
    from slimlstm.folders import CONFIG
    from slimlstm.weight_files import layers_of

    path = Path(name)
    if name == "embedded":
        return layers_of(embedded.embedded_model().state_dict())
    if path.is_dir() and not (path / CONFIG).exists():
        return layers_of(load_awd_lstm(name).state_dict())
    return layers_of(*_tensors_and_sites(path, part))


def _tensors_and_sites(path: Path, part: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from slimlstm.folders import read_config
    from slimlstm.weight_files import read_tensors

    return read_tensors(path, part), read_config(path)["sites"] if path.is_dir() else {}
