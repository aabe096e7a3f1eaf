"""LSTMs in weight files, without the code of their models: ``.safetensors``, ``.pt`` / ``.pth``, ``.onnx``, saved folders.

Names and gate order are PyTorch's.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slimlstm.compress import Progress, compress_matrix, site_report
from slimlstm.errors import SlimLSTMError
from slimlstm.folders import CONFIG, SCALE, read_config, read_folder, site_entry, stored_names, write_folder
from slimlstm.methods.factorize import check_matrix
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.sites import SITE_NAME, Site
from slimlstm.onnx.graph import read_tensors_of
from slimlstm.ops.weights import Matrix, from_int8, rounded, stored_bytes
from slimlstm.pipeline.plan import DENSE, LowRank, Plan, Prune, Quantize, make_plan
from slimlstm.pipeline.report import Report, Total

Tensors = dict[str, Tensor]

_PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.(weight_[^.]*)\.original")
_LSTM_PART = re.compile(r"(parametrizations\.)?(weight|bias)_(ih|hh|hr)[^.]*(\.original)?")


def read_tensors(path: Path) -> Tensors:
    """All tensors of a weight file, by name, on the CPU.

    A checkpoint that keeps its state dict inside another dictionary is unpacked. Of an ONNX file, the weights of its LSTM
    nodes, nested graphs included, under the names that ``nn.LSTM`` gives them.

    Raises:
        SlimLSTMError: the file is missing, damaged, of another kind, or holds more than data.
    """
    if path.is_dir():
        if (path / CONFIG).exists():
            return read_folder(path)[1]
        raise SlimLSTMError(f"{path} is a folder without {CONFIG}; name a weight file, or a folder that slimlstm saved")
    if not path.is_file():
        raise SlimLSTMError(f"there is no file {path}")
    readers = {".safetensors": _read_safetensors, ".pt": _read_torch, ".pth": _read_torch, ".bin": _read_torch}
    reader = {**readers, ".ckpt": _read_torch, ".onnx": read_tensors_of}.get(path.suffix.lower())
    if reader is None:
        raise SlimLSTMError(f"{path} ends in {path.suffix or 'nothing'}; .safetensors, .pt, .pth and .onnx can be read")
    return reader(path)


def find_matrices(tensors: Mapping[str, Tensor]) -> dict[Site, tuple[str, ...]]:
    """The recurrent matrices among named tensors, and the names of the tensors that each is kept in.

    That is one name, or two for factors. What belongs to a GRU or a plain RNN, by the shapes, is left out.
    """
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for name in tensors:
        for canonical, kept_in in _as_matrix(name, tensors):
            module, _, weight = canonical.rpartition(".")
            # A weight-drop LSTM may hold both the raw weight and what was last made of it.
            if SITE_NAME.fullmatch(weight) and ((module, weight) not in found or name.endswith("_raw")):
                found[module, weight] = kept_in
    return {
        Site(module, weight, _shape(kept_in, tensors), _rank(kept_in, tensors), _kept(kept_in, tensors)): kept_in
        for (module, weight), kept_in in found.items()
        if _is_lstm(module, weight, found, tensors)
    }


def matrix_of(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix [m, n] that is kept in the named tensors: one, one and its mask, or two factors."""
    kept_as = _kept_as(names, tensors)
    return kept_as if isinstance(kept_as, Tensor) else kept_as[0] @ kept_as[1]


def _kept_as(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Matrix:
    first, last = tensors[names[0]], tensors[names[-1]]
    if len(names) == 1:
        return first
    return first * last if last.dtype == torch.bool else (first, last)


def layers_of(
    tensors: Mapping[str, Tensor], sites: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, LowRankLSTM]:
    """Every LSTM layer among named tensors as a module of its own, in float32: both directions, factors as they are.

    Args:
        tensors: as of :func:`read_tensors`.
        sites: the site entries of a folder's ``config.json``, which name storages.
    """
    matrices = {site.key: (site, names) for site, names in find_matrices(tensors).items()}
    found: dict[str, LowRankLSTM] = {}
    # Files order names in ways of their own; layers are numbered.
    for key in sorted(matrices, key=_natural):
        site, _ = matrices[key]
        if site.target == "hh" and not site.reverse:
            name = f"{site.module} layer {site.layer}".strip() if "_l" in site.name else site.module
            found[name] = _layer(key, matrices, tensors, sites or {})
    return found


def _natural(key: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _layer(
    key: str,
    matrices: Mapping[str, tuple[Site, tuple[str, ...]]],
    tensors: Mapping[str, Tensor],
    sites: Mapping[str, Mapping[str, Any]],
) -> LowRankLSTM:
    endings = ["", "_reverse"] if f"{key}_reverse" in matrices else [""]
    (rows, outputs), (_, inputs) = (matrices[name][0].shape for name in (key, key.replace("weight_hh", "weight_ih")))
    projected = key.replace("weight_hh", "weight_hr") in tensors
    layer = LowRankLSTM(
        inputs,
        rows // 4,
        bias=key.replace("weight_hh", "bias_hh") in tensors,
        bidirectional=len(endings) == 2,
        proj_size=outputs if projected else 0,
    ).eval()
    for ending in endings:
        for kind in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"):
            name, place = f"{kind}_l0{ending}", key.replace("weight_hh", kind) + ending
            if place in matrices:
                kept_as = _kept_as(matrices[place][1], tensors)
                if isinstance(kept_as, Tensor):
                    layer.get_parameter(name).data = kept_as.float()
                else:
                    layer.set_factors(name, kept_as[0].float(), kept_as[1].float())
            elif name in layer.state_dict():
                layer.get_parameter(name).data = tensors[place].float()
        for kind in ("weight_ih", "weight_hh"):
            storage = sites.get(key.replace("weight_hh", kind) + ending, {}).get("storage")
            if storage is not None:
                layer.store(f"{kind}_l0{ending}", storage)
    return layer


def compress_file(
    path: Path,
    config: LowRank | Prune | Quantize | Plan,
    folder: Path,
    progress: Progress | None = None,
    storage: str | None = None,
) -> Report:
    """``compress_`` at the level of weights: reads a file, writes a folder that :func:`slimlstm.load` reads.

    With a ``storage``, every site that ``config`` means is quantised too.

    Raises:
        SlimLSTMError: as :func:`read_tensors`, ``compress_`` and ``save``. Nothing is written then.
    """
    tensors = read_tensors(path)
    matrices = find_matrices(tensors)
    if not matrices:
        raise SlimLSTMError(f"{path} holds no weights of an LSTM, by names (weight_hh_l0) and shapes ([4H, H])")
    known: dict[str, dict[str, Any]] = read_config(path)["sites"] if path.is_dir() else {}
    matrices = {replace(site, storage=known.get(site.key, {}).get("storage")): names for site, names in matrices.items()}
    plan = make_plan(config, list(matrices))
    if storage is not None:
        plan = make_plan(plan.stored_as(storage), list(matrices))
    state, reports = dict(tensors), list[Any]()
    # What was compressed before stays so.
    entries = {
        site.key: known.get(site.key) or site_entry(site, {}, tensors[names[0]].dtype)
        for site, names in matrices.items()
        if site.rank is not None or site.nonzeros is not None or site.storage is not None
    }
    chosen = [(site, names) for site, names in matrices.items() if site.key in plan.sites]
    for index, (site, names) in enumerate(chosen):
        if progress is not None:
            progress(site.key, index / len(chosen))
        action, first = plan.sites[site.key], tensors[names[0]]
        try:
            result = compress_matrix(_kept_as(names, tensors), action)
            _round_projection(state, site.key, action.storage)
        except SlimLSTMError as error:
            raise SlimLSTMError(f"{site.key}: {error}") from error
        reports.append(site_report(site, action, result, first.element_size()))
        if not result.source_sha256:
            continue
        mask = result.mask
        if mask is None and site.nonzeros is not None and result.factors is None:
            mask = tensors[names[1]]
        for name in names:
            state.pop(name)
        state.pop(site.key, None)
        rank = None if result.factors is None else result.factors[0].shape[1]
        kept = None if mask is None else int(mask.sum())
        after = Site(site.module, site.name, site.shape, rank, kept, storage=action.storage_of(site))
        provenance = {"method": action.method, "source_sha256": result.source_sha256}
        if action.method == DENSE and site.key in known:
            provenance = {name: known[site.key][name] for name in provenance if name in known[site.key]} or provenance
        entries[site.key] = site_entry(after, provenance, first.dtype)
        state.update(_stored_as(site, first if result.weight is None else result.weight.detach(), result.factors, mask))
    changed = {report.key for report in reports if plan.sites[report.key].method != DENSE or plan.sites[report.key].storage}
    if not changed:
        raise SlimLSTMError("nothing would get smaller: " + "; ".join(f"{report.key}: {report.note}" for report in reports))
    _end_parametrizations(state, {site.module for site, _ in chosen if site.key in changed})
    write_folder(folder, state, entries)
    before, after = _sizes(tensors, known), _sizes(state, entries)
    return Report(reports, plan, Total.between(before[0], after[0]), Total.between(before[1], after[1]))


def _round_projection(state: Tensors, key: str, storage: str | None) -> None:
    """Rounds the projection that goes with an hh matrix."""
    projection = key.replace("weight_hh", "weight_hr")
    if storage is not None and projection != key and projection in state:
        check_matrix(state[projection])
        state[projection] = rounded(state[projection], storage)


def _end_parametrizations(state: Tensors, modules: set[str]) -> None:
    """Gives what is not masked in compressed modules its plain name, as ``compress_`` does."""
    for name in list(state):
        match = re.fullmatch(r"(?:(.*)\.)?parametrizations\.([^.]*)\.original", name)
        if match and (match.group(1) or "") in modules and f"{name.removesuffix('original')}0.mask" not in state:
            state[".".join(part for part in match.groups() if part)] = state.pop(name)


def _stored_as(site: Site, matrix: Tensor, factors: Any, mask: Tensor | None) -> Tensors:
    """The names and tensors that the compressed module's ``state_dict`` has for one matrix."""
    if factors is not None:
        return {f"{site.key}_u": factors[0].detach(), f"{site.key}_v": factors[1].detach()}
    if mask is None:
        return {site.key: matrix}
    prefix = f"{site.module}." if site.module else ""
    place = f"{prefix}parametrizations.{site.name}"
    return {f"{place}.original": matrix, f"{place}.0.mask": mask}


def _as_matrix(name: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The canonical name of the matrix that a tensor is, or is the first factor of, and the tensors it is kept in."""
    match = _PARAMETRIZED.fullmatch(name)
    if match:
        mask = f"{name.removesuffix('original')}0.mask"
        yield ".".join(part for part in match.groups() if part), (name, mask) if mask in tensors else (name,)
    elif name.endswith("_u") and f"{name[:-2]}_v" in tensors:
        yield name[:-2], (name, f"{name[:-2]}_v")
    else:
        module, _, weight = name.removesuffix("_raw").rpartition(".")
        inner = f"{module}.module.{weight}" if module else f"module.{weight}"
        # A weight-drop wrapper may keep the raw weight itself, beside the LSTM that it calls "module".
        is_wrapper = name.endswith("_raw") and inner.replace("weight_hh", "weight_ih") in tensors
        yield inner if is_wrapper else name.removesuffix("_raw"), (name,)


def _shape(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    first, last = tensors[names[0]].shape, tensors[names[-1]].shape
    return (first[0], last[1]) if len(first) == 2 and len(last) == 2 else (0, 0)


def _rank(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> int | None:
    return tensors[names[0]].shape[1] if len(names) == 2 and tensors[names[1]].dtype != torch.bool else None


def _kept(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> int | None:
    return int(tensors[names[1]].sum()) if len(names) == 2 and tensors[names[1]].dtype == torch.bool else None


def _is_lstm(
    module: str, weight: str, found: Mapping[tuple[str, str], tuple[str, ...]], tensors: Mapping[str, Tensor]
) -> bool:
    """Whether ih and hh of this layer are both there and have 4H rows, H being hh's columns or those of its projection."""
    suffix = weight[len("weight_ih") :]
    ih, hh = found.get((module, f"weight_ih{suffix}")), found.get((module, f"weight_hh{suffix}"))
    if ih is None or hh is None:
        return False
    (rows, inputs), (hh_rows, outputs) = _shape(ih, tensors), _shape(hh, tensors)
    projection = tensors.get(f"{module}.weight_hr{suffix}" if module else f"weight_hr{suffix}")
    hidden = outputs if projection is None else projection.shape[-1]
    return inputs > 0 and rows == hh_rows == 4 * hidden


def _sizes(
    tensors: Mapping[str, Tensor], entries: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Parameters and bytes of the LSTMs with their biases, and of everything; what a mask zeroes is no parameter."""
    matrices = find_matrices(tensors)
    zeroed = {
        names[0]: tensors[names[0]].numel() - site.nonzeros for site, names in matrices.items() if site.nonzeros is not None
    }
    modules = {f"{site.module}." if site.module else "" for site in matrices}
    parts = [name for name in tensors if any(_LSTM_PART.fullmatch(name[len(m) :]) for m in modules if name.startswith(m))]
    storages = dict(stored_names(tensors, entries))

    def size(names: Iterable[str]) -> tuple[int, int]:
        unique = {tensors[name].data_ptr(): name for name in names if tensors[name].is_floating_point()}
        count = sum(tensors[name].numel() - zeroed.get(name, 0) for name in unique.values())
        parts = ((tensors[name], storages.get(name)) for name in unique.values())
        return count, sum(stored_bytes(tuple(part.shape), storage, part.element_size()) for part, storage in parts)

    return size(parts), size(tensors)


def _read_safetensors(path: Path) -> Tensors:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SlimLSTMError(f"{path} is no intact safetensors file: {error}") from error
    # The weights file of a folder may be given without the folder.
    for name, value in list(tensors.items()):
        scale = tensors.get(name + SCALE)
        if value.dtype == torch.int8 and scale is not None and scale.shape == value.shape[:1]:
            tensors[name] = from_int8(value, tensors.pop(name + SCALE))
    return tensors


def _read_torch(path: Path) -> Tensors:
    try:
        # What PyTorch warns of, old protocols and TorchScript archives, either works or fails with an error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SlimLSTMError(
            f"{path} holds pickled code, which is not run here; load it where its code is and save "
            f"model.state_dict() instead ({next(iter(str(error).splitlines()), type(error).__name__)})"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler fail in any way
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SlimLSTMError(f"{path} is no intact PyTorch checkpoint: {reason}") from error
    candidates = list(_state_dicts(content, "", set()))
    with_lstm = [(prefix, state) for prefix, state in candidates if find_matrices(state)] or candidates
    if len(with_lstm) == 1:
        return with_lstm[0][1]
    return {prefix + name: tensor for prefix, state in with_lstm for name, tensor in state.items()}


def _state_dicts(content: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensors]]:
    """The dictionaries of tensors in a checkpoint, each once, with the path that leads to it."""
    if not isinstance(content, Mapping) or id(content) in seen:
        return
    seen.add(id(content))
    items = {str(key): value for key, value in cast(Mapping[object, object], content).items()}
    tensors = {key: value for key, value in items.items() if isinstance(value, Tensor)}
    if tensors:
        yield prefix, tensors
    for key, value in items.items():
        yield from _state_dicts(value, f"{prefix}{key}.", seen)
