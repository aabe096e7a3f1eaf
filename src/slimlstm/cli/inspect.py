"""``slimlstm inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimlstm.cli.options import InputFile, Json, Part
from slimlstm.cli.output import show, sketch
from slimlstm.progress import shown

if TYPE_CHECKING:
    from rich.table import Table

_ENERGIES = (0.5, 0.9, 0.99)


def command(
    file: InputFile,
    part: Part = None,
    as_json: Json = False,
) -> None:
    """List the LSTM matrices of a file or a folder.

    Print shapes, break-even ranks, and how fast the singular values fall.
    """
    from slimlstm.weight_files import find_matrices, read_weights
    from slimlstm.weight_files.check import check_holds_lstm

    tensors, readings = read_weights(file, part)
    matrices = find_matrices(tensors)
    check_holds_lstm(file, matrices)
    entries, storages = list[dict[str, Any]](), _storages(file)
    with shown("singular values") as progress:
        for index, (site, names) in enumerate(matrices.items()):
            progress(site.key, index / len(matrices))
            entries.append(_entry(site, names, tensors) | {"storage": storages.get(site.key)})
    in_matrices, total = _counts(file, matrices, entries, tensors)
    notes = (
        "Factors of a rank below break-even are smaller than the matrix. The ranks under 50%, 90% and 99% preserve that "
        "part of the energy, the sum of squared singular values. "
        f"These matrices hold {in_matrices:,} of the file's {total:,} numbers ({in_matrices / total:.0%})."
    )
    size = _bytes(file)
    notes += f" The file has {size:,} bytes."
    result = {
        "file": str(file),
        "sites": entries,
        "parameters": in_matrices,
        "total": total,
        "bytes": size,
        "notes": readings,
    }
    show(result, as_json, _table(entries), notes, *readings)


def _storages(file: Path) -> dict[str, str]:
    """Return the storages of the matrices of a compressed folder, by their keys."""
    from slimlstm.folders import CONFIG, read_config

    sites = read_config(file)["sites"] if (file / CONFIG).exists() else {}
    return {key: entry["storage"] for key, entry in sites.items()}


def _counts(file: Path, matrices: Any, entries: list[dict[str, Any]], tensors: Any) -> tuple[int, int]:
    """Return how many numbers the recurrent matrices hold, and the whole file; shared tensors count once."""
    by_content = {
        _contents(names, tensors): entry["parameters"] for names, entry in zip(matrices.values(), entries, strict=True)
    }
    if file.suffix.lower() == ".onnx":
        from slimlstm.onnx.reading import read_model
        from slimlstm.onnx.sizes import count_numbers

        # Reading an ONNX file returns every LSTM's own copy of weights that the file holds once.
        return sum(by_content.values()), count_numbers(read_model(file))
    shared = {(tensor.data_ptr(), tuple(tensor.shape)): tensor.numel() for tensor in tensors.values()}
    places = {tuple(tensors[name].data_ptr() for name in names): _contents(names, tensors) for names in matrices.values()}
    in_matrices = sum(by_content[content] for content in places.values())
    return in_matrices, sum(shared.values())


def _bytes(file: Path) -> int:
    """Return the bytes of a file or folder, with the files in which an ONNX file stores its weights."""
    if file.suffix.lower() == ".onnx":
        from slimlstm.onnx.reading import bytes_on_disk

        return bytes_on_disk(file)
    return file.stat().st_size if file.is_file() else sum(path.stat().st_size for path in file.glob("*.safetensors"))


def _contents(names: tuple[str, ...], tensors: Any) -> tuple[str, ...]:
    from slimlstm.methods import sha256_of

    return tuple(sha256_of(tensors[name]) for name in names)


def _entry(site: Any, names: tuple[str, ...], tensors: Any) -> dict[str, Any]:
    from slimlstm.methods import break_even_rank, rank_for_energy, singular_values
    from slimlstm.weight_files import matrix_of

    values = singular_values(matrix_of(names, tensors).float())
    return {
        "site": site.key,
        "shape": list(site.shape),
        "rank": site.rank,
        "parameters": site.parameters,
        "break_even_rank": break_even_rank(site.shape),
        "energy_ranks": {str(energy): rank_for_energy(values, energy) for energy in _ENERGIES},
        "singular_values": [round(value, 6) for value in values.tolist()],
    }


def _table(entries: list[dict[str, Any]]) -> Table:
    from slimlstm.tables import new_table

    energies = [f"{energy:.0%}" for energy in _ENERGIES]
    storages = [entry["storage"] for entry in entries]
    column = ["storage"] if any(storages) else []
    table = new_table(["site"], ["shape", *column, "rank", "break-\neven", *energies, "singular\nvalues"])
    for entry in entries:
        rows, columns = entry["shape"]
        table.add_row(
            entry["site"],
            f"{rows} x {columns}",
            *(entry["storage"] or "-" for _ in column),
            "full" if entry["rank"] is None else str(entry["rank"]),
            f"{entry['break_even_rank']:.1f}",
            *map(str, entry["energy_ranks"].values()),
            sketch(entry["singular_values"]),
        )
    return table
