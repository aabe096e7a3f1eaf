"""Norms and spectra of one model's matrices, and the claims about them."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from paper.methods import MASKING, PAPER
from paper.page.results import Result, marked
from paper.page.sources import TARGETS, Sources
from paper.page.tables import verdict
from paper.plots import norm_curves, spectra

SYMBOLS = {"l1": "‖W‖₁", "l1_std": "σ(‖W‖₁)", "nuclear": "‖W‖_Nuc"}
NEARLY_TWICE = (1.5, 2.5)
"""The ratios of nuclear norms that count as "about twice"."""


class NormResults:
    """Measurements by ``recipes/norms.py`` of one model."""

    def __init__(self, key: str, name: str, measured: Result, sources: Sources) -> None:
        self.key, self.name, self.measured, self.sources = key, name, measured, sources
        self._rows: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        for row in measured["rows"]:
            self._rows.setdefault((row["method"], row["target"], row["rank"]), []).append(row)
        self.ranks = sorted({rank for _, _, rank in self._rows if rank})

    def _mean(self, name: str, method: str, target: str, rank: int = 0) -> float:
        """Return the mean of a norm over the layers."""
        return statistics.mean(row[name] for row in self._rows[method, target, rank])

    def _curve(self, name: str, method: str, target: str) -> list[tuple[int, float]]:
        ranks = [rank for rank in self.ranks if (method, target, rank) in self._rows]
        return [(rank, self._mean(name, method, target, rank)) for rank in ranks]

    def write(self) -> None:
        """Draw norms and spectra."""
        titles = {f"{symbol} of {target}": (name, target) for name, symbol in SYMBOLS.items() for target in ("ih", "hh")}
        panels = {
            title: {method: self._curve(name, method, target) for method in PAPER}
            for title, (name, target) in titles.items()
        }
        dense = {title: self._mean(name, "dense", target) for title, (name, target) in titles.items()}
        self.sources.draw(norm_curves, f"{self.key}-norms", panels, dense)
        found = self.measured["spectra"]
        values = {target: [one["singular_values"] for one in found if one["target"] == target] for target in TARGETS}
        self.sources.draw(spectra, f"{self.key}-spectra", values)

    def spread(self) -> str:
        """Return the verdict on σ(‖W‖₁) at the smallest rank."""
        smallest = self.ranks[0]
        at = {
            (method, target): self._mean("l1_std", method, target, smallest)
            for method, target in itertools.product(PAPER, TARGETS)
        }
        dense = {target: self._mean("l1_std", "dense", target) for target in TARGETS}
        right = [(value < dense[target]) == (method in MASKING) for (method, target), value in at.items()]
        numbers = "; ".join(
            f"{target}: dense {dense[target]:.3g}, " + ", ".join(f"{method} {at[method, target]:.3g}" for method in PAPER)
            for target in TARGETS
        )
        return f"{verdict(right)}; r = {smallest}, {numbers}"

    def nuclear(self) -> str:
        """Return the verdict on the nuclear norms of ih and hh."""
        smallest, (least, most) = self.ranks[0], NEARLY_TWICE
        sums = {target: [row["nuclear"] for row in self._rows["dense", target, 0]] for target in TARGETS}
        ratios = [ih / hh for ih, hh in zip(sums["ih"], sums["hh"], strict=True)]
        held = {
            target: statistics.mean(e["energy"][str(smallest)] for e in self.measured["spectra"] if e["target"] == target)
            for target in TARGETS
        }
        outcome = verdict([least <= ratio <= most for ratio in ratios])
        return (
            f"{outcome}; ratios {', '.join(f'{ratio:.2f}' for ratio in ratios)}, of their sums "
            f"{sum(sums['ih']) / sum(sums['hh']):.2f}; rank {smallest} holds of ‖W‖_F² on average {held['hh']:.1%} (hh) "
            f"and {held['ih']:.1%} (ih)"
        )

    def section(self) -> str:
        """Return the pictures."""
        link = f"{self.sources.link}/{self.key}"
        return f"""## {marked(f"Norms and spectra, {self.name}", self.measured)}

Means over the layers; σ is the standard deviation of the column sums. The paper prints it without 1/n and root, as
`l1_spread` in `results/`; the scale of its axes is not known.

![Norms against rank]({link}-norms.png)

![Singular values, and the energy that they hold, against rank]({link}-spectra.png)"""
