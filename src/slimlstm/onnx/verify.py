"""Compare the outputs of an exported file with the outputs of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]  # the public name is of newer versions

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.onnx.runtime import inference_session
from slimlstm.onnx.trace import Shape

TOLERANCE = 1e-4
"""The largest difference of a number, relative to the largest magnitude in its output (or to 1, where that is smaller)."""
INT8_TOLERANCE = 0.05
"""The largest difference of an output, relative to its norm, where weights are int8. The file rounds the inputs of int8
matrices to 8 bits; this alone changes cell states of trained models by 2%, and one input that rounds differently changes
all later steps."""

Run = Callable[[Sequence[Tensor]], list[Tensor]]
"""Runs a file on inputs in their order."""


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a file's outputs with the model's.

    Attributes:
        sizes: the sizes of open axes at every comparison, by name.
        difference: the largest difference of an output, relative to its norm.
    """

    sizes: list[dict[str, int]]
    difference: float


@dataclass(frozen=True)
class Bound:
    """The largest difference that is accepted.

    Attributes:
        tolerance: relative to the output's norm where weights are int8, and otherwise number by number, relative to the
            largest magnitude in the output or to 1.
        is_int8: whether any weight is int8.
    """

    tolerance: float
    is_int8: bool

    def check(self, index: int, expected: Tensor, found: Tensor, at: str) -> float:
        """Return the difference of one output, relative to its norm.

        Args:
            index: the position of the output, for errors.
            expected: the model's output.
            found: the file's output, of the same shape.
            at: the sizes of open axes in words, for errors.

        Raises:
            SlimLSTMError: the difference is too large.
        """
        if not expected.is_floating_point():
            # Rounding may change the largest of several nearly equal scores.
            if not self.is_int8 and not bool((expected.cpu() == found).all()):
                raise SlimLSTMError(f"output {index}, of integers, differs from the model's at {at}; nothing was written")
            return 0.0
        exact, written = expected.detach().cpu().double(), found.double()
        # Equal infinities, and NaN on both sides, do not differ; NaN on one side does.
        is_equal = (exact == written) | (exact.isnan() & written.isnan())
        difference = torch.where(is_equal, 0.0, (exact - written).nan_to_num(torch.inf))
        exact = exact.nan_to_num(0.0, 0.0, 0.0)
        relative = float(difference.norm() / exact.norm().clamp_min(1e-30))
        largest = float(difference.abs().max()) if difference.numel() else 0.0
        scale = max(1.0, float(exact.abs().max()) if exact.numel() else 0.0)
        if (relative if self.is_int8 else largest / scale) > self.tolerance:
            raise SlimLSTMError(self._message(index, relative, largest, scale, at))
        return relative

    def _message(self, index: int, relative: float, largest: float, scale: float, at: str) -> str:
        message = f"output {index} differs from the model's by {relative:.2g} of its norm at {at}"
        if not self.is_int8:
            return (
                f"{message}, one number by {largest:.2g} where the largest is {scale:.2g}; nothing was written. If that is "
                f"near enough, give tolerance={1.5 * largest / scale:.1g}"
            )
        return (
            f"{message}; nothing was written. The cause is the rounding of the inputs of int8 matrices to 8 bits, which "
            f"{self.tolerance:.2g} of the norm allows for. If that is near enough, give tolerance={1.5 * relative:.1g}; if "
            "not, store the weights in 'bfloat16'"
        )


def start(content: bytes) -> tuple[Run, str]:
    """Return a function that runs a model, and the name of its engine.

    Args:
        content: the bytes of the file.

    Raises:
        SlimLSTMError: the engine cannot load the file.
    """
    engine = "ONNX Runtime"
    try:
        try:
            session = inference_session(content)
        except ImportError:
            import onnx
            from onnx.reference import ReferenceEvaluator

            engine, model = "onnx reference", onnx.load_from_string(content)
            names = [entry.name for entry in model.graph.input]
            evaluate: Any = ReferenceEvaluator(model).run
        else:
            names, evaluate = [entry.name for entry in session.get_inputs()], session.run
    except Exception as error:  # each engine raises classes of its own
        raise SlimLSTMError(
            f"{engine} cannot load the file: {reason_of(error)}; nothing was written. If it lacks the dtype of the model's "
            "weights, convert the model, as model.float() does"
        ) from error

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = {name: tensor.cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
        try:
            outputs = evaluate(None, given)
        except Exception as error:  # each engine raises classes of its own
            shapes = {name: list(array.shape) for name, array in given.items()}
            raise SlimLSTMError(
                f"{engine} cannot run the file at {shapes}: {reason_of(error)}; nothing was written"
            ) from error
        return [torch.as_tensor(output) for output in outputs]

    return run, engine


def is_known_to_numpy(dtype: torch.dtype) -> bool:
    """Return whether tensors of a dtype become NumPy arrays, which the engines take."""
    try:
        torch.empty(0, dtype=dtype, device="cpu").numpy()
    except TypeError:
        return False
    return True


def compare(
    model: nn.Module,
    inputs: Any,
    run: Run,
    shapes: Sequence[Shape],
    limits: Mapping[Any, tuple[int, int]],
    bound: Bound,
) -> Comparison:
    """Compare outputs at the example's sizes, at larger ones of the other parity, and at the smallest sizes.

    The inputs at other sizes are random, and the same in every call of this function.

    Args:
        model: the model, in evaluation mode.
        inputs: the example, as a pair of positional and named arguments.
        run: runs the file.
        shapes: the shapes of the inputs.
        limits: the smallest and largest value of every open size, by symbol.
        bound: the largest difference that is accepted.

    Raises:
        SlimLSTMError: outputs differ, or the model runs at the example's sizes only.
    """
    flat, spec = pytree.tree_flatten(inputs)
    at = [index for index, value in enumerate(flat) if isinstance(value, Tensor)]
    example = _sizes_of([flat[index] for index in at], shapes)
    larger = {symbol: min(example[symbol] + 3 + 2 * number, limits[symbol][1]) for number, symbol in enumerate(limits)}
    least = {symbol: low for symbol, (low, _) in limits.items()}
    checked, largest = list[dict[str, int]](), 0.0
    torch.manual_seed(0)
    for sizes in (example, larger, least) if limits else (example,):
        values = list(flat)
        if sizes is not example:
            for index, shape in zip(at, shapes, strict=True):
                values[index] = _like(flat[index], [_size(size, sizes) for size in shape])
        args, kwargs = pytree.tree_unflatten(values, spec)
        try:
            expected = [value for value in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(value, Tensor)]
        except Exception:  # a convolution, for instance, needs more than one step
            if sizes is example:
                raise
            continue
        found = run([values[index] for index in at])
        try:
            largest = max(largest, _compare(expected, found, sizes, bound))
        except SlimLSTMError as error:
            if sizes is example or bound.is_int8:
                raise
            raise SlimLSTMError(
                f"{error}. At the example's sizes {example} the outputs agree; if the model's code branches on a size, "
                "give dynamic_shapes= without that axis"
            ) from error
        checked.append({str(symbol): size for symbol, size in sizes.items()})
    if limits and len(checked) == 1:
        raise SlimLSTMError(
            f"the file could not be checked: the model runs at the example's sizes {checked[0]}, but neither at larger "
            "ones nor at the least. Give dynamic_shapes= for the axes that may vary"
        )
    return Comparison(checked, largest)


def _sizes_of(tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> dict[Any, int]:
    """Return the values of the open sizes in the example, also of symbols that occur only in an expression such as 2 s."""
    found: dict[Any, int] = {}
    for tensor, shape in zip(tensors, shapes, strict=True):
        found.update({size: actual for size, actual in zip(shape, tensor.shape, strict=True) if not isinstance(size, int)})
    values: dict[Any, int] = {}
    for size, actual in sorted(found.items(), key=lambda item: not item[0].is_symbol):
        for symbol in size.free_symbols - values.keys():
            (values[symbol],) = map(int, sympy.solve(size.subs(values) - actual, symbol))
    return values


def _size(size: Any, sizes: Mapping[Any, int]) -> int:
    return size if isinstance(size, int) else int(size.subs(sizes))


def _like(example: Tensor, shape: Sequence[int]) -> Tensor:
    """Return values drawn from the example, in another shape; normal values where the example's numbers are all equal."""
    if example.is_floating_point() and bool((example == example.flatten()[0]).all()):
        return torch.randn(shape, dtype=example.dtype, device=example.device)
    return example.flatten()[torch.randint(example.numel(), tuple(shape))]


def _compare(expected: Sequence[Tensor], found: Sequence[Tensor], sizes: Mapping[Any, int], bound: Bound) -> float:
    """Return the largest difference of an output, relative to its norm."""
    at = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items()) or "the example's sizes"
    if [list(one.shape) for one in expected] != [list(one.shape) for one in found]:
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (expected, found)]
        raise SlimLSTMError(
            f"at {at} the model's outputs have the shapes {shapes[0]}, the file's {shapes[1]}; nothing was written"
        )
    pairs = enumerate(zip(expected, found, strict=True))
    return max((bound.check(index, one, other, at) for index, (one, other) in pairs), default=0.0)
