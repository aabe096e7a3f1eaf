"""``slimlstm bench``."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimlstm.cli.models import dense_language_model
from slimlstm.cli.options import (
    Force,
    Json,
    Keep,
    Method,
    Part,
    Rank,
    ReportPage,
    Request,
    Storage,
    Targets,
    check_report,
)
from slimlstm.cli.output import show
from slimlstm.errors import SlimLSTMError

if TYPE_CHECKING:
    from torch import Tensor

    from slimlstm.modules.lstm import LowRankLSTM
    from slimlstm.pipeline.report import Report


def command(
    file: Annotated[
        str,
        typer.Argument(
            help="A .safetensors, .pt, .pth, .ckpt, .bin or .onnx file, the folder of an AWD-LSTM, or 'embedded'."
        ),
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
    page: ReportPage = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Time LSTM layers in slimlstm and in other engines.

    Dense layers run in every engine, compressed ones in slimlstm and in engines that support them. Calls of
    all engines interleave.
    """
    from slimlstm.bench import bench_layers
    from slimlstm.weight_files import layers_of

    request = Request(method, rank, keep, target, storage)
    if request.has_size_or_storage() and compressed is not None:
        raise SlimLSTMError("--compressed excludes --rank, --keep and --storage; give the folder, or how to compress")
    if not request.has_size_or_storage() and (method, target) != ("svd", "both"):
        raise SlimLSTMError("--method and --target say how to compress; say how much, too: --rank, --keep or --storage")
    if page is not None and not request.has_size_or_storage():
        raise SlimLSTMError("--report is about a compression; say how to compress, with --rank, --keep or --storage")
    request.check_needs_no_data("give a method that needs none, or a folder compressed with data as --compressed")
    check_report(page, force)
    layers, report = _layers(file, part), None
    changed = layers if compressed is None else layers_of(*_tensors_and_sites(compressed))
    if request.has_size_or_storage():
        changed, report = _compressed_copy(layers, request)
    found = bench_layers(layers, changed, steps=steps, batch=batch, threads=threads)
    if page is not None and report is not None:
        latencies = {name: 1e-6 * total for name, total in found.totals().items()}
        report.to_html(page, title=f"{Path(file).name}, compressed", latencies=latencies)
    show({"file": file, **found.to_dict()}, as_json, found)


def _compressed_copy(layers: dict[str, LowRankLSTM], request: Request) -> tuple[dict[str, LowRankLSTM], Report]:
    """Return compressed copies of the layers, and the report, in which the layers' names replace the modules' paths."""
    from torch.nn import ModuleList

    from slimlstm.compress import compress_
    from slimlstm.modules.hosts import find_sites
    from slimlstm.pipeline.plan import Plan, with_storage

    changed, names = copy.deepcopy(layers), list(layers)
    holder, storage = ModuleList(changed.values()), request.storage_of_masked()
    config = request.configuration()
    if storage is not None:
        config = with_storage(config, storage, find_sites(holder))
    report = compress_(holder, config)

    def named(key: str) -> str:
        index, _, parameter = key.partition(".")
        return f"{names[int(index)]}, {parameter}"

    sites = [dataclasses.replace(site, key=named(site.key)) for site in report.sites]
    plan = Plan({named(key): site for key, site in report.plan.sites.items()})
    return changed, dataclasses.replace(report, sites=sites, plan=plan)


def _layers(name: str, part: str | None) -> dict[str, LowRankLSTM]:
    from slimlstm.weight_files import layers_of

    model = dense_language_model(name)
    return layers_of(*_tensors_and_sites(Path(name), part)) if model is None else layers_of(model.state_dict())


def _tensors_and_sites(path: Path, part: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from slimlstm.folders import read_config
    from slimlstm.weight_files import read_tensors

    return read_tensors(path, part), read_config(path)["sites"] if path.is_dir() else {}
