import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimlstm.errors import SlimLSTMError
from slimlstm.rank import break_even_rank, rank_for_energy, rank_for_fraction, saves

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
    assert saves(shape, rank) is (factor_numbers(shape, rank) < math.prod(shape))


@pytest.mark.parametrize("shape", [(4600, 1150), (4, 4), (6, 3), (1600, 400)])
def test_a_rank_saves_below_break_even_and_no_more_at_it(shape):
    rank = int(break_even_rank(shape))
    assert saves(shape, rank - 1)
    assert not saves(shape, rank)


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
