"""Every law of every solver, on random and degenerate matrices. A new solver is one more row of ``FACTS``."""

import math
import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from slimlstm.errors import SlimLSTMError
from slimlstm.factorize import SOLVERS, Factors, relative_error, semi_nmf, singular_values


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
    "integers": (torch.ones(2, 2, dtype=torch.int8), "floating-point matrix is needed, not torch.int8"),
    "complex": (torch.ones(2, 2, dtype=torch.complex64), "floating-point matrix is needed, not torch.complex64"),
    "meta": (torch.ones(2, 2, device="meta"), "meta device and holds no numbers; load the weights first"),
}


@pytest.mark.parametrize(("matrix", "message"), REFUSED_MATRICES.values(), ids=REFUSED_MATRICES)
@pytest.mark.parametrize(
    "use", [lambda w, solve=solve: solve(w, 1, None) for solve in SOLVERS.values()] + [singular_values]
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


def test_factors_cannot_be_changed():
    factors = Factors(torch.ones(2, 1), torch.ones(1, 3), 0.0)
    with pytest.raises(AttributeError):
        factors.residual = 1.0


@pytest.mark.slow
def test_semi_nmf_of_trained_matrices_is_as_good_as_the_svd_of_one_rank_less(data_folder):
    checkpoint = data_folder.parent / "checkpoints" / "awd_lstm_ptb" / "model.safetensors"
    if not checkpoint.is_file():
        pytest.skip(f"there is no trained model at {checkpoint}")
    weights = {name: w.float() for name, w in load_file(checkpoint).items() if ".weight_" in name}
    assert len(weights) == 6
    for name, matrix in weights.items():
        values = singular_values(matrix)
        for rank in (10, 50, 200):
            start = time.perf_counter()
            residual = semi_nmf(matrix, rank).residual
            assert time.perf_counter() - start < 60.0, (name, rank)
            assert residual <= float(values[rank - 1 :].norm() / values.norm()), (name, rank)
