"""The equations of the paper's norms, energy, efficiency, block maxima and salient lines."""

import pytest
import torch

from paper.analysis import block_maxima, efficiency, energy, norms, salient_lines
from slimlstm import SlimLSTMError


def test_norms_by_hand():
    found = norms(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    assert (found.l1, found.l1_std, found.l1_spread) == pytest.approx((4.0, 0.5, 0.5))
    assert found.nuclear == pytest.approx(7.0)


def test_norms_scale_and_the_printed_spread_is_n_variances():
    matrix = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once, thrice = norms(matrix), norms(-3.0 * matrix)
    assert once.l1_spread == pytest.approx(5 * once.l1_std**2)
    assert (thrice.l1, thrice.l1_std, thrice.nuclear) == pytest.approx((3 * once.l1, 3 * once.l1_std, 3 * once.nuclear))
    assert thrice.l1_spread == pytest.approx(9 * once.l1_spread)
    assert once.l1 == pytest.approx(float(torch.linalg.matrix_norm(matrix, 1)))
    assert once.nuclear == pytest.approx(float(torch.linalg.matrix_norm(matrix, "nuc")))


def test_energy_by_hand():
    assert energy(torch.tensor([2.0, 1.0, 0.0])).tolist() == pytest.approx([0.8, 1.0, 1.0])
    with pytest.raises(SlimLSTMError, match="without a positive value"):
        energy(torch.zeros(2))


def test_efficiency_by_hand():
    assert efficiency(80.0, 100.0, 60, 100) == pytest.approx(0.2 / 0.4)
    assert efficiency(120.0, 100.0, 60, 100, lower=True) == pytest.approx(0.2 / 0.4)
    assert efficiency(110.0, 100.0, 75, 100) == pytest.approx(-0.1 / 0.75)
    assert efficiency(100.0, 100.0, 75, 100) == 0.0


def test_efficiency_is_the_printed_one_where_the_paper_applies_it():
    """Semi-NMF of hh at r = 10 on Penn Treebank, from the base and the counts that the paper used there."""
    assert efficiency(78.5, 59.0, 13_136_600, 24_221_600, lower=True) == pytest.approx(0.72, abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.0, 0.0, 1, 2), "positive"), ((1.0, 1.0, 2, 2), "none is saved"), ((1.0, 1.0, 0, 2), "none is left")],
)
def test_efficiency_needs_something_saved(arguments, message):
    with pytest.raises(SlimLSTMError, match=message):
        efficiency(*arguments)


def test_block_maxima_by_hand():
    matrix = torch.tensor([[1.0, -2.0, 0.0, 3.0], [0.0, 0.0, -5.0, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]])
    assert block_maxima(matrix, 2, 2, groups=2).tolist() == [[2.0, 5.0], [4.0, 1.0]]
    assert torch.equal(block_maxima(matrix, 9, 9, groups=1), matrix.abs())
    assert torch.equal(block_maxima(matrix.T, 9, 9), matrix.T.abs())


def test_no_block_reaches_over_the_border_of_a_gate():
    gates = torch.arange(1.0, 5.0).repeat_interleave(7)[:, None].expand(28, 5)
    assert block_maxima(gates, 11, 3).tolist() == [[gate] * 3 for gate in (1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0)]


@pytest.mark.parametrize(("rows", "columns", "groups"), [(3, 2, 4), (4, 0, 4), (4, 2, 3), (4, 2, 0)])
def test_pictures_that_cannot_be_are_refused(rows, columns, groups):
    with pytest.raises(SlimLSTMError, match="8 rows in"):
        block_maxima(torch.ones(8, 3), rows, columns, groups)


def test_salient_lines_by_hand():
    matrix = torch.ones(4, 10)
    matrix[2] *= -5.0
    matrix[:, 7] *= 3.0
    found = salient_lines(matrix, 0.1)
    # Rows sum to 12, 12, 60, 12, columns to 8, and one to 24.
    assert (found.rows, found.columns) == ((2,), (7,))
    assert (found.rows_hold, found.columns_hold) == pytest.approx((60 / 96, 24 / 96))
    assert salient_lines(torch.ones(20, 40), 0.05).columns_hold == pytest.approx(0.05)


@pytest.mark.parametrize(("matrix", "share"), [(torch.zeros(2, 2), 0.5), (torch.ones(2, 2), 0.0), (torch.ones(2, 2), 1.1)])
def test_lines_of_nothing_are_refused(matrix, share):
    with pytest.raises(SlimLSTMError, match="no largest ones"):
        salient_lines(matrix, share)
