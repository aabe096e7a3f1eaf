"""Elementwise part of one training step, and whole passes with small matrices; compiled code where the kernel exists.

Shapes: T steps, B sequences, H hidden units. Gates are stacked in PyTorch's order i, f, g, o. "Low" is the precision of
products, "wide" is at least float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from slimlstm.ops import native

LARGEST_SMALL = 128
"""Hidden units up to which the compiled products are faster than a call of PyTorch for every step."""


class Buffers(NamedTuple):
    """The numbers of all steps of one direction, contiguous.

    Attributes:
        gates: in the forward pass W_ih x + b [T, B, 4H]; with wide numbers also W_hh h, in place. Low.
        active: the activations [T, B, 4H], wide; the same memory as ``gates`` if these are wide.
        c, h: the states [T + 1, B, H] before the first step and after every step, in the order of memory. Wide.
        h_low: the states h for products: ``h`` itself, or a copy in the low precision.
    """

    gates: Tensor
    active: Tensor
    c: Tensor
    h: Tensor
    h_low: Tensor


class Cells(Protocol):
    """Runs the elementwise part of one step."""

    def forward(self, at: Buffers, step: int, before: int, after: int, recurrent: Tensor | None) -> None:
        """Write the activations, and the states with index ``after``, from the states with index ``before``.

        Args:
            at: the buffers.
            step: the index of the step in gates and activations.
            before, after: indices of states.
            recurrent: W_hh h [B, 4H], or None if the gates contain it.
        """
        ...

    def backward(
        self,
        at: Buffers,
        step: int,
        before: int,
        after: int,
        d_output: Tensor | None,
        d_h: Tensor | None,
        d_c: Tensor,
        d_gates: Tensor,
    ) -> None:
        """Write the step's part of ``d_gates`` [T, B, 4H], low, and replace d_c after the step by d_c before it.

        Args:
            at, step, before, after: as for :meth:`forward`.
            d_output: the gradients of all outputs [T, B, H], wide; None for zero.
            d_h: the gradient of h by the step after [B, H], low; None for zero.
            d_c: the gradient of c [B, H], wide, changed in place.
            d_gates: takes the result.
        """
        ...


def cells_for(low: torch.dtype, device: torch.device) -> Cells:
    """Return the fastest implementation for products of a precision on a device."""
    if device.type == "cpu" and low in (torch.float32, torch.bfloat16) and not native.missing:
        return _native_cells(native.instruction_set(), low == torch.bfloat16)
    return PlainCells()


class PlainCells:
    """Cells of PyTorch's operators."""

    def forward(self, at: Buffers, step: int, before: int, after: int, recurrent: Tensor | None) -> None:
        """See :class:`Cells`."""
        here = at.active[step]
        if recurrent is not None:
            torch.add(at.gates[step].to(here.dtype), recurrent.to(here.dtype), out=here)
        size = here.shape[1] // 4
        here[:, : 2 * size].sigmoid_()
        here[:, 2 * size : 3 * size].tanh_()
        here[:, 3 * size :].sigmoid_()
        i, f, g, o = here.chunk(4, dim=1)
        torch.mul(f, at.c[before], out=at.c[after]).addcmul_(i, g)
        torch.mul(o, at.c[after].tanh(), out=at.h[after])
        if at.h_low is not at.h:
            at.h_low[after] = at.h[after]

    def backward(
        self,
        at: Buffers,
        step: int,
        before: int,
        after: int,
        d_output: Tensor | None,
        d_h: Tensor | None,
        d_c: Tensor,
        d_gates: Tensor,
    ) -> None:
        """See :class:`Cells`."""
        i, f, g, o = at.active[step].chunk(4, dim=1)
        tanh_c = at.c[after].tanh()
        total = torch.zeros_like(d_c) if d_output is None else d_output[step]
        total = total if d_h is None else total + d_h
        d_c.addcmul_(total, o * (1 - tanh_c * tanh_c))
        parts = [
            d_c * g * i * (1 - i),
            d_c * at.c[before] * f * (1 - f),
            d_c * i * (1 - g * g),
            total * tanh_c * o * (1 - o),
        ]
        d_gates[step] = torch.cat(parts, dim=1)
        d_c.mul_(f)


class NativeCells:
    """Cells of the compiled kernel, for float32 and bfloat16 on the CPU.

    Args:
        isa: the instruction set.
        is_half: whether the low precision is bfloat16.
    """

    def __init__(self, isa: str, is_half: bool) -> None:
        from slimlstm.ops import _kernel  # pyright: ignore[reportMissingModuleSource]  # absent without a compiler

        self._cells: Any = _kernel.Cells(isa)
        self._is_half, self._low_bytes = is_half, 2 if is_half else 4

    def forward(self, at: Buffers, step: int, before: int, after: int, recurrent: Tensor | None) -> None:
        """See :class:`Cells`."""
        _, batch, size = at.h.shape
        count = batch * size
        self._cells.forward(
            batch,
            size,
            self._is_half,
            at.gates.data_ptr() + step * 4 * count * self._low_bytes,
            0 if recurrent is None else recurrent.data_ptr(),
            at.c.data_ptr() + before * 4 * count,
            at.active.data_ptr() + step * 16 * count,
            at.c.data_ptr() + after * 4 * count,
            at.h.data_ptr() + after * 4 * count,
            at.h_low.data_ptr() + after * 2 * count if self._is_half else 0,
        )

    def backward(
        self,
        at: Buffers,
        step: int,
        before: int,
        after: int,
        d_output: Tensor | None,
        d_h: Tensor | None,
        d_c: Tensor,
        d_gates: Tensor,
    ) -> None:
        """See :class:`Cells`."""
        _, batch, size = at.h.shape
        count = batch * size
        self._cells.backward(
            batch,
            size,
            self._is_half,
            at.active.data_ptr() + step * 16 * count,
            at.c.data_ptr() + before * 4 * count,
            at.c.data_ptr() + after * 4 * count,
            0 if d_output is None else d_output.data_ptr() + step * 4 * count,
            0 if d_h is None else d_h.data_ptr(),
            d_c.data_ptr(),
            d_gates.data_ptr() + step * 4 * count * self._low_bytes,
        )


class SmallPasses:
    """All steps of one direction in compiled code, for small matrices in float32 on the CPU.

    Args:
        isa: the instruction set.
    """

    def __init__(self, isa: str) -> None:
        from slimlstm.ops import _kernel  # pyright: ignore[reportMissingModuleSource]  # absent without a compiler

        self._cells: Any = _kernel.Cells(isa)

    def forward(self, at: Buffers, factors: Sequence[Tensor], reverse: bool, from_zero: bool) -> None:
        """Write the activations and states of all steps.

        Args:
            at: the buffers.
            factors: one or two matrices that multiply rows of h [B, H] from the right, one after the other.
            reverse: whether the steps run from the last to the first.
            from_zero: whether the first h is zero.
        """
        states, batch, size = at.h.shape
        arguments = states - 1, batch, size, reverse, from_zero, [_matrix(factor) for factor in factors]
        self._cells.forward_all(*arguments, at.active.data_ptr(), at.c.data_ptr(), at.h.data_ptr())

    def backward(
        self,
        at: Buffers,
        factors: Sequence[Tensor],
        reverse: bool,
        d_output: Tensor | None,
        d_c: Tensor,
        d_h0: Tensor | None,
        d_gates: Tensor,
    ) -> None:
        """Write d_gates [T, B, 4H] and d_h0 [B, H], and replace d_c [B, H] of the last step by the gradient of c0.

        Args:
            at, reverse: as for :meth:`forward`.
            factors: one or two matrices that multiply rows of d_gates from the right, one after the other, to give d_h.
            d_output: the gradients of all outputs [T, B, H]; None for zero.
            d_c: the gradient of the last c, changed in place.
            d_h0: takes the gradient of h0; None where it is not wanted.
            d_gates: takes the gradients of the gates.
        """
        states, batch, size = at.h.shape
        arguments = states - 1, batch, size, reverse, [_matrix(factor) for factor in factors]
        places = [0 if one is None else one.data_ptr() for one in (at.active, at.c, d_output, d_c, d_h0, d_gates)]
        self._cells.backward_all(*arguments, *places)


def small_passes(low: torch.dtype, device: torch.device, hidden: int) -> SmallPasses | None:
    """Return the compiled passes where they are faster than a call of PyTorch for every step, else None."""
    is_small = hidden <= LARGEST_SMALL and low == torch.float32
    return _small_passes(native.instruction_set()) if is_small and device.type == "cpu" and not native.missing else None


def _matrix(factor: Tensor) -> tuple[int, int, int, int, int]:
    (inputs, outputs), (input_stride, output_stride) = factor.shape, factor.stride()
    return factor.data_ptr(), inputs, outputs, input_stride, output_stride


@functools.cache
def _small_passes(isa: str) -> SmallPasses:
    return SmallPasses(isa)


@functools.cache
def _native_cells(isa: str, is_half: bool) -> NativeCells:
    return NativeCells(isa, is_half)
