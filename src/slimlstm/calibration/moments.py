"""Second moments of the inputs of recurrent matrices, and of the loss's gradients at their gates.

For a matrix W [m, n] with inputs z and gradients δ at the gates' pre-activations, the moments are A = E[z zᵀ] and
G = E[δ δᵀ]. If W' replaces W, the loss rises by about ½ tr((W - W')ᵀ G (W - W') A) a row. This is the Fisher information
(with observed labels, the empirical Fisher information), with inputs and gradients assumed independent of each other
(Martens and Grosse 2015), and time steps too (Martens, Ba and Johnson 2018).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimlstm.errors import SlimLSTMError, refusing
from slimlstm.files import check_regular, replacing, sha256
from slimlstm.modules.modes import plain_mode

_FORMAT = "calibration 2"


@dataclass(frozen=True)
class Moments:
    """Moments at one matrix [m, n], in float64.

    Attributes:
        inputs: E[z zᵀ] [n, n] over the rows. A row is a pair of time step and sequence.
        gradients: E[δ δᵀ] [m, m], where δ is the gradient of the sum of losses; None without a loss.
        rows: the number of rows that count. With a loss, rows that receive no gradient, such as padding, do not.
        effective_rows: (Σ ‖δ‖²)² / Σ ‖δ‖⁴. As many rows with equally large gradients hold as much information. None without
            a loss.

    Examples:
        >>> moments = Moments(torch.eye(3), None, rows=100)
        >>> moments.loss_of(torch.ones(2, 3))
        3.0
    """

    inputs: Tensor
    gradients: Tensor | None
    rows: int
    effective_rows: float | None = None

    def loss_of(self, difference: Tensor) -> float:
        """Return ½ tr(Δᵀ G Δ A) for Δ [m, n], the predicted rise of the sum of losses per row; without a loss, G = I."""
        inputs = difference @ self.inputs.to(difference)
        gradients = difference if self.gradients is None else self.gradients.to(difference) @ difference
        return 0.5 * float((gradients * inputs).sum())

    def fit(self, shape: tuple[int, int]) -> bool:
        """Return whether a matrix of this shape can have these moments."""
        m, n = shape
        return len(self.inputs) == n and (self.gradients is None or len(self.gradients) == m)

    @classmethod
    def together(cls, several: Sequence[Moments]) -> Moments:
        """Pool the moments of the matrices that share one parameter, weighted by their rows.

        Examples:
            >>> one, other = Moments(torch.eye(1), None, 10), Moments(3 * torch.eye(1), None, 30)
            >>> float(Moments.together([one, other]).inputs)
            2.5
        """
        if len(several) == 1:
            return several[0]
        rows = sum(one.rows for one in several)
        inputs = sum((one.inputs * (one.rows / rows) for one in several[1:]), several[0].inputs * (several[0].rows / rows))
        weighted = [one.gradients * (one.rows / rows) for one in several if one.gradients is not None]
        effective = [one.effective_rows for one in several if one.effective_rows is not None]
        return cls(
            inputs,
            torch.stack(weighted).sum(0) if len(weighted) == len(several) else None,
            rows,
            sum(effective) if len(effective) == len(several) else None,
        )


@dataclass(frozen=True)
class Calibration:
    """Moments of every site that the batches reached.

    Attributes:
        sites: the moments by the sites' keys.
        loss: the mean loss over ``predictions``; None without a loss.
        predictions: the number of losses; 0 without a loss.
        is_scaled: False where the loss of a batch was a single mean. Losses predicted from the moments are then right only
            up to a common factor.

    Examples:
        >>> import tempfile
        >>> calibration = Calibration({"lstm.weight_hh_l0": Moments(torch.eye(3), None, 7)}, None, 0, True)
        >>> calibration.save(f"{tempfile.gettempdir()}/moments.safetensors")
        >>> Calibration.load(f"{tempfile.gettempdir()}/moments.safetensors").sites["lstm.weight_hh_l0"].rows
        7
    """

    sites: dict[str, Moments]
    loss: float | None
    predictions: int
    is_scaled: bool

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; missing folders are made."""
        tensors: dict[str, Tensor] = {}
        entries: dict[str, dict[str, Any]] = {}
        names: dict[int, str] = {}
        for key, moments in self.sites.items():
            tensors[f"{key}:inputs"] = moments.inputs.cpu().contiguous()
            entries[key] = {"rows": moments.rows, "effective_rows": moments.effective_rows}
            if moments.gradients is not None:
                # ih and hh of one direction share their gradients.
                name = names.setdefault(id(moments.gradients), f"{key}:gradients")
                tensors[name] = moments.gradients.cpu().contiguous()
                entries[key]["gradients"] = name
        header = {"loss": self.loss, "predictions": self.predictions, "is_scaled": self.is_scaled, "sites": entries}
        text = json.dumps(header)
        with replacing(path) as draft:
            save_file(tensors, draft, {"slimlstm": _FORMAT, "header": text, "sha256": _digest(text, tensors)})

    @classmethod
    @plain_mode()
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that :meth:`save` wrote.

        Raises:
            SlimLSTMError: the file is missing or damaged, or is no calibration.
        """
        check_regular(path)
        with refusing(f"{path} is no intact calibration file, so calibrate again"):
            with safe_open(path, "pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            if metadata.get("slimlstm") != _FORMAT:
                raise SlimLSTMError(f"{path} holds no calibration that this slimlstm can read; calibrate again")
            if metadata["sha256"] != _digest(metadata["header"], tensors):
                raise SlimLSTMError(f"{path} is damaged: its SHA-256 is not the one written into it; calibrate again")
            return _parsed(json.loads(metadata["header"]), tensors)


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a header and of tensors with their names."""
    parts = [sha256(part) for name in sorted(tensors) for part in (name.encode(), tensors[name].numpy().tobytes())]
    return sha256("\n".join([sha256(header.encode()), *parts]).encode())


def _parsed(header: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    sites = {
        key: Moments(
            tensors[f"{key}:inputs"],
            tensors[entry["gradients"]] if "gradients" in entry else None,
            entry["rows"],
            entry.get("effective_rows"),
        )
        for key, entry in header["sites"].items()
    }
    found = Calibration(sites, header["loss"], header["predictions"], header["is_scaled"])
    if not all(_is_square(part) for one in sites.values() for part in (one.inputs, one.gradients)):
        raise ValueError("its moments are no square matrices of numbers")
    numbers = [found.predictions, *(one.rows for one in sites.values())]
    shares = [found.loss, *(one.effective_rows for one in sites.values())]
    if not all(type(number) is int for number in numbers) or not all(isinstance(share, float | None) for share in shares):
        raise ValueError("its counts are no numbers")
    return found


def _is_square(moments: Tensor | None) -> bool:
    return moments is None or (moments.is_floating_point() and moments.ndim == 2 and len(moments) == moments.shape[1])
