"""The equations of the paper's norms, spectra and efficiency."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slimlstm import SlimLSTMError
from slimlstm.analysis import efficiency, energy, norms
from slimlstm.plots import norm_curves

ROOT = Path(__file__).parents[1]


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


def test_norms_are_drawn(tmp_path):
    titles = ("l1 of ih", "l1 of hh", "nuclear of ih")
    panels = {title: {"svd": [(10, 1.0), (50, 2.0)], "prune": [(10, 0.5)]} for title in titles}
    norm_curves(panels, dict.fromkeys(titles, 2.5), tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SlimLSTMError, match="can be drawn as"):
        norm_curves(panels, dict.fromkeys(titles, 2.5), tmp_path / "norms.nothing")


def test_the_page_about_the_paper_says_what_the_results_do(tmp_path):
    options = ("--pictures", tmp_path / "paper", "--page", tmp_path / "reproduction.md")
    subprocess.run([sys.executable, ROOT / "recipes" / "paper.py", *options], check=True)
    for name in ("reproduction.md", "paper/ptb.csv", "paper/ptb.tex"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "docs" / name).read_text(encoding="utf-8")
