"""The course of a training run: recorded while it runs, and returned when it ends."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class History:
    """The course of a finished training run.

    Attributes:
        losses: the loss of every step, the mean over all processes.
        validations: pairs of a number of steps and the value that ``validate`` returned after them; the first pair is the
            model before training.
        best_step: the number of steps after which the model had its present weights.
        seconds: wall-clock time; a resumed run includes its earlier parts.
        stopped: why the run ended: ``"steps"``, ``"minutes"`` or ``"patience"``.

    Examples:
        >>> history = History([0.5, 0.4], [(0, 0.6), (2, 0.3)], best_step=2, seconds=1.5, stopped="steps")
        >>> history.steps
        2
    """

    losses: list[float]
    validations: list[tuple[int, float]]
    best_step: int
    seconds: float
    stopped: str

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """Return the history as JSON types."""
        return asdict(self) | {"steps": self.steps, "validations": [list(entry) for entry in self.validations]}


@dataclass
class RunRecord:
    """The course of a run so far; checkpoints hold every field.

    Attributes:
        epoch: the current epoch, from 0.
        position: the number of steps taken in this epoch.
        mark: the number of the last validation point that was passed, from 0; -1 before the first. Validation points divide
            the budget evenly.
        best_step: the number of steps after which ``best_value`` was found.
        best_value: the lowest value that ``validate`` has returned.
        seconds: wall-clock time, earlier parts of a resumed run included.
        seconds_to_validate: how long the first validation took.
        stopped: why the run ended; empty while it goes on.
        losses, validations: see :class:`History`.
    """

    epoch: int = 0
    position: int = 0
    mark: int = -1
    best_step: int = 0
    best_value: float = math.inf
    seconds: float = 0.0
    seconds_to_validate: float = 0.0
    stopped: str = ""
    losses: list[float] = field(default_factory=list[float])
    validations: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])

    @property
    def step(self) -> int:
        """The number of steps so far."""
        return len(self.losses)

    def history(self, *, has_best_weights: bool) -> History:
        """Return the finished run's history.

        Args:
            has_best_weights: whether the model has the best weights rather than the last ones.
        """
        best_step = self.best_step if has_best_weights else self.step
        return History(self.losses, self.validations, best_step, self.seconds, self.stopped)
