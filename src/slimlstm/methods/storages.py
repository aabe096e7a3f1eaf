"""The table of storages. A new storage is one row, which says how to encode a weight as codes and scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import low_bit

# int8 scales have 17 significant bits, so that their products with integers of 7 bits are exact in float32.
_FREE_BITS = 0x7F


@dataclass(frozen=True)
class Encoded:
    """A weight [m, n] as ``codes`` [m, n] times ``scale``: one for each row [m], one for each group of a row [m, g], or
    None for no scale."""

    codes: Tensor
    scale: Tensor | None = None

    def decoded(self) -> Tensor:
        """Return the float32 weight [m, n]."""
        if self.scale is None:
            return self.codes.float()
        if self.scale.ndim == 1:
            return self.codes * self.scale[:, None]
        return self.codes * low_bit.spread(self.scale.float(), self.codes.shape[1])


@dataclass(frozen=True)
class Storage:
    """Number format of a stored matrix, or of its factors.

    Attributes:
        encode: takes a float32 weight [m, n]; returns its codes and scales. Encoding a decoded weight must return the same
            values.
        dtype: the dtype of the codes in memory.
        scales: ``"none"``, ``"row"`` (one float32 scale a row) or ``"group"`` (one float16 scale for 64 weights of a row).
        bits: the bits of a code in a file; None for all bits of ``dtype``.
        kernel_format: the format in which the fused kernel keeps such a weight: "float32", "bfloat16" or "int8". It must
            hold the decoded weight exactly.

    Examples:
        Half precision is one row::

            slimlstm.register_storage("float16", Storage(lambda weight: Encoded(weight.half()), torch.float16))
    """

    encode: Callable[[Tensor], Encoded]
    dtype: torch.dtype
    scales: Literal["none", "row", "group"] = "none"
    bits: int | None = None
    kernel_format: str = "float32"

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a weight of this shape in a file, scales included."""
        rows, columns = shape[0], math.prod(shape[1:])
        codes = math.ceil(rows * columns * (self.bits or 8 * self.dtype.itemsize) / 8)
        return codes + self._scale_bytes(rows, columns)

    def _scale_bytes(self, rows: int, columns: int) -> int:
        return {"none": 0, "row": 4 * rows, "group": 2 * rows * math.ceil(columns / low_bit.GROUP)}[self.scales]

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """Return the shape of the scales of a weight [rows, columns], or None for no scales."""
        shapes = {"none": None, "row": (rows,), "group": (rows, math.ceil(columns / low_bit.GROUP))}
        return shapes[self.scales]

    @property
    def is_packed(self) -> bool:
        """Whether codes take fewer bits in a file than in memory."""
        return self.bits is not None and self.bits < 8 * self.dtype.itemsize


def to_int8(weight: Tensor) -> Encoded:
    """Return integers from -127 to 127 and a scale for every row of a float32 weight [m, n].

    A row that holds NaN or infinite numbers gets a scale that is not finite, and decodes to NaN. A row whose largest
    magnitude is below 1.5e-36 becomes zero.

    Examples:
        >>> encoded = to_int8(torch.tensor([[127.0, -63.6]]))
        >>> encoded.codes.tolist(), encoded.scale.tolist()
        ([[127, -64]], [1.0])
    """
    scale = weight.abs().amax(dim=1) / 127
    scale = (scale.view(torch.int32) & ~_FREE_BITS).view(torch.float32)
    # Products with denormal scales would not be exact.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    return Encoded((weight / torch.where(scale > 0, scale, 1.0)[:, None]).round().to(torch.int8), scale)


def _low_bit(bits: int) -> Storage:
    def encode(weight: Tensor) -> Encoded:
        return Encoded(*low_bit.encode_groups(weight, bits))

    return Storage(encode, torch.int8, "group", bits, kernel_format="int8")


STORAGES: dict[str, Storage] = {
    "float32": Storage(Encoded, torch.float32),
    "bfloat16": Storage(lambda weight: Encoded(weight.bfloat16()), torch.bfloat16, kernel_format="bfloat16"),
    "int8": Storage(to_int8, torch.int8, "row", kernel_format="int8"),
    **{f"int{bits}": _low_bit(bits) for bits in (6, 5, 4, 3)},
}
"""Every storage by name; add a row by :func:`register_storage`."""

KERNEL_FORMATS = ("float32", "bfloat16", "int8")
"""Weight formats that the fused kernel reads."""


def register_storage(name: str, storage: Storage) -> None:
    """Add a row to the table of storages, for configurations, plans, files and the command.

    Raises:
        SlimLSTMError: the name is taken or no non-empty string, or the kernel has no such format.

    Examples:
        >>> register_storage("int8", STORAGES["int8"])
        Traceback (most recent call last):
        slimlstm.errors.SlimLSTMError: a storage called 'int8' exists already; choose another name
    """
    if type(name) is not str or not name:
        raise SlimLSTMError(f"a storage's name is a non-empty string, not {name!r}")
    if name in STORAGES:
        raise SlimLSTMError(f"a storage called {name!r} exists already; choose another name")
    if storage.kernel_format not in KERNEL_FORMATS:
        raise SlimLSTMError(f"the kernel's formats are {', '.join(KERNEL_FORMATS)}, not {storage.kernel_format!r}")
    STORAGES[name] = storage


def storage_called(name: object) -> Storage:
    """Return the row of a storage.

    Raises:
        SlimLSTMError: no storage has that name.

    Examples:
        >>> storage_called("int8").bytes((400, 100))
        41600
    """
    found = STORAGES.get(name) if isinstance(name, str) else None
    if found is None:
        raise SlimLSTMError(f"no storage is called {name!r}; the storages are {', '.join(map(repr, STORAGES))}")
    return found


def rounded(weight: Tensor, storage: str) -> Tensor:
    """Return the float32 weight [m, n] with the numbers that ``storage`` can hold; rounding again changes no bit.

    Raises:
        SlimLSTMError: no storage has that name, the weight is not float32, or its numbers are too large for the storage.

    Examples:
        >>> rounded(torch.tensor([[1.0, 1.001]]), "bfloat16")
        tensor([[1., 1.]])
    """
    row = storage_called(storage)
    if storage == "float32":
        return weight
    if weight.dtype != torch.float32:
        raise SlimLSTMError(f"only float32 weights can be kept in {storage}, not {weight.dtype}; convert the model first")
    found = row.encode(weight).decoded()
    if not bool(torch.isfinite(found).all()) and bool(torch.isfinite(weight).all()):
        raise SlimLSTMError(
            f"weights of up to {float(weight.abs().max()):.3g} are too large for {storage}; use 'int8' or 'bfloat16', or "
            "train with weight decay or clipping"
        )
    return found


def stored_bytes(shape: tuple[int, ...], storage: str | None, itemsize: int) -> int:
    """Return the bytes of a weight in ``storage``; where that is None, ``itemsize`` bytes for each number."""
    return math.prod(shape) * itemsize if storage is None else storage_called(storage).bytes(shape)


def matrix_bytes(shape: tuple[int, int], rank: int | None, storage: str | None, itemsize: int) -> int:
    """Return :func:`stored_bytes` of a matrix [m, n], or of its factors of a rank.

    Examples:
        >>> matrix_bytes((400, 100), rank=10, storage="int8", itemsize=4)
        6640
    """
    m, n = shape
    shapes = [shape] if rank is None else [(m, rank), (rank, n)]
    return sum(stored_bytes(part, storage, itemsize) for part in shapes)
