"""Low-bit codes with one 16-bit scale for every group of weights in a row, and their packing.

The scales of a row are small multiples of one number, so that every weight is an integer of 8 bits times that number. The
fused kernel therefore packs such weights as int8, without loss, or codes of 3 and 4 bits as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64
"""Weights of a row that share a scale."""
_HALF_BITS = 11
"""Significant bits of float16."""
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.70000005, 0.65000004, 0.6)
"""Fractions of a group's largest magnitude that the highest code may represent, as float32 has ``linspace(1, 0.6, 9)``."""


def largest_code(bits: int) -> int:
    """Return the largest code of so many bits; codes are symmetric around zero.

    Examples:
        >>> largest_code(4)
        7
    """
    return 2 ** (bits - 1) - 1


def largest_step(bits: int) -> int:
    """Return the largest multiple of a row's scale that a group's scale may be, so that products with codes have 8 bits.

    Examples:
        >>> largest_step(4)
        18
    """
    return 127 // largest_code(bits)


def row_scales(weight: Tensor, bits: int) -> Tensor:
    """Return [m]: for each row of a weight [m, n], the number whose multiples are the scales of its groups.

    These numbers have so few significant bits that their multiples are exact in float16.
    """
    significant = _HALF_BITS - largest_step(bits).bit_length()
    least = weight.abs().amax(dim=1).float() / (largest_code(bits) * largest_step(bits))
    fraction, exponent = torch.frexp(least)
    scale = torch.ldexp((fraction * 2**significant).ceil(), exponent - significant)
    # float16 has no smaller steps.
    return (scale * 2.0**24).ceil() / 2.0**24


def grouped(weight: Tensor) -> Tensor:
    """Return a weight [m, n] as groups [m, g, GROUP], the last one padded with zeros."""
    missing = -weight.shape[1] % GROUP
    return pad(weight, (0, missing)).unflatten(1, (-1, GROUP))


def spread(scale: Tensor, columns: int) -> Tensor:
    """Return group scales [m, g] as scales [m, n] of single weights."""
    return scale.repeat_interleave(GROUP, dim=1)[:, :columns]


def group_scales(groups: Tensor, bits: int, base: Tensor) -> Tensor:
    """Return the scales [...] of groups [..., k] whose rounding to nearest has the smallest squared error.

    Args:
        groups: float32 weights.
        bits: bits of a code, from 3 to 8.
        base: :func:`row_scales` of the groups' rows, broadcast over the groups.
    """
    largest = largest_code(bits)
    wanted = groups.abs().amax(dim=-1) / largest / torch.where(base > 0, base, 1.0)
    best, lowest = base.expand_as(wanted), torch.full_like(wanted, torch.inf)
    for clip in _CLIPS:
        # Rounded up without clipping, so that the largest weight fits.
        step = (clip * wanted).ceil() if clip == 1.0 else (clip * wanted).round()
        scale = step.clamp(1, largest_step(bits)) * base
        error = (_nearest(groups, scale[..., None], largest) * scale[..., None] - groups).square().sum(dim=-1)
        better = error < lowest
        best, lowest = torch.where(better, scale, best), torch.where(better, error, lowest)
    return best


def as_scale(scale: Tensor) -> Tensor:
    """Return scales rounded to 11 significant bits, so that products with codes of 8 bits are exact in float32."""
    return scale.half().float()


def encode_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes int8 [m, n] and scales float16 [m, g] of a float32 weight [m, n].

    A group that is on a grid already is encoded exactly, whoever rounded it; other groups are rounded to nearest.
    """
    groups, largest = grouped(weight), largest_code(bits)
    scale, is_exact = _grid_of(groups, largest)
    scale = torch.where(is_exact, scale, group_scales(groups, bits, row_scales(weight, bits)[:, None]))
    codes = _nearest(groups, scale[..., None], largest).flatten(1)[:, : weight.shape[1]]
    return codes.to(torch.int8), scale.half()


def nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the float32 weight rounded to multiples of ``scale`` that the codes can hold."""
    return _nearest(weight, scale, largest_code(bits)) * scale


def _nearest(weight: Tensor, scale: Tensor, largest: int) -> Tensor:
    return (weight / torch.where(scale > 0, scale, 1.0)).round().clamp(-largest, largest)


def _grid_of(groups: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Return a scale for every group, and whether all its weights are exact multiples that codes can hold."""
    top = groups.abs().amax(dim=-1)
    found, is_exact = torch.zeros_like(top), top == 0
    for code in range(largest, 0, -1):
        scale = top / code
        fits = (as_scale(scale) == scale) & ~is_exact & (scale > 0)
        if bool(fits.any()):
            fits &= (_nearest(groups, scale[..., None], largest) * scale[..., None] == groups).all(dim=-1)
            found, is_exact = torch.where(fits, scale, found), is_exact | fits
    return found, is_exact


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes, int8 of any shape, as a stream with ``bits`` bits for each, row by row: uint8 [⌈count · bits / 8⌉].

    Examples:
        >>> pack(torch.tensor([[1, -1]], dtype=torch.int8), bits=4)
        tensor([241], dtype=torch.uint8)
    """
    stream = ((codes.flatten().to(torch.int16)[:, None] >> torch.arange(bits)) & 1).flatten()
    stream = pad(stream, (0, -len(stream) % 8)).unflatten(0, (-1, 8))
    return (stream << torch.arange(8)).sum(dim=-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return the codes, int8 of the given shape, in a stream that :func:`pack` made with as many bits.

    Examples:
        >>> unpack(torch.tensor([241], dtype=torch.uint8), bits=4, shape=(1, 2))
        tensor([[ 1, -1]], dtype=torch.int8)
    """
    count = math.prod(shape)
    stream = ((packed.to(torch.int16)[:, None] >> torch.arange(8)) & 1).flatten()[: count * bits]
    codes = (stream.unflatten(0, (count, bits)) << torch.arange(bits)).sum(dim=-1)
    return torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(torch.int8).view(shape)
