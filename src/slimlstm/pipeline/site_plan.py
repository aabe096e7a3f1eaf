"""Planned compression of one site."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import DENSE, METHODS, Needs, factoring_methods, matrix_bytes, storage_called
from slimlstm.modules.sites import Site


@dataclass(frozen=True)
class SitePlan:
    """Planned compression of one site.

    Attributes:
        method: a key of :data:`slimlstm.methods.METHODS`, or ``"dense"``, which leaves the matrix as it is.
        rank: the rank of the factors, for factoring methods.
        nonzeros: the number of weights that stay, for masking methods.
        note: why the site is treated differently from its configuration.
        storage: the storage to round the weights to. None leaves the storage as it is; new factors are then float32.

    Raises:
        SlimLSTMError: an unknown method or storage, or a missing rank or number of nonzeros.

    Examples:
        >>> print(SitePlan("svd", rank=8, storage="int8"))
        svd int8 rank 8
    """

    method: str
    rank: int | None = None
    nonzeros: int | None = None
    note: str = ""
    storage: str | None = None

    def __post_init__(self) -> None:
        if self.storage is not None:
            storage_called(self.storage)
        if not isinstance(cast(object, self.method), str):
            raise SlimLSTMError(f"the method of a site's plan is a name, such as 'svd', not {self.method!r}")
        amount = True if self.method == DENSE else self.nonzeros if self.makes_mask else self.rank
        unused = (
            self.rank if self.makes_mask or self.method == DENSE else None,
            None if self.makes_mask else self.nonzeros,
        )
        if self.method not in (*METHODS, DENSE) or amount is None or unused != (None, None):
            factoring = factoring_methods()
            masking = [name for name in METHODS if name not in factoring]
            raise SlimLSTMError(
                f"{self} is no plan for a site: {', '.join(map(repr, factoring))} need a rank, "
                f"{', '.join(map(repr, masking))} nonzeros, {DENSE!r} nothing, and none takes more"
            )

    @property
    def makes_mask(self) -> bool:
        """Whether the method makes a mask."""
        return self.method in METHODS and METHODS[self.method].makes_mask

    @property
    def is_calibrated(self) -> bool:
        """Whether the method needs moments."""
        return self.method in METHODS and METHODS[self.method].needs > Needs.NOTHING

    def __str__(self) -> str:
        if self.method == DENSE:
            amount = self.note
        elif self.makes_mask:
            amount = f"{self.nonzeros:,} weights" if self.nonzeros else ""
        else:
            amount = f"rank {self.rank}"
        return " ".join(part for part in (self.method, self.storage, amount) if part)

    def storage_of(self, site: Site) -> str | None:
        """Return the site's storage afterwards, or None where that is the matrix's own dtype."""
        kept = site.storage if self.rank is None else None
        storage = self.storage or kept
        return None if storage == "float32" else storage

    def bytes_at(self, site: Site) -> int:
        """Return the bytes of a float32 site afterwards."""
        return matrix_bytes(site.shape, site.rank if self.rank is None else self.rank, self.storage_of(site), 4)

    def fitted_to(self, site: Site) -> SitePlan:
        """Return the plan without steps that would save no bytes at this site; its note names them."""
        storage = self.storage_of(site)
        bytes_before, bytes_after = matrix_bytes(site.shape, site.rank, site.storage, 4), self.bytes_at(site)
        if site.storage is None:
            if self.rank is not None or storage is None or bytes_after < bytes_before:
                return self
            return replace(self, storage=None, note=self._noted(f"{storage} would take no fewer bytes"))
        if self.storage is None and storage == site.storage:
            return self
        name = storage or "float32"
        if self.rank is not None and bytes_after >= bytes_before:
            note = f"{name} factors of rank {self.rank} take no fewer bytes than {site.storage} does now"
            return SitePlan(DENSE, note=note)
        note = f"already {storage}" if storage == site.storage else f"{name}, was {site.storage}"
        return self if note in self.note else replace(self, note=self._noted(note))

    def _noted(self, note: str) -> str:
        return "; ".join(filter(None, (self.note, note)))
