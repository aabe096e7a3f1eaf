"""Compute recurrent weights that a file holds in parts: pruned, in weight norm or in spectral norm.

PyTorch's training aids keep a weight in several tensors, and compute it before every call. Each known set of parts has a
row in :data:`SCHEMES`. Any other tensor that carries the name of a recurrent weight is refused, because code that is not in
the file would compute the weight from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slimlstm.errors import SlimLSTMError

_NAME = re.compile(
    r"(?P<module>.*?)(?P<within>parametrizations\.)?"
    r"(?P<weight>(?:weight|bias)_(?:ih|hh|hr)(?:_l\d+(?:_reverse)?)?)(?P<part>(?![a-zA-Z0-9]).*)?"
)
_PARAMETRIZED = "parametrizations"
_MOST_NAMED = 10


class Part(NamedTuple):
    """The name of a tensor of a recurrent weight or bias, split in two.

    Attributes:
        place: the name that the whole weight would have, such as ``"encoder.weight_hh_l0"``.
        part: the ending, such as ``"_orig"``; ``"parametrizations.original"`` for a parametrization's tensor; "" for the
            weight itself.
    """

    place: str
    part: str


def part_of(name: str) -> Part | None:
    """Return the split name of a tensor of a recurrent weight or bias; None for other tensors.

    Examples:
        >>> part_of("lstm.weight_hh_l0_orig")
        Part(place='lstm.weight_hh_l0', part='_orig')
        >>> part_of("lstm.parametrizations.weight_hh_l0.original0")
        Part(place='lstm.weight_hh_l0', part='parametrizations.original0')
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    within = _PARAMETRIZED if match["within"] else ""
    return Part(f"{match['module']}{match['weight']}", f"{within}{match['part'] or ''}")


def with_whole_weights(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return named tensors in which every recurrent weight is one tensor, or one and its mask, and notes for the report.

    Raises:
        SlimLSTMError: a tensor carries the name of a recurrent weight in an unknown way, or parts do not fit.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        part = part_of(name)
        if part is not None:
            groups.setdefault(part.place, {})[part.part] = name
    found, notes, unknown = dict(tensors), list[str](), list[str]()
    for place, names in groups.items():
        scheme = SCHEMES.get(frozenset(names))
        if scheme is None or not _is_name(place):
            unknown += [name for part, name in names.items() if part or not _is_name(place)]
        elif scheme.whole is not None:
            parts = [tensors[names[part]] for part in scheme.parts]
            for name in names.values():
                del found[name]
            whole = scheme.whole(place, *parts)
            found.update(whole)
            if place in whole:
                notes.append(f"{place} was under {scheme.words}, which ends here")
    _check_known(unknown)
    return found, notes


def _is_name(place: str) -> bool:
    """Return whether the weight's name is a component of its own, rather than a part of another word."""
    return re.search(r"(^|\.)(weight|bias)_[^.]*$", place) is not None


def _check_known(unknown: list[str]) -> None:
    if unknown:
        more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
        raise SlimLSTMError(
            f"the file holds {', '.join(unknown[:_MOST_NAMED])}{more}: these belong to recurrent weights in a way that "
            "only the model's code knows (a parametrization, a scale, a copy?). Load the model where its code is, and "
            "compress it by compress_; or make them plain weights, as by "
            "torch.nn.utils.parametrize.remove_parametrizations, and save its state_dict"
        )


def _pruned(place: str, matrix: Tensor, mask: Tensor) -> dict[str, Tensor]:
    kept = mask != 0
    if mask.shape != matrix.shape or not torch.equal(kept.to(mask.dtype), mask):
        raise SlimLSTMError(
            f"the mask of {place} is not of zeros and ones, or not of its shape; save plain weights instead"
        )
    module, _, name = place.rpartition(".")
    if name.startswith(("bias", "weight_hr")):
        return {place: matrix * kept}
    start = f"{module}." if module else ""
    return {f"{start}{_PARAMETRIZED}.{name}.original": matrix, f"{start}{_PARAMETRIZED}.{name}.0.mask": kept}


def _weight_norm(place: str, size: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Return g v / |v|, with one norm for each entry of g; see :func:`torch.nn.utils.parametrizations.weight_norm`."""
    norms: dict[tuple[int, ...], int | None] = {(): None}
    if direction.ndim == 2:
        norms.update({(len(direction), 1): 1, (1, direction.shape[1]): 0})
    if not direction.ndim or tuple(size.shape) not in norms:
        raise SlimLSTMError(
            f"{place} is computed from tensors of {list(size.shape)} and {list(direction.shape)}, which is no weight norm; "
            "save plain weights instead"
        )
    axis = norms[tuple(size.shape)]
    length = direction.norm() if axis is None else direction.norm(dim=axis, keepdim=True)
    return {place: direction * (size / length)}


def _spectral_norm(place: str, matrix: Tensor, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Return W / (u W v), as evaluation does; see :func:`torch.nn.utils.parametrizations.spectral_norm`."""
    if matrix.ndim != 2 or (*left.shape, *right.shape) != tuple(matrix.shape):
        raise SlimLSTMError(f"the vectors of spectral norm of {place} do not fit its matrix; save plain weights instead")
    return {place: matrix / torch.dot(left, torch.mv(matrix, right))}


class Scheme(NamedTuple):
    """A known set of tensors that hold one weight.

    Attributes:
        parts: the endings of the tensors' names.
        words: the scheme's name for users.
        whole: takes the weight's name and the parts, and returns the tensors to use instead; None where all parts stay.
    """

    parts: tuple[str, ...]
    words: str = ""
    whole: Callable[..., dict[str, Tensor]] | None = None


_KNOWN = (
    Scheme(("",)),
    Scheme(("_u", "_v")),
    Scheme(("_raw",)),
    Scheme(("", "_raw")),
    Scheme(("parametrizations.original", "parametrizations.0.mask"), "a mask", _pruned),
    Scheme(("_orig", "_mask"), "a mask of torch.nn.utils.prune", _pruned),
    Scheme(("_g", "_v"), "weight norm", _weight_norm),
    Scheme(("parametrizations.original0", "parametrizations.original1"), "weight norm", _weight_norm),
    Scheme(("_orig", "_u", "_v"), "spectral norm", _spectral_norm),
    Scheme(
        ("parametrizations.original", "parametrizations.0._u", "parametrizations.0._v"), "spectral norm", _spectral_norm
    ),
)
SCHEMES = {frozenset(scheme.parts): scheme for scheme in _KNOWN}
