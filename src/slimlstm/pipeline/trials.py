"""Trials of a search, as a report shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tried(Protocol):
    """A model that was measured."""

    @property
    def label(self) -> str:
        """A short name, such as ``"svd int8 keep 0.5"``."""
        ...

    @property
    def bytes(self) -> int:
        """The bytes of the model, or of its LSTMs."""
        ...

    @property
    def metric(self) -> float:
        """The user's measure."""
        ...

    @property
    def latency(self) -> float | None:
        """Seconds for one call; None where it was not timed."""
        ...

    @property
    def accepted(self) -> bool:
        """Whether it is within the limit."""
        ...


class Trials(Protocol):
    """The result of a search: every model that was tried, and the best one."""

    @property
    def dense(self) -> Tried:
        """The model as it was."""
        ...

    @property
    def trials(self) -> Sequence[Tried]:
        """Every model that was tried, in the order of the search; the dense one may be among them."""
        ...

    @property
    def best(self) -> Tried | None:
        """The chosen model; None where no model is within the limit."""
        ...

    @property
    def limit(self) -> str:
        """The limit in words; empty without a limit."""
        ...

    @property
    def worst(self) -> float | None:
        """The worst metric that is accepted; None where the limit is not on the metric."""
        ...

    @property
    def metric_name(self) -> str:
        """The name of the metric."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher metric is better."""
        ...
