"""A *site*: one recurrent matrix of one layer and direction of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

SITE_NAME = re.compile(r"weight_(ih|hh)(?:_l(\d+)(_reverse)?)?")
"""The names that PyTorch gives to the recurrent matrices of LSTMs and cells."""


@dataclass(frozen=True)
class Site:
    """One recurrent matrix of a model.

    Attributes:
        module: the dotted path of the module that holds it, "" for the model itself; the first path of a shared module.
        name: the parameter's name in ``nn.LSTM`` or ``nn.LSTMCell``, such as ``"weight_hh_l0_reverse"``.
        shape: (m, n) = (4H, I) for ih, (4H, H) or (4H, P) for hh.
        rank: the rank of its factors, or None for a dense matrix.
        nonzeros: the number of weights that its mask leaves, or None without a mask.
        problem: why it cannot be compressed, or None.
        storage: the storage of its numbers, such as ``"int8"``, or None for the model's own dtype.
        method: the method that made its factors or its mask, or None where that is unknown. Comparisons ignore it.
        stored_itemsize: the bytes of each number where a file holds another dtype than it computes in, or None.

    Examples:
        >>> site = Site("encoder", "weight_hh_l1_reverse", (16, 4), rank=2)
        >>> site.key, site.target, site.layer, site.reverse, site.parameters
        ('encoder.weight_hh_l1_reverse', 'hh', 1, True, 40)
    """

    module: str
    name: str
    shape: tuple[int, int]
    rank: int | None = None
    nonzeros: int | None = None
    problem: str | None = None
    storage: str | None = None
    method: str | None = field(default=None, compare=False)
    stored_itemsize: int | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """The site's name in plans and reports: path and name, joined by a dot."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @property
    def target(self) -> Literal["ih", "hh"]:
        """``"ih"`` or ``"hh"``."""
        return "ih" if self.name.startswith("weight_ih") else "hh"

    @property
    def layer(self) -> int:
        """The layer within its module, 0 for a cell."""
        match = SITE_NAME.fullmatch(self.name)
        return int(match.group(2) or 0) if match else 0

    @property
    def reverse(self) -> bool:
        """Whether it belongs to the backward direction."""
        return self.name.endswith("_reverse")

    @property
    def parameters(self) -> int:
        """The number of parameters of the matrix in its present form: as factors, under a mask, or dense."""
        m, n = self.shape
        if self.rank is not None:
            return self.rank * (m + n)
        return m * n if self.nonzeros is None else self.nonzeros
