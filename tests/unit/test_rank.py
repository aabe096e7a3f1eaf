import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import (
    RankCosts,
    allocate,
    break_even_rank,
    is_smaller,
    rank_for_energy,
    rank_for_fraction,
    rank_for_share,
)

shapes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
spectra = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def factor_numbers(shape, rank):
    return rank * sum(shape)


@pytest.mark.parametrize(("shape", "rank"), [((4600, 1150), 920.0), ((4, 4), 2.0), ((1, 1), 0.5), ((6, 3), 2.0)])
def test_break_even_rank_of_known_shapes(shape, rank):
    assert break_even_rank(shape) == rank


@given(shapes, st.integers(1, 5000))
def test_a_rank_saves_exactly_where_the_factors_are_smaller(shape, rank):
    assert is_smaller(shape, rank) is (factor_numbers(shape, rank) < math.prod(shape))


@pytest.mark.parametrize("shape", [(4600, 1150), (4, 4), (6, 3), (1600, 400)])
def test_a_rank_saves_below_break_even_and_no_more_at_it(shape):
    rank = int(break_even_rank(shape))
    assert is_smaller(shape, rank - 1)
    assert not is_smaller(shape, rank)


@given(shapes, st.floats(0.0, 1.0))
def test_the_rank_for_a_fraction_is_the_largest_that_fits(shape, keep):
    rank = rank_for_fraction(shape, keep)
    assert type(rank) is int
    # A fraction that is met exactly may have been rounded either way.
    budget = keep * math.prod(shape)
    assert rank == 1 or factor_numbers(shape, rank) <= budget * (1 + 1e-12)
    assert factor_numbers(shape, rank + 1) > budget * (1 - 1e-12)


@given(shapes, st.data())
def test_the_fraction_that_a_rank_holds_gives_that_rank_back(shape, data):
    rank = data.draw(st.integers(1, min(shape)))
    assert rank_for_fraction(shape, factor_numbers(shape, rank) / math.prod(shape)) == rank


@pytest.mark.parametrize(("keep", "rank"), [(0.7, 11), (0.0, 1), (1.0, 15)])
def test_the_rank_for_round_fractions(keep, rank):
    """Of 33 x 30, break-even 15.7: rank 11 holds exactly 0.7 of the 990 parameters."""
    assert rank_for_fraction((33, 30), keep) == rank


@given(spectra, st.floats(0.0, 1.0, exclude_min=True))
def test_the_rank_for_an_energy_is_the_smallest_that_reaches_it(values, energy):
    rank = rank_for_energy(values, energy)
    squares = values.square().tolist()
    total, kept, without_last = math.fsum(squares), math.fsum(squares[:rank]), math.fsum(squares[: rank - 1])
    assert type(rank) is int
    assert 1 <= rank <= len(squares)
    assert kept >= energy * total * (1 - 1e-12)
    assert rank == 1 or without_last < energy * total * (1 + 1e-12)


@given(spectra, st.sampled_from([1e-20, 1e20]), st.floats(0.01, 0.99))
def test_the_rank_for_an_energy_does_not_depend_on_scale(values, scale, energy):
    # A sum that meets the energy exactly could be rounded to either side of it.
    energies = values.square().cumsum(0) / values.square().sum()
    if (energies - energy).abs().min() > 1e-12:
        assert rank_for_energy(values * scale, energy) == rank_for_energy(values, energy)


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        ([2.0, 1.0, 1.0, 1.0, 1.0], 0.5, 1),
        ([2.0, 1.0, 1.0, 1.0, 1.0], 0.51, 2),
        ([2.0, 1.0, 1.0, 1.0, 1.0], 1.0, 5),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2),
        ([3.0, 0.0, 0.0], 1.0, 1),
        ([0.0, 0.0], 0.9, 1),
        ([5.0], 0.1, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_rank_for_an_energy_of_known_spectra(values, energy, rank, dtype):
    assert rank_for_energy(torch.tensor(values, dtype=dtype), energy) == rank


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_an_energy_that_is_no_fraction_is_refused(energy):
    with pytest.raises(SlimLSTMError, match=rf"fraction of the squared singular values in \(0, 1\], not {energy!r}"):
        rank_for_energy(torch.ones(3), energy)


parts = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=20).map(lambda values: sorted(values, reverse=True))


@given(parts, st.floats(0.0, 1.0))
def test_the_rank_of_a_sum_is_the_smallest_that_reaches_it(values, fraction):
    rank, total = rank_for_share(torch.tensor(values, dtype=torch.float64), fraction), math.fsum(values)
    assert type(rank) is int
    assert 1 <= rank <= len(values)
    assert math.fsum(values[:rank]) >= fraction * total * (1 - 1e-12)
    assert rank == 1 or math.fsum(values[: rank - 1]) < fraction * total * (1 + 1e-12)


def curve(shape, parts):
    """Of a matrix [m, n] whose directions lose ``parts``, in parameters; one of rank 1 may be no smaller than it."""
    left_out = [math.fsum(parts[rank:]) for rank in range(len(parts) + 1)]
    return RankCosts(left_out, sum(shape), math.prod(shape))


@st.composite
def several_curves(draw, most=3, side=5):
    """Matrices of some rank each, of which some lose nothing however small they get."""
    curves = {}
    for index in range(draw(st.integers(1, most))):
        m, n = draw(st.integers(1, side)) * 4, draw(st.integers(1, side))
        losses = draw(st.lists(st.integers(0, 100), min_size=min(m, n), max_size=min(m, n)))
        curves[str(index)] = curve((m, n), sorted(losses, reverse=True))
    return curves


def cost_of(curves, ranks):
    return sum(one.whole if ranks[key] is None else ranks[key] * one.cost for key, one in curves.items())


def loss_of(curves, ranks):
    return sum(0.0 if ranks[key] is None else one.losses[ranks[key]] for key, one in curves.items())


def choices(one):
    """The ranks that save, and the matrix as it is."""
    return [rank for rank in range(1, len(one.losses)) if rank * one.cost < one.whole] + [None]


def budgets(curves):
    least = sum(min(one.cost, one.whole) for one in curves.values())
    return st.integers(least, sum(one.whole for one in curves.values()) + 3)


@given(several_curves(), st.data())
def test_what_is_allocated_fits_and_saves(curves, data):
    budget = data.draw(budgets(curves))
    ranks = allocate(curves, budget)
    assert ranks.keys() == curves.keys()
    assert cost_of(curves, ranks) <= budget
    for key, one in curves.items():
        assert ranks[key] in choices(one)
        if max(one.losses) == 0.0 and one.cost < one.whole:
            assert ranks[key] == 1
        if ranks[key] is not None and ranks[key] > 1:
            assert one.losses[ranks[key]] < one.losses[ranks[key] - 1]


@given(several_curves(), st.data())
def test_what_is_allocated_is_the_best_but_for_one_step(curves, data):
    """No choice of ranks that fits loses less by more than one purchase, of a rank or of a matrix as it is, takes away."""
    budget = data.draw(budgets(curves))
    ranks = allocate(curves, budget)
    every = (dict(zip(curves, some, strict=True)) for some in itertools.product(*map(choices, curves.values())))
    best = min(loss_of(curves, some) for some in every if cost_of(curves, some) <= budget)
    steps = [curves[key].losses[rank] for key, rank in ranks.items() if rank is not None]
    assert loss_of(curves, ranks) - best <= max(steps, default=0.0)
    # Nothing that is left to buy fits.
    left = budget - cost_of(curves, ranks)
    for key, rank in ranks.items():
        if rank is not None and curves[key].losses[rank] > 0.0:
            assert curves[key].whole - rank * curves[key].cost > left


@given(st.integers(2, 12), st.integers(2, 4), st.data())
def test_matrices_whose_ranks_alone_are_for_sale_get_the_best_ones(size, count, data):
    """Where every rank costs the same and whole matrices are dear, the largest losses are bought, one after the other."""
    losses = st.lists(st.integers(1, 10**6), min_size=size, max_size=size, unique=True)
    parts = [sorted(data.draw(losses), reverse=True) for _ in range(count)]
    curves = {str(i): RankCosts([math.fsum(one[r:]) for r in range(size + 1)], 1.0, 1e9) for i, one in enumerate(parts)}
    budget = data.draw(st.integers(count, count * size))
    rest = sorted((value for one in parts for value in one[1:]), reverse=True)[: budget - count]
    ranks = allocate(curves, budget)
    bought = math.fsum(value for one, rank in zip(parts, ranks.values(), strict=True) for value in one[1:rank])
    assert bought == math.fsum(rest)
    assert sum(ranks.values()) == budget


@given(several_curves())
def test_with_enough_for_all_nothing_is_lost(curves):
    ranks = allocate(curves, sum(one.whole for one in curves.values()))
    assert loss_of(curves, ranks) == 0.0


def test_a_matrix_that_matters_more_gets_more():
    curves = {"little": curve((40, 10), [1.0] * 10), "much": curve((40, 10), [100.0] * 10)}
    assert allocate(curves, 400) == {"little": 1, "much": 7}
    assert allocate(curves, 450) == {"little": 1, "much": None}


@given(several_curves(), st.integers(1, 1000))
def test_a_budget_below_rank_1_everywhere_is_refused(curves, missing):
    least = sum(min(one.cost, one.whole) for one in curves.values())
    with pytest.raises(SlimLSTMError, match=f"budget of .* too small for rank 1 at every matrix, which takes {least}"):
        allocate(curves, least - missing)
