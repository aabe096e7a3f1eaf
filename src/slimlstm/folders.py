"""Save compressed models as folders of safetensors and ``config.json``; :mod:`slimlstm.loading` loads them.

``config.json`` names the weights files and their SHA-256, and is replaced in one step after they are complete. So at any
moment a folder holds either the old model or the new one.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_as_bytes
from torch import Tensor, nn

from slimlstm.card import write_card
from slimlstm.errors import SlimLSTMError, reason_of, refusing
from slimlstm.files import alone_in, check_regular, path_of, replacing, sha256, write_json
from slimlstm.methods import STORAGES, Encoded, storage_called
from slimlstm.methods.low_bit import pack, unpack
from slimlstm.modules.hosts import check_materialised, find_hosts
from slimlstm.modules.modes import plain_defaults, plain_mode
from slimlstm.modules.sites import Site
from slimlstm.shards import join, split

CONFIG = "config.json"
FORMAT = "slimlstm"
SCALE = ".scale"
"""The ending of the names of scales; the name before it is the name of the codes."""
FORMAT_VERSIONS = (1, 2, 3, 4)
"""The versions that can be read: 1 has no quantised sites, 2 has some, 3 has codes of less than a byte, 4 has several
weights files."""


@plain_mode()
@plain_defaults()
def save(model: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int | None = None) -> None:
    """Write a compressed model to ``folder``; a missing folder is made.

    The folder holds all parameters and persistent buffers; the rank, mask and storage of every compressed site; its origin
    (method, and SHA-256 of the dense matrix); versions; and a model card, ``README.md``. Quantised weights are written as
    codes and scales. A model that slimlstm saved there before is replaced; other files, and a ``README.md`` of your own,
    stay.

    Args:
        model: a compressed model, which does not change.
        folder: the folder to write.
        max_shard_bytes: the largest size of a weights file; None writes one file. Larger tensors are cut along their rows.

    Raises:
        SlimLSTMError: nothing in the model is compressed, its state holds more than tensors, quantised weights have changed
            since they were rounded or are no longer float32, ``folder`` holds another program's ``config.json``, or a row
            of a tensor is larger than ``max_shard_bytes``. Nothing is written then.

    Examples:
        >>> import tempfile, slimlstm
        >>> model, folder = nn.Sequential(nn.LSTM(8, 16)), tempfile.mkdtemp()
        >>> _ = slimlstm.compress_(model, slimlstm.Quantize("int8"))
        >>> save(model, folder)
        >>> sorted(path.suffix for path in Path(folder).iterdir())
        ['.json', '.md', '.safetensors']
    """
    folder = path_of(folder, "folder", "call save(model, folder)")
    check_materialised(model)
    hosts = find_hosts(model)
    sites = {
        site.key: site_entry(site, host.origin(site.name), host.matrix(site.name).dtype)
        for host in hosts
        for site in host.sites()
        if site.rank is not None or site.nonzeros is not None or site.storage is not None
    }
    problem = next((site.problem for host in hosts for site in host.sites() if site.key in sites and site.problem), None)
    if problem is not None:
        raise SlimLSTMError(f"the model cannot be saved: {problem}")
    if not sites:
        raise SlimLSTMError(
            "nothing in the model is compressed; call compress_ first. If its report says that nothing became smaller, "
            "compress more, or save model.state_dict() by torch.save"
        )
    write_folder(folder, model.state_dict(), sites, max_shard_bytes)


def site_entry(site: Site, provenance: Mapping[str, str], dtype: torch.dtype) -> dict[str, Any]:
    """Return the entry of a compressed site in ``config.json``."""
    amounts = {"rank": site.rank, "kept": site.nonzeros, "storage": site.storage}
    known = {name: amount for name, amount in amounts.items() if amount is not None}
    return {"shape": list(site.shape), "dtype": str(dtype).removeprefix("torch."), **known, **provenance}


def write_folder(
    folder: Path, state: Mapping[str, Any], sites: Mapping[str, Mapping[str, Any]], max_shard_bytes: int | None = None
) -> None:
    """Write tensors and site entries as a folder that :func:`read_folder` reads; aliases are stored once.

    Args:
        folder: the folder to write; a missing folder is made.
        state: a model's ``state_dict``.
        sites: the entries of its compressed sites by key; see :func:`site_entry`.
        max_shard_bytes: see :func:`save`.

    Raises:
        SlimLSTMError: ``state`` holds more than tensors, or weights that their site's storage cannot hold exactly, or a row
            larger than ``max_shard_bytes``; or ``folder`` holds another program's ``config.json``.
    """
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise SlimLSTMError(f"the model's state holds more than tensors: {', '.join(others)}; it cannot be stored as data")
    _check_storable(cast(Mapping[str, Tensor], state), max_shard_bytes)
    _check_is_ours(folder)
    tensors, aliases = _without_aliases(cast(Mapping[str, Tensor], state))
    tensors, shapes = _packed(tensors, sites)
    shards, cut = split(tensors, max_shard_bytes)
    found = [tensors_as_bytes(shard, metadata={"format": "pt"}) for shard in shards]
    contents = {f"model-{sha256(content)[:16]}.safetensors": content for content in found}
    in_files = len(contents) > 1 or bool(cut)
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": 4 if in_files else 3 if shapes else 2 if any("storage" in site for site in sites.values()) else 1,
        "weights": _weights_field(contents, cut if in_files else None),
        "sites": sites,
        "aliases": aliases,
        "versions": {"slimlstm": version("slimlstm"), "torch": torch.__version__, "python": platform.python_version()},
    }
    if shapes:
        config["packed"] = shapes
    config["sha256"] = _config_sha256(config)
    with alone_in(folder):
        previous = _previous_files(folder)
        for name, content in contents.items():
            with replacing(folder / name) as draft:
                draft.write_bytes(content)
        write_json(folder / CONFIG, config)
        write_card(folder, sites)
        for name in previous - contents.keys():
            (folder / name).unlink(missing_ok=True)


def _weights_field(contents: Mapping[str, bytes], cut: Mapping[str, int] | None) -> dict[str, Any]:
    """Return the field ``weights`` of ``config.json``: one file, or several files and the parts of every cut tensor."""
    digests = {name: sha256(content) for name, content in contents.items()}
    if cut is not None:
        return {"files": digests, "cut": cut}
    ((name, digest),) = digests.items()
    return {"file": name, "sha256": digest}


def weights_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the weights files that a checked ``config.json`` names, with their SHA-256."""
    weights = config["weights"]
    return weights["files"] if "files" in weights else {weights["file"]: weights["sha256"]}


def _previous_files(folder: Path) -> set[str]:
    """Return the names of the weights files of the model in a folder, if its ``config.json`` is intact."""
    try:
        return set(weights_files(read_config(folder)))
    except SlimLSTMError:
        return set()


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``config.json`` and the tensors of a folder, checked against their SHA-256.

    Raises:
        SlimLSTMError: a file is missing, damaged, altered or of a later format.
    """
    with refusing(f"{folder} cannot be read"):
        config = read_config(folder)
        while True:
            try:
                contents = [_content(folder / name, digest) for name, digest in weights_files(config).items()]
                break
            except SlimLSTMError:
                # Another process may have saved a new model meanwhile.
                config, before = read_config(folder), config
                if config == before:
                    raise
        # Parse the bytes that were checked; the files themselves may change meanwhile.
        stored = {name: tensor for content in contents for name, tensor in load_tensors(content).items()}
        tensors = _unpacked(join(stored, config["weights"].get("cut", {})), config, folder)
        for name, original in config["aliases"].items():
            if original not in tensors:
                raise SlimLSTMError(
                    f"{folder / CONFIG} was altered: {name} is another name of {original}, which is in no weights file"
                )
            tensors[name] = tensors[original]
        return config, tensors


def _content(path: Path, digest: str) -> bytes:
    """Return the content of a weights file, checked against its SHA-256."""
    try:
        check_regular(path)
        content = path.read_bytes()
    except (OSError, SlimLSTMError) as error:
        reason = reason_of(error)
        raise SlimLSTMError(
            f"{path.parent} is incomplete: {path.name} cannot be read ({reason}); copy the whole folder"
        ) from error
    if sha256(content) != digest:
        raise SlimLSTMError(f"{path} is damaged or altered: its SHA-256 is not the one in {CONFIG}; copy the folder again")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a folder that :func:`save` wrote.

    Raises:
        SlimLSTMError: the file is missing, damaged, altered, of another program or of a later format.
    """
    try:
        check_regular(folder / CONFIG)
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, SlimLSTMError) as error:
        raise SlimLSTMError(
            f"{folder} holds no compressed model: {CONFIG} cannot be read ({reason_of(error)}); name a folder that "
            "slimlstm saved"
        ) from error
    except ValueError as error:
        raise SlimLSTMError(f"{folder / CONFIG} is damaged: {reason_of(error)}") from error
    with refusing(f"{folder / CONFIG} is damaged"):
        return _checked(json.loads(text), folder)


def _checked(config: Any, folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``config.json`` if slimlstm wrote it, in a known format, and it is intact."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise SlimLSTMError(f"{folder / CONFIG} is not of a model that slimlstm saved; name another folder")
    config = cast(dict[str, Any], config)
    if config.get("format_version") not in FORMAT_VERSIONS:
        reads = ", ".join(map(str, FORMAT_VERSIONS))
        raise SlimLSTMError(
            f"{folder} has format {config.get('format_version')}, this slimlstm reads {reads}; a newer one may read it"
        )
    if config.get("sha256") != _config_sha256(config):
        raise SlimLSTMError(f"{folder / CONFIG} was altered after it was written; save the model again")
    missing = [key for key in ("weights", "sites", "aliases") if not isinstance(config.get(key), dict)]
    if missing:
        raise SlimLSTMError(f"{folder / CONFIG} is damaged: it lacks {', '.join(missing)}; save the model again")
    if not _names_files(config["weights"]):
        raise SlimLSTMError(f"{folder / CONFIG} is damaged: it names no weights file in its folder; save the model again")
    for key, entry in config["sites"].items():
        if not _is_entry(entry):
            raise SlimLSTMError(f"{folder / CONFIG} is damaged: its entry of {key} is {entry!r}; save the model again")
    if not all(isinstance(original, str) for original in config["aliases"].values()):
        raise SlimLSTMError(f"{folder / CONFIG} is damaged: its aliases are no names; save the model again")
    return config


def _names_files(weights: Mapping[str, Any]) -> bool:
    """Return whether the field ``weights`` has one of its two forms, and all its files are in the folder itself."""
    files, cut = weights.get("files", {weights.get("file"): weights.get("sha256")}), weights.get("cut", {})
    if not isinstance(files, dict) or not files or not isinstance(cut, dict):
        return False
    pairs = cast(dict[Any, Any], files).items()
    counts = cast(dict[str, Any], cut).values()
    are_names = all(isinstance(n, str) and n and Path(n).name == n and isinstance(digest, str) for n, digest in pairs)
    return are_names and all(type(count) is int and count > 1 for count in counts)


def _is_entry(entry: Any) -> bool:
    """Return whether a site's entry has the types that :func:`site_entry` gives it."""
    if not isinstance(entry, dict):
        return False
    fields = cast(dict[str, Any], entry)
    shape: Any = fields.get("shape")
    counts = [*shape, *(fields[name] for name in ("rank", "kept") if name in fields)] if isinstance(shape, list) else []
    texts = (fields[name] for name in ("dtype", "storage", "method", "source_sha256") if name in fields)
    return len(counts) >= 2 and all(type(n) is int and n >= 0 for n in counts) and all(isinstance(t, str) for t in texts)


def _packed(
    tensors: Mapping[str, Tensor], sites: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return the tensors, with codes and scales for the weights of quantised sites, and the shapes of packed codes."""
    packed, shapes = dict(tensors), dict[str, list[int]]()
    for name, storage in stored_names(tensors, sites):
        row = storage_called(storage)
        if packed[name].dtype != torch.float32:
            raise SlimLSTMError(
                f"{name} was rounded to {storage}, which stores float32 weights, and then became {packed[name].dtype}; "
                "turn the model back with model.float(), save it, and convert it again after load"
            )
        encoded = row.encode(packed[name])
        if not torch.equal(encoded.decoded(), packed[name]):
            raise SlimLSTMError(
                f"{name} was changed since it was rounded to {storage}, by training or by hand, and would be lost in part; "
                f"round it again, with compress_(model, Quantize({storage!r})), and then save"
            )
        packed[name] = encoded.codes
        if row.bits is not None and row.is_packed:
            shapes[name] = list(encoded.codes.shape)
            packed[name] = pack(encoded.codes, row.bits)
        if encoded.scale is not None:
            packed[name + SCALE] = encoded.scale
    return packed, shapes


def _unpacked(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Return the float32 tensors that :func:`_packed` was given."""
    unpacked = dict(tensors)
    for name, storage in stored_names(tensors, config["sites"]):
        row = STORAGES.get(storage)
        if row is None:
            raise SlimLSTMError(f"{folder} has weights in {storage!r}, an unknown storage; register it by register_storage")
        codes, scale = unpacked[name], unpacked.pop(name + SCALE, None)
        if row.bits is not None and row.is_packed:
            codes = _unpacked_codes(codes, row.bits, config.get("packed", {}).get(name))
        fits = codes is not None and codes.ndim == 2 and codes.dtype == row.dtype
        found = None if scale is None else tuple(scale.shape)
        if codes is None or not fits or found != row.scale_shape(codes.shape[0], codes.shape[1]):
            raise SlimLSTMError(
                f"{folder / CONFIG} says that {name} is stored as {storage!r}, which its tensors are not; save the model "
                "again"
            )
        unpacked[name] = Encoded(codes, scale).decoded()
    return unpacked


def _unpacked_codes(stream: Tensor, bits: int, shape: Any) -> Tensor | None:
    """Return the codes in a stream, or None if the stream does not hold a matrix of this shape."""
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    if not is_shape or stream.dtype != torch.uint8 or stream.shape != (-(-shape[0] * shape[1] * bits // 8),):
        return None
    return unpack(stream, bits, tuple(shape))


def stored_names(tensors: Mapping[str, Tensor], sites: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the names of the tensors of quantised sites, once each, with their storages."""
    found: dict[str, str] = {}
    for key, entry in sites.items():
        if "storage" in entry:
            found.update({name: entry["storage"] for name in _names(key, entry) if name in tensors})
    return list(found.items())


def _names(key: str, entry: Mapping[str, Any]) -> list[str]:
    """Return the names that a compressed site's weights may have in a ``state_dict``, the projection included."""
    module, _, name = key.rpartition(".")
    prefix = f"{module}." if module else ""
    if "rank" in entry:
        names = [f"{key}_u", f"{key}_v"]
    else:
        names = [f"{prefix}parametrizations.{name}.original" if "kept" in entry else key]
    return names + [prefix + name.replace("weight_hh", "weight_hr")] * ("weight_hh" in name)


def _without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return every tensor once, in memory of its own, and the other names of tensors that have several."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        original = names.setdefault(place, name) if tensor.numel() else name
        if original != name:
            aliases[name] = original
        else:
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _check_storable(state: Mapping[str, Tensor], max_shard_bytes: object) -> None:
    """Raise :class:`SlimLSTMError` if safetensors cannot hold a tensor, or the limit on a file is no number of bytes."""
    if max_shard_bytes is not None and type(max_shard_bytes) is not int:
        raise SlimLSTMError(f"max_shard_bytes is a number of bytes, such as 2 * 10**9, not {max_shard_bytes!r}")
    for dtype, name in {tensor.dtype: name for name, tensor in state.items()}.items():
        try:
            tensors_as_bytes({name: torch.empty(0, dtype=dtype)})
        except (KeyError, SafetensorError) as error:
            raise SlimLSTMError(
                f"{name} is {dtype}, which safetensors files cannot hold; convert it, for example with torch.view_as_real"
            ) from error


def _check_is_ours(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SlimLSTMError(f"{folder} is a file; name a folder")
    if (folder / CONFIG).exists():
        try:
            ours = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("format") == FORMAT
        except (ValueError, AttributeError, OSError):
            ours = False
        if not ours:
            raise SlimLSTMError(f"{folder} holds a {CONFIG} of something else, which would be lost; name another folder")


def _config_sha256(config: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key != "sha256"}
    return sha256(json.dumps(rest, sort_keys=True).encode())
