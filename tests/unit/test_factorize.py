"""Every law of every solver, on random and degenerate matrices. A new solver is one more row of ``FACTS``."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import (
    METHODS,
    MOMENT_DAMPING,
    Factors,
    MatrixProblem,
    Needs,
    WeightedSVD,
    relative_error,
    semi_nmf,
    singular_values,
    svd,
)


@dataclass(frozen=True)
class Facts:
    """What holds for one solver.

    ``slack``: the error at rank r is at most that of the SVD at rank r - slack. ``resolution``: relative errors below it
    are lost in the solver's own arithmetic, by dtype; through WᵀW half of float64's digits remain.
    """

    slack: int
    nonnegative_v: bool
    iterative: bool
    resolution: dict[torch.dtype, float]


SOLVERS = {
    name: lambda matrix, rank, on_iteration, method=method: method.solve(MatrixProblem(matrix), rank, on_iteration)
    for name, method in METHODS.items()
    if method.needs == Needs.NOTHING and not method.makes_mask
}
"""Every method that needs nothing but the matrix and finds factors."""

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BY_GRAM = dict.fromkeys(DTYPES, 1e-7)
FACTS = {
    "svd": Facts(slack=0, nonnegative_v=False, iterative=False, resolution=BY_GRAM | {torch.float64: 1e-13}),
    "semi-nmf": Facts(slack=1, nonnegative_v=True, iterative=True, resolution=BY_GRAM),
}
KINDS = {
    "normal": torch.randn,
    "rank-deficient": lambda m, n: torch.randn(m, max(1, min(m, n) // 2)) @ torch.randn(max(1, min(m, n) // 2), n),
    "fading columns": lambda m, n: torch.randn(m, n) * 10.0 ** -torch.linspace(0, 8, n),
    "fading rows": lambda m, n: torch.randn(m, n) * 10.0 ** -torch.linspace(0, 8, m)[:, None],
    "sparse": lambda m, n: torch.randn(m, n) * (torch.rand(m, n) < 0.2),
    "negative": lambda m, n: -torch.rand(m, n),
    "repeated columns": lambda m, n: torch.randn(m, 1).expand(m, n),
    "constant": lambda m, n: torch.full((m, n), -0.7),
    "zero": torch.zeros,
}

every_solver = pytest.mark.parametrize("method", FACTS)
sides = st.integers(1, 12)


@st.composite
def matrices(draw, dtypes=tuple(DTYPES), kinds=tuple(KINDS)):
    """A matrix [m, n]: wide or tall, one row or one column, of full rank or not."""
    m, n, dtype, kind = draw(sides), draw(sides), draw(st.sampled_from(dtypes)), draw(st.sampled_from(kinds))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return KINDS[kind](m, n).to(dtype)


@st.composite
def problems(draw, **kinds):
    """A matrix and a rank for it."""
    matrix = draw(matrices(**kinds))
    return matrix, draw(st.integers(1, min(matrix.shape)))


def exact(tensor):
    return tensor.detach().double().numpy()


def svd_error(matrix, rank):
    """The relative error of the best approximation of that rank: √(Σ_{i>r} σ_i² / Σ σ_i²), by LAPACK."""
    values = np.linalg.svd(exact(matrix), compute_uv=False)
    return np.linalg.norm(values[rank:]) / (np.linalg.norm(values) or 1.0)


def product_error(matrix, factors):
    w = exact(matrix)
    return np.linalg.norm(w - exact(factors.u) @ exact(factors.v)) / (np.linalg.norm(w) or 1.0)


def rounding(matrix, factors):
    """The most that rounding the entries of exact factors to their dtype can add to the relative error."""
    info = torch.finfo(matrix.dtype)
    u, v = np.abs(exact(factors.u)), np.abs(exact(factors.v))
    # Half a unit in the last place, and the spacing of the numbers too small to have one.
    du, dv = (0.51 * info.eps * entries + info.tiny * info.eps for entries in (u, v))
    return np.linalg.norm(du @ v + u @ dv + du @ dv) / (np.linalg.norm(exact(matrix)) or 1.0)


def test_every_solver_has_its_facts():
    assert FACTS.keys() == SOLVERS.keys()


@every_solver
@given(problems())
def test_factors_have_the_shapes_dtype_and_device_of_the_matrix(method, problem):
    matrix, rank = problem
    factors = SOLVERS[method](matrix, rank, None)
    assert factors.u.shape == (matrix.shape[0], rank)
    assert factors.v.shape == (rank, matrix.shape[1])
    assert factors.rank == rank
    for factor in (factors.u, factors.v):
        assert (factor.dtype, factor.device) == (matrix.dtype, matrix.device)
        assert factor.is_contiguous()
        assert torch.isfinite(factor).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_solver
def test_factors_stay_on_the_gpu(method):
    matrix = torch.randn(40, 30, device="cuda")
    factors = SOLVERS[method](matrix, 7, None)
    assert factors.u.device == factors.v.device == matrix.device
    assert factors.residual == pytest.approx(SOLVERS[method](matrix.cpu(), 7, None).residual, rel=1e-5)


@every_solver
@given(problems())
def test_the_residual_is_that_of_the_factors_returned(method, problem):
    matrix, rank = problem
    factors = SOLVERS[method](matrix, rank, None)
    assert factors.residual == pytest.approx(product_error(matrix, factors), rel=1e-9, abs=1e-14)


@every_solver
@given(problems())
def test_the_error_is_at_most_that_of_the_svd_less_the_slack(method, problem):
    matrix, rank = problem
    facts, factors = FACTS[method], SOLVERS[method](matrix, rank, None)
    allowed = facts.resolution[matrix.dtype] + rounding(matrix, factors)
    assert factors.residual <= svd_error(matrix, rank - facts.slack) + allowed


@given(problems(dtypes=(torch.float64, torch.float32)))
def test_svd_is_as_good_as_any_approximation_of_its_rank(problem):
    matrix, rank = problem
    factors = SOLVERS["svd"](matrix, rank, None)
    # Rounding a factor of norm √(Σ σ_i) costs at most half a unit of eps on each side.
    allowed = FACTS["svd"].resolution[matrix.dtype] + math.sqrt(rank) * torch.finfo(matrix.dtype).eps
    assert factors.residual == pytest.approx(svd_error(matrix, rank), rel=0, abs=allowed)


@given(matrices(dtypes=(torch.float64, torch.float32)))
def test_more_rank_never_makes_the_svd_worse(matrix):
    residuals = [SOLVERS["svd"](matrix, rank, None).residual for rank in range(1, min(matrix.shape) + 1)]
    allowed = FACTS["svd"].resolution[matrix.dtype] + math.sqrt(len(residuals)) * torch.finfo(matrix.dtype).eps
    assert all(after <= before + allowed for before, after in pairwise(residuals))


@given(problems(dtypes=(torch.float64,), kinds=("normal", "rank-deficient", "negative")))
def test_svd_shares_its_singular_values_out_evenly(problem):
    matrix, rank = problem
    factors = SOLVERS["svd"](matrix, rank, None)
    roots = singular_values(matrix)[:rank].sqrt()
    # √σ of a σ that is zero but for rounding is rounding's root.
    torch.testing.assert_close(factors.u.norm(dim=0), roots, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(factors.v.norm(dim=1), roots, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("method", [name for name, facts in FACTS.items() if facts.nonnegative_v])
@given(problems())
def test_v_is_nonnegative(method, problem):
    matrix, rank = problem
    assert (SOLVERS[method](matrix, rank, None).v >= 0).all()


@every_solver
@given(problems())
def test_the_matrix_is_left_alone_and_the_factors_are_detached(method, problem):
    matrix, rank = problem
    before = matrix.clone()
    factors = SOLVERS[method](matrix.requires_grad_(), rank, None)
    assert torch.equal(matrix.detach(), before)
    assert matrix.requires_grad
    assert matrix.grad is None
    assert not factors.u.requires_grad
    assert not factors.v.requires_grad


@every_solver
def test_a_strided_view_gives_what_its_copy_gives(method):
    view = torch.randn(14, 18).T[::2, ::3]
    ours, copies = (SOLVERS[method](matrix, 3, None) for matrix in (view, view.contiguous()))
    torch.testing.assert_close(ours.u @ ours.v, copies.u @ copies.v)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (129, 33), (33, 129)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@every_solver
def test_full_rank_loses_nothing_but_the_slack(method, kind, shape):
    matrix, full = KINDS[kind](*shape), min(shape)
    facts, factors = FACTS[method], SOLVERS[method](matrix, full, None)
    allowed = facts.resolution[matrix.dtype] + rounding(matrix, factors)
    assert product_error(matrix, factors) <= svd_error(matrix, full - facts.slack) + allowed
    if kind == "zero":
        assert factors.residual == 0.0


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, 1e-20), (torch.float64, 1e20), (torch.float32, 1e-6), (torch.float32, 1e6)],
    ids=str,
)
@every_solver
@given(st.data())
def test_a_scaled_matrix_has_scaled_factors(method, dtype, scale, data):
    matrix, rank = data.draw(problems(dtypes=(dtype,), kinds=("normal", "sparse", "negative", "constant", "zero")))
    plain, scaled = (SOLVERS[method](w, rank, None) for w in (matrix, matrix * scale))
    allowed = FACTS[method].resolution[dtype] + rounding(matrix, plain) + rounding(matrix * scale, scaled)
    assert torch.isfinite(scaled.u).all()
    assert torch.isfinite(scaled.v).all()
    assert scaled.residual == pytest.approx(plain.residual, rel=0, abs=allowed)
    assert product_error(matrix * scale, scaled) == pytest.approx(scaled.residual, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_solver
def test_factors_of_large_half_precision_numbers_do_not_overflow(method, dtype):
    matrix = (torch.randn(20, 9).clamp(-3, 3) * 2e4).to(dtype)
    factors = SOLVERS[method](matrix, 5, None)
    assert torch.isfinite(factors.u).all()
    assert torch.isfinite(factors.v).all()


REFUSED_MATRICES = {
    "NaN": (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "holds 1 NaN or infinite numbers of 4"),
    "inf": (torch.tensor([[math.inf, -math.inf], [0.0, 1.0]]), "holds 2 NaN or infinite numbers of 4"),
    "vector": (torch.ones(4), r"matrix \[m, n\] .* not a tensor of shape \[4\]"),
    "3-D": (torch.ones(2, 2, 2), r"not a tensor of shape \[2, 2, 2\]"),
    "no rows": (torch.ones(0, 3), r"m, n >= 1 .* \[0, 3\]"),
    "no columns": (torch.ones(3, 0), r"m, n >= 1 .* \[3, 0\]"),
    "integers": (torch.ones(2, 2, dtype=torch.int8), "floating-point matrix of at least 16 bits is needed, not torch.int8"),
    "complex": (
        torch.ones(2, 2, dtype=torch.complex64),
        "floating-point matrix of at least 16 bits is needed, not torch.complex64",
    ),
    "eight bits": (
        torch.ones(2, 2).to(torch.float8_e5m2),
        "floating-point matrix of at least 16 bits is needed, not torch.float8",
    ),
    "meta": (torch.ones(2, 2, device="meta"), "meta device and holds no numbers; load the weights first"),
}


@pytest.mark.parametrize(("matrix", "message"), REFUSED_MATRICES.values(), ids=REFUSED_MATRICES)
@pytest.mark.parametrize(
    "use",
    [lambda w, solve=solve: solve(w, 1, None) for solve in SOLVERS.values()]
    + [singular_values, lambda w: WeightedSVD(w, torch.ones(w.shape[-1]))],
)
def test_matrices_that_cannot_be_factored_are_refused(use, matrix, message):
    with pytest.raises(SlimLSTMError, match=message):
        use(matrix)


@pytest.mark.parametrize("rank", [0, -1, 4, True, 2.0, "2", None])
@every_solver
def test_ranks_that_make_no_sense_are_refused(method, rank):
    with pytest.raises(SlimLSTMError, match=rf"rank of a 3 x 5 matrix has to be an int from 1 to 3, not {rank!r}"):
        SOLVERS[method](torch.randn(3, 5), rank, None)


@every_solver
@given(problems(dtypes=(torch.float32,), kinds=("normal", "sparse", "negative")))
def test_iterations_are_reported_one_by_one(method, problem):
    matrix, rank = problem
    calls = []
    factors = SOLVERS[method](matrix, rank, lambda *call: calls.append(call))
    done, most = [call[0] for call in calls], {call[1] for call in calls}
    assert done == list(range(1, factors.iterations + 1))
    assert all(factors.iterations <= limit for limit in most)
    assert bool(calls) is FACTS[method].iterative


@pytest.mark.parametrize("tolerance", [0.0, -1.0])
@pytest.mark.parametrize("most", [1, 3, 10])
def test_semi_nmf_that_runs_out_of_iterations_says_so(tolerance, most):
    calls = []
    factors = semi_nmf(torch.randn(12, 9), 3, lambda *call: calls.append(call), tolerance=tolerance, max_iterations=most)
    assert not factors.converged
    assert factors.iterations == most
    assert calls == [(done, most) for done in range(1, most + 1)]


def test_semi_nmf_that_has_settled_says_so():
    factors = semi_nmf(torch.rand(12, 9), 1)
    assert factors.converged
    assert 0 < factors.iterations < 500


def test_semi_nmf_without_iterations_is_as_good_as_the_svd_of_one_rank_less():
    matrix = torch.randn(12, 9)
    factors = semi_nmf(matrix, 4, max_iterations=0)
    assert factors.residual <= svd_error(matrix, 3) + rounding(matrix, factors)


@given(matrices())
def test_singular_values_are_lapacks(matrix):
    values = singular_values(matrix)
    assert values.dtype == torch.float64
    np.testing.assert_allclose(exact(values), np.linalg.svd(exact(matrix), compute_uv=False), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("matrix", "approximation", "error"),
    [([[3.0, 4.0]], [[3.0, 4.0]], 0.0), ([[3.0, 4.0]], [[0.0, 4.0]], 0.6), ([[0.0]], [[0.0]], 0.0)],
)
def test_relative_error(matrix, approximation, error):
    assert relative_error(torch.tensor(matrix), torch.tensor(approximation)) == pytest.approx(error)


def moment(size: int, kind: str) -> torch.Tensor:
    """A second moment [n, n]."""
    rows = torch.randn(3 * size, size, dtype=torch.float64)
    if kind == "dead units":
        rows[:, torch.arange(size) % 3 == 0] = 0.0
    elif kind == "few rows":
        rows = rows[: max(1, size // 3)]
    elif kind == "uneven":
        rows *= 10.0 ** -torch.linspace(0, 3, size)
    elif kind == "none":
        rows *= 0.0
    return rows.T @ rows / len(rows)


MOMENTS = ("full", "dead units", "few rows", "uneven", "none")


@st.composite
def weighted_problems(draw, dtypes=(torch.float64,), kinds=("normal", "rank-deficient", "sparse", "zero"), moments=MOMENTS):
    """A matrix, a rank for it, and the moments A and G of its inputs and gradients; G may be None."""
    matrix, rank = draw(problems(dtypes=dtypes, kinds=kinds))
    m, n = matrix.shape
    a, g = moment(n, draw(st.sampled_from(moments))), draw(st.sampled_from([None, *moments]))
    return matrix, rank, a, None if g is None else moment(m, g)


def damped(a):
    """A + λI, λ a thousandth of the mean of A's diagonal, and 1 where that is zero."""
    return a + (MOMENT_DAMPING * float(a.diagonal().mean()) or 1.0) * torch.eye(len(a), dtype=a.dtype)


def weighted_loss(matrix, approximation, a, g):
    """tr(Δᵀ G Δ A), Δ being the difference."""
    difference = matrix.double() - approximation.double()
    return float(torch.trace(difference.T @ (difference if g is None else g @ difference) @ a))


def scale_of(matrix, a, g):
    """The loss of leaving everything out, beside which rounding is measured."""
    return max(weighted_loss(matrix, torch.zeros_like(matrix), damped(a), g), 1e-300)


@given(weighted_problems())
def test_the_losses_of_a_weighted_svd_are_those_of_its_factors(problem):
    """Σ_{i>r} ℓ_i = tr(Δᵀ G Δ (A + λI)) at every rank r, and so what A alone loses is at most that."""
    matrix, _, a, g = problem
    found, scale = WeightedSVD(matrix, a, g), scale_of(matrix, a, g)
    assert found.losses.shape == (min(matrix.shape),)
    assert (found.losses >= 0.0).all()
    assert (found.losses.diff() <= 0.0).all()
    assert float(found.losses.sum()) == pytest.approx(scale, rel=1e-9, abs=1e-200)
    for rank in range(1, min(matrix.shape) + 1):
        factors = found.factors(rank)
        approximation, expected = factors.u @ factors.v, float(found.losses[rank:].sum())
        assert weighted_loss(matrix, approximation, damped(a), g) == pytest.approx(expected, rel=1e-9, abs=1e-11 * scale)
        assert weighted_loss(matrix, approximation, a, g) <= expected * (1 + 1e-9) + 1e-11 * scale
        assert factors.residual == pytest.approx(product_error(matrix, factors), rel=1e-9, abs=1e-14)


@given(weighted_problems(), st.floats(1e-6, 1.0))
def test_no_factors_of_its_rank_lose_less_than_a_weighted_svd(problem, step):
    """Neither those of the SVD, nor its own with any small change, nor random ones that are fitted as well as can be."""
    matrix, rank, a, g = problem
    ours, plain, scale = WeightedSVD(matrix, a, g).factors(rank), svd(matrix, rank), scale_of(matrix, a, g)
    a = damped(a)
    best = weighted_loss(matrix, ours.u @ ours.v, a, g)
    u, v = (factor + step * torch.randn_like(factor) for factor in (ours.u, ours.v))
    some = torch.randn_like(ours.v)
    fitted = matrix @ a @ some.T @ torch.linalg.pinv(some @ a @ some.T, hermitian=True) @ some
    for candidate in (plain.u @ plain.v, u @ v, u @ ours.v, ours.u @ v, fitted):
        assert best <= weighted_loss(matrix, candidate, a, g) + 1e-9 * scale


@given(weighted_problems(moments=("full", "uneven")), st.sampled_from(["inputs", "gradients", "both"]))
def test_diagonal_moments_are_full_ones_with_nothing_beside_the_diagonal(problem, which):
    matrix, rank, a, g = problem
    g = torch.eye(len(matrix), dtype=torch.float64) if g is None else g
    diagonals = a.diagonal() if which != "gradients" else a, g.diagonal() if which != "inputs" else g
    fulls = [torch.diag(one) if one.ndim == 1 else one for one in diagonals]
    ours, theirs = WeightedSVD(matrix, *diagonals), WeightedSVD(matrix, *fulls)
    scale = scale_of(matrix, *fulls)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-9, atol=1e-11 * scale)
    losses = [
        weighted_loss(matrix, f.u @ f.v, damped(fulls[0]), fulls[1]) for f in (ours.factors(rank), theirs.factors(rank))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9, abs=1e-11 * scale)


@given(problems(dtypes=(torch.float64, torch.float32)), st.booleans(), st.sampled_from([1e-6, 1.0, 1e6]))
def test_where_all_weigh_the_same_a_weighted_svd_is_the_svd(problem, with_gradients, weight):
    matrix, rank = problem
    m, n = matrix.shape
    found = WeightedSVD(matrix, weight * torch.eye(n), 2.0 * torch.eye(m) if with_gradients else None)
    squares = singular_values(matrix).square()
    expected = squares * (1 + MOMENT_DAMPING) * weight * (2.0 if with_gradients else 1.0)
    torch.testing.assert_close(found.losses, expected, rtol=1e-6, atol=1e-12 * float(expected.max()))
    factors = found.factors(rank)
    allowed = 1e-7 + rounding(matrix, factors)
    assert factors.residual == pytest.approx(svd_error(matrix, rank), rel=0, abs=allowed)


@given(weighted_problems(moments=("full", "uneven")), st.sampled_from([1e-8, 1e8]), st.sampled_from([1e-8, 1e8]))
def test_the_scale_of_moments_does_not_matter(problem, of_inputs, of_gradients):
    matrix, rank, a, g = problem
    ours, theirs = WeightedSVD(matrix, a, g), WeightedSVD(matrix, of_inputs * a, None if g is None else of_gradients * g)
    scale = of_inputs * (1.0 if g is None else of_gradients)
    torch.testing.assert_close(theirs.losses / scale, ours.losses, rtol=1e-7, atol=1e-11 * scale_of(matrix, a, g))
    factors = theirs.factors(rank)
    expected = float(ours.losses[rank:].sum())
    loss = weighted_loss(matrix, factors.u @ factors.v, damped(a), g)
    assert loss == pytest.approx(expected, rel=1e-7, abs=1e-9 * scale_of(matrix, a, g))


@given(weighted_problems(dtypes=tuple(DTYPES), kinds=tuple(KINDS)))
def test_weighted_factors_are_like_any_others(problem):
    """Shapes, dtype, balance, and nothing left on the matrix, with moments of whatever kind."""
    matrix, rank, a, g = problem
    factors = WeightedSVD(matrix.requires_grad_(), a, g).factors(rank)
    assert (factors.u.shape, factors.v.shape) == ((len(matrix), rank), (rank, matrix.shape[1]))
    assert {factors.u.dtype, factors.v.dtype} == {matrix.dtype}
    assert not factors.u.requires_grad
    assert matrix.grad is None
    for factor in (factors.u, factors.v):
        assert torch.isfinite(factor).all()
        assert factor.is_contiguous()
    assert factors.residual == pytest.approx(product_error(matrix, factors), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weighted_factors_in_low_precision_lose_what_was_predicted(dtype):
    matrix, a, g = torch.randn(40, 12).to(dtype), moment(12, "uneven"), moment(40, "full")
    found = WeightedSVD(matrix, a.float(), g.float())
    for rank in (1, 5, 8):
        factors = found.factors(rank)
        loss = weighted_loss(matrix, factors.u.double() @ factors.v.double(), damped(a), g)
        assert loss == pytest.approx(float(found.losses[rank:].sum()), rel=30 * torch.finfo(dtype).eps)


def test_inputs_that_never_come_are_free_and_those_that_come_are_kept():
    """Of two directions of equal size, the one that is used is kept."""
    matrix, a = torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
    factors = WeightedSVD(matrix, a).factors(1)
    torch.testing.assert_close(factors.u @ factors.v, a)
    factors = WeightedSVD(matrix, torch.eye(2, dtype=torch.float64), a).factors(1)
    torch.testing.assert_close(factors.u @ factors.v, a)


REFUSED_MOMENTS = {
    "inputs of another size": (torch.ones(4, 4), None, r"inputs of a 3 x 5 matrix are \[5, 5\] or \[5\], not \[4, 4\]"),
    "inputs of the other side": (torch.ones(3), None, r"inputs of a 3 x 5 matrix are \[5, 5\] or \[5\], not \[3\]"),
    "inputs 3-D": (torch.ones(5, 5, 5), None, r"not \[5, 5, 5\]"),
    "gradients of another size": (
        torch.ones(5),
        torch.ones(5, 5),
        r"gradients of a 3 x 5 matrix are \[3, 3\] or \[3\], not",
    ),
    "NaN inputs": (
        torch.full((5,), math.nan),
        None,
        "moments of the inputs hold NaN or infinite .*; were the batches finite",
    ),
    "infinite gradients": (torch.ones(5), torch.full((3, 3), math.inf), "moments of the gradients hold NaN or infinite"),
}


@pytest.mark.parametrize(("inputs", "gradients", "message"), REFUSED_MOMENTS.values(), ids=REFUSED_MOMENTS)
def test_moments_that_do_not_fit_are_refused(inputs, gradients, message):
    with pytest.raises(SlimLSTMError, match=message):
        WeightedSVD(torch.randn(3, 5), inputs, gradients)


@pytest.mark.parametrize("rank", [0, -1, 4, True, 2.0])
def test_weighted_ranks_that_make_no_sense_are_refused(rank):
    with pytest.raises(SlimLSTMError, match=rf"rank of a 3 x 5 matrix has to be an int from 1 to 3, not {rank!r}"):
        WeightedSVD(torch.randn(3, 5), torch.ones(5)).factors(rank)


def test_factors_cannot_be_changed():
    factors = Factors(torch.ones(2, 1), torch.ones(1, 3), 0.0)
    with pytest.raises(AttributeError):
        factors.residual = 1.0


def flops(rows, iterations):
    with FlopCounterMode(display=False) as counter:
        semi_nmf(torch.randn(rows, 12), 5, max_iterations=iterations, tolerance=0.0)
    return counter.get_total_flops()


def test_an_iteration_of_semi_nmf_costs_the_same_however_many_rows_the_matrix_has():
    assert flops(480, 3) - flops(480, 2) == flops(24, 3) - flops(24, 2) > 0
