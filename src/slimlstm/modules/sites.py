"""A *site*: one recurrent matrix of one layer and direction of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

SITE_NAME = re.compile(r"weight_(ih|hh)(?:_l(\d+)(_reverse)?)?")


@dataclass(frozen=True)
class Site:
    """One recurrent matrix of a model.

    Attributes:
        module: dotted path of the module that holds it, "" for the model itself. Of a shared module, the first path.
        name: the parameter's name in ``nn.LSTM`` (or ``nn.LSTMCell``), such as ``"weight_hh_l0_reverse"``.
        shape: (m, n) = (4H, I) for ih, (4H, H or P) for hh.
        rank: the rank of the factors it is kept as, None where it is dense.
        nonzeros: how many weights a mask leaves, None where there is no mask.
        problem: why it cannot be compressed, in words; None where it can.
        storage: ``"bfloat16"`` or ``"int8"`` where the kernel keeps it so, None where it is as it was trained.
    """

    module: str
    name: str
    shape: tuple[int, int]
    rank: int | None = None
    nonzeros: int | None = None
    problem: str | None = None
    storage: str | None = None

    @property
    def key(self) -> str:
        """What plans and reports call it: path and name, joined by a dot."""
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
        """How many numbers stand for the matrix now: factors, weights a mask leaves, or all of them."""
        m, n = self.shape
        if self.rank is not None:
            return self.rank * (m + n)
        return m * n if self.nonzeros is None else self.nonzeros
