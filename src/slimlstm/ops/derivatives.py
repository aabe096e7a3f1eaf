"""Gradients of a function that is computed again, in the backward pass of an autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` or a dispatch mode, such as that of ``make_fx``, is active.

    They act on every operator, and compiled code would run behind their backs. Tensors of a transform have no memory.
    """
    if torch._C._len_torch_dispatch_stack() > 0:  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


Run = Callable[[Sequence[Tensor | None]], Sequence[Tensor]]


def gradients_again(
    run: Run, d_outputs: Sequence[Tensor | None], inputs: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Run a function again and return the gradients of its inputs.

    They are differentiable if gradients are on, as in a backward pass with ``create_graph=True``.

    Args:
        run: maps the inputs to the outputs, by PyTorch's operators.
        d_outputs: the gradients of the outputs; None for zero.
        inputs: the inputs of the function.
        wanted: for each input, whether to return its gradient; None is returned otherwise.

    Examples:
        >>> with torch.no_grad():
        ...     gradients_again(lambda inputs: [inputs[0] ** 2], [torch.ones(1)], [torch.tensor([3.0])], [True])
        [tensor([6.])]
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Aliases, because inputs may be computed from each other: each gradient must exclude paths through other inputs.
        aliases = [
            None if tensor is None else tensor.view_as(tensor) if create_graph else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(inputs, wanted, strict=True)
        ]
        outputs = run(aliases)
        pairs = [(one, d_one) for one, d_one in zip(outputs, d_outputs, strict=True) if d_one is not None]
        leaves = [alias for alias, needed in zip(aliases, wanted, strict=True) if needed and alias is not None]
        found = iter(
            torch.autograd.grad(
                [one for one, _ in pairs],
                leaves,
                [d_one for _, d_one in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            if pairs
            else [None] * len(leaves)
        )
    return [next(found) if needed and alias is not None else None for alias, needed in zip(aliases, wanted, strict=True)]
