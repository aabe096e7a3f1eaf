"""Random LSTM problems for Hypothesis, and a module's results for them: every output and every gradient.

Dimensions: T time steps, B sequences, I input size, H hidden size, P projection size (or H), L layers, D directions;
m x n a matrix, r its rank.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from slimlstm import ops

BACKENDS = [name for name in (*ops.BACKENDS, "auto") if name not in ("fused", "training")]
"""The backends that take every problem. The fused kernel and the training loop have tests of their own."""
EXACT = {"rtol": 1e-10, "atol": 1e-10}
"""Tolerance in float64."""
UNITS = {torch.float32: 16, torch.bfloat16: 4}
"""Tolerance in other dtypes, in units of eps; smaller in bfloat16, whose products are summed in float32."""

Factors = dict[str, tuple[Tensor, Tensor]]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """An architecture, the shape of an input, and the rank of every matrix to be factored."""

    arguments: dict[str, Any]
    lengths: tuple[int, ...]
    """The lengths of the B sequences; all T unless packed."""
    form: str
    """``batched``, ``unbatched`` (B = 1), ``sorted`` (packed, longest first) or ``unsorted`` (packed in any order)."""
    states: bool
    """Whether (h0, c0) are given."""
    ranks: dict[str, int]

    def lstm(self, dtype: torch.dtype = torch.float64) -> nn.LSTM:
        torch.manual_seed(0)
        return nn.LSTM(**self.arguments, dtype=dtype)

    def inputs(self, dtype: torch.dtype = torch.float64) -> Results:
        """Return ``input``, padded, and with states ``h0`` [D L, B, P] and ``c0`` [D L, B, H]."""
        torch.manual_seed(1)
        arguments, batch = self.arguments, len(self.lengths)
        hidden = arguments["hidden_size"]
        count = arguments["num_layers"] * (1 + arguments["bidirectional"])
        inputs = {"input": torch.randn(max(self.lengths), batch, arguments["input_size"], dtype=dtype)}
        if self.states:
            inputs["h0"] = torch.randn(count, batch, arguments["proj_size"] or hidden, dtype=dtype)
            inputs["c0"] = torch.randn(count, batch, hidden, dtype=dtype)
        if self.form == "unbatched":
            return {name: tensor[:, 0] for name, tensor in inputs.items()}
        if arguments["batch_first"]:
            inputs["input"] = inputs["input"].transpose(0, 1)
        return inputs

    def call(self, lstm: nn.Module, inputs: Results) -> Results:
        """Return ``output``, ``h_n`` and ``c_n``; of packed output the data, whose order must be the input's."""
        x: Tensor | PackedSequence = inputs["input"]
        packed = self.form in ("sorted", "unsorted")
        if packed:
            first, ordered = self.arguments["batch_first"], self.form == "sorted"
            x = pack_padded_sequence(inputs["input"], torch.tensor(self.lengths), first, enforce_sorted=ordered)
        output, (h, c) = lstm(x, (inputs["h0"], inputs["c0"]) if self.states else None)
        if packed:
            for ours, theirs in zip(output[1:], x[1:], strict=True):
                assert (ours is None and theirs is None) or torch.equal(ours, theirs)
            output = output.data
        return {"output": output, "h_n": h, "c_n": c}


def matrix_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the shapes m x n of PyTorch's recurrent matrices by name."""
    lstm = nn.LSTM(**arguments, device="meta")
    return {name: tuple(value.shape) for name, value in lstm.named_parameters() if name[:9] in ("weight_ih", "weight_hh")}


@st.composite
def problems(draw: st.DrawFn, full_rank: bool, plain: bool = False) -> Problem:
    """Draw a problem, if ``plain`` without packing and projections; all ranks are full, or from 1 to full."""
    hidden = draw(st.sampled_from([1, 7, 33, 129]))
    arguments = {
        "input_size": draw(st.sampled_from([1, 5])),
        "hidden_size": hidden,
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "proj_size": 0 if plain else draw(st.sampled_from(sorted({0, hidden // 2, hidden - 1}))),
    }
    form = draw(st.sampled_from(["batched", "unbatched", *([] if plain else ["sorted", "unsorted"])]))
    batch = 1 if form == "unbatched" else draw(st.sampled_from([1, 3]))
    lengths = [draw(st.sampled_from([1, 2, 9]))] * batch
    if form in ("sorted", "unsorted"):
        lengths = [draw(st.sampled_from([1, 2, 9])) for _ in lengths]
    if form == "sorted":
        lengths.sort(reverse=True)
    shapes = matrix_shapes(arguments)
    names = draw(st.just(list(shapes)) | st.lists(st.sampled_from(list(shapes)), unique=True))
    full = {name: min(shapes[name]) for name in names}
    ranks = full if full_rank else {name: draw(st.integers(1, rank)) for name, rank in full.items()}
    return Problem(arguments, tuple(lengths), form, draw(st.booleans()), ranks)


def factors_of(module: nn.Module, ranks: Mapping[str, int]) -> Factors:
    """Return truncated SVDs, U [m, r] and V [r, n], of the matrices that ``ranks`` names."""
    factors: Factors = {}
    for name, rank in ranks.items():
        matrix = getattr(module, name).detach()
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        factors[name] = ((u * s)[:, :rank].to(matrix.dtype), v[:rank].to(matrix.dtype))
    return factors


def replaced(module: nn.Module, factors: Factors) -> nn.Module:
    """Return a copy whose matrices are the products of ``factors``."""
    module = deepcopy(module)
    with torch.no_grad():
        for name, (u, v) in factors.items():
            getattr(module, name).copy_(u @ v)
    return module


def with_gradients(module: nn.Module, inputs: Results, call: Callable[[nn.Module, Results], Results]) -> Results:
    """Return ``call(module, inputs)``, and the gradients of a weighted sum of it in every input and parameter."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs: Results = call(module, inputs)
    leaves = inputs | dict(module.named_parameters())
    # Weights differ from entry to entry, so that exchanged entries change the sum.
    loss = sum(
        (value * (torch.arange(value.numel()) + 1.0).sin().to(value).view_as(value)).sum() for value in outputs.values()
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {name: value.detach() for name, value in outputs.items()} | {
        f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def factor_gradients(dense: Results, factors: Factors) -> Results:
    """Return ``dense`` with dL/dU = dL/dW Vᵀ and dL/dV = Uᵀ dL/dW instead of dL/dW."""
    results = dict(dense)
    for name, (u, v) in factors.items():
        gradient = results.pop(f"gradient of {name}")
        results[f"gradient of {name}_u"] = gradient @ v.T
        results[f"gradient of {name}_v"] = u.T @ gradient
    return results


def assert_same(actual: Results, expected: Results, **tolerance: float) -> None:
    """Assert equal names, and under each name values within the tolerance of ``torch.testing.assert_close``."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **tolerance, msg=named(name))


def assert_near(actual: Results, truth: Results) -> None:
    """Assert |value - truth| <= k eps (1 + |truth|), with eps and k of the value's dtype."""
    assert actual.keys() == truth.keys()
    for name, value in truth.items():
        tolerance = UNITS[actual[name].dtype] * torch.finfo(actual[name].dtype).eps
        torch.testing.assert_close(actual[name].to(value), value, rtol=tolerance, atol=tolerance, msg=named(name))


def named(name: str) -> Callable[[str], str]:
    """Return a formatter that puts ``name`` before the message of ``torch.testing.assert_close``."""
    return lambda text: f"{name}: {text}"
