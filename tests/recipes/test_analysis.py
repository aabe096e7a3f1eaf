"""The equations of the paper's norms, spectra and efficiency."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paper.analysis import block_maxima, efficiency, energy, norms, salient_lines
from paper.plots import norm_curves, spectra
from slimlstm import SlimLSTMError
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig

ROOT = Path(__file__).parents[2]


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


def test_spectra_are_drawn(tmp_path):
    spectra({"hh": [[2.0, 1.0, 0.5], [1.0, 0.1]], "ih": [[3.0, 3.0]]}, tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SlimLSTMError, match="without a positive value"):
        spectra({"hh": [[0.0, 0.0]]}, tmp_path / "spectra.png")


def test_matrices_are_drawn_from_a_trained_model(tmp_path):
    torch.manual_seed(0)
    model = AWDLSTM(AWDLSTMConfig(11, embedding_size=8, hidden_size=12))
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "decoder.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    command = [sys.executable, ROOT / "recipes" / "heatmaps.py", "--model", tmp_path, "--rank", "2", "--output", tmp_path]
    subprocess.run(command, check=True)
    for target in ("hh", "ih"):
        assert (tmp_path / f"heatmap-{target}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"heatmap-{target}.pdf").read_bytes().startswith(b"%PDF")


def test_the_page_about_the_paper_says_what_the_results_do(tmp_path):
    options = ("--pictures", tmp_path / "paper", "--page", tmp_path / "reproduction.md")
    subprocess.run([sys.executable, ROOT / "recipes" / "reproduction.py", *options], check=True)
    for name in ("reproduction.md", "paper/ptb.csv", "paper/ptb.tex"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.fixture
def results(tmp_path):
    """Made-up results of everything that the page can tell of, beside those on Penn Treebank that are there."""
    folder = tmp_path / "results"
    shutil.copytree(ROOT / "results" / "ptb_untuned", folder / "ptb_untuned", ignore=shutil.ignore_patterns("*int8*"))
    origin = {"provenance": {"commit": "abc", "processor": "a processor"}}
    control = {"perplexity": {"valid": 9.0, "test": 170.25}, "parameters": 12_000_000, "epochs": 8}
    control["config"] = {"optimizer": "adamw", "lr": 0.001}
    cell = {"perplexity": 70.0, "parameters": 20_000_000}
    trained = {
        **{"sizes": {"embedding_size": 400, "hidden_size": 650}, "parameters": 30_000_000, "epochs": 5, "seconds": 600.0},
        "config": {"corpus": "wikitext-2", "optimizer": "adamw", "dtype": "bfloat16", "dropout": 0.5, "device": "cpu"},
    }
    matrices = [
        (method, target, rank) for method in ("svd", "semi-nmf", "prune") for target in ("hh", "ih") for rank in (10, 50)
    ]
    numbers = {"l1": 1.0, "l1_std": 0.5, "l1_spread": 2.0, "nuclear": 3.0, "layer": 0}
    norms = {
        "rows": [
            {"method": method, "target": target, "rank": rank, **numbers}
            for method, target, rank in [("dense", "hh", 0), ("dense", "ih", 0), *matrices]
        ],
        "spectra": [
            {"target": target, "layer": 0, "singular_values": [2.0, 1.0], "energy": {"10": 0.25}} for target in ("hh", "ih")
        ],
    }
    speed = {
        "scope": "layers",
        **{"steps": 35, "batch": 20, "faster": {"rank 10": {"fused": 3.5, "plain PyTorch": 1.75}}},
    }
    task = {"label": "subset: 10 of 20 pairs", "limit": None, "metric": "accuracy"}
    of_task = {
        f"task_snli/{cell[0]}{'' if cell[0] == 'dense' else f'-{cell[1]}-{cell[2]:03d}'}-seed{seed}": {
            **{**task, "method": cell[0], "target": cell[1], "rank": cell[2], "seed": seed},
            **{"scores": {"accuracy": score + seed}, "examples": 100},
            "parameters": {"model": {"before": 100, "after": 100 if cell[0] == "dense" else 75}},
        }
        for cell, score in {
            ("dense", "none", 0): 79.0,
            ("svd", "hh", 4): 59.0,
            ("svd", "hh", 8): 69.0,
            ("svd", "ih", 4): 39.0,
            ("prune", "hh", 4): 64.0,
            ("prune", "hh", 8): 72.0,
        }.items()
        for seed in (0, 2)
    }
    over_seeds = {**task, "scores": {"accuracy": {"mean": 80.0, "standard_deviation": 1.41}}}
    elmo = {
        **{"options": {"lstm": {"dim": 512, "projection_dim": 128}}, "parameters": {"bilm": 3_000_000}, "epochs": 3},
        **{"config": {"corpus": ["wikitext-2"], "device": "cpu"}, "tokens": 2_000_000, "vocabulary": 33_000},
        **{"seconds": 600.0, "perplexity": {"valid": 150.0}},
    }
    for name, result in {
        **of_task,
        "task_snli/trained-elmo": over_seeds,
        "task_snli/latency": {
            part: {"svd, hh, 4": {"milliseconds": [1.0, 2.0, 3.0], "faster": 2.5, "parameters": {"after": 1_500_000}}}
            for part in ("elmo", "model")
        },
        "elmo_trained": elmo,
        "elmo_norms": norms,
        "ptb_untuned/int8": {**cell, "bytes": 36_000_000},
        "ptb_controls/ptb-tensor-train": control,
        "ptb_speed": {"rows": [speed]},
        "wikitext2_untuned/dense": {"perplexity": 66.0, "parameters": 30_000_000},
        "wikitext2_untuned/svd-hh-010": cell,
        "wikitext2_untuned/svd-ih-010": {**cell, "perplexity": 90.0},
        "wikitext2_untuned/fisher-ih-400": {**cell, "parameters": 30_000_000},
        "wikitext2_trained": trained,
        "wikitext2_curve/result": {**trained, "epochs": 2, "perplexity": {"valid": 205.0, "test": 195.5}},
        **{
            f"wikitext2_fine_tuned/{name}": {
                **{**cell, "perplexity": {"test": perplexity}, "epochs": 1},
                "config": {"optimizer": "asgd", "lr": 5.0, "dropout": 0.6},
            }
            for name, perplexity in (("dense", 64.0), ("svd-hh-010", 63.5), ("prune-hh-010", 65.0))
        },
        "wikitext2_norms": norms,
    }.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result | origin), encoding="utf-8")
    epochs = [
        {"epoch": epoch, "train_loss": math.log(500.0), "valid_perplexity": valid, "averaged": averaged, "seconds": seconds}
        for epoch, valid, averaged, seconds in ((0, 310.25, False, 300.0), (1, 205.0, True, 630.0))
    ]
    log = folder / "wikitext2_curve" / "log.jsonl"
    log.write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs), encoding="utf-8")
    return folder


def test_the_page_tells_of_all_that_is_there_and_what_is_missing(results, tmp_path):
    options = ("--results", results, "--pictures", tmp_path / "paper", "--page", tmp_path / "page.md")
    subprocess.run([sys.executable, ROOT / "recipes" / "reproduction.py", *options], check=True)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    for line in (
        "| TT-LSTM | 8 epochs, adamw 0.001 | 12.00M | 48.0 | 170.25 | 12M | 168.6 |",
        "| int8, this library |  | 20.00M | 36.0 | 70.00 |  |  |",
        "| LSTM layers | 35 | 20 | 10 | 3.50x | 1.75x | 2.13x |",
        "| 1 | 500.0 | 310.2 | last | 5 |",
        "| 2 | 500.0 | 205.0 | averaged | 10 |",
        # (70 - 66) / 66 of the perplexity for a third of the parameters; where none is saved there is no E(r).
        "| svd | hh | 10 | 20.00M | 70.00 | 99.92 | 0.182 | 62.49 | 63.50 |  | -0.057 |  |",
        "| fisher | ih | 400 | 30.00M | 70.00 |  |  |  |  |  |  |  |",
        # (80 - 60) / 80 and (80 - 70) / 80 for a quarter of the parameters: 1 and 0.5, mean 0.75.
        "| svd | hh | 60.00 | 70.00 | 70.00 | 65.00 | 0.75 | 87.27 | 88.46 | 88.46 | 88.18 | 0.01 |",
        "| SNLI | ESIM with it | svd, hh, 4 | 1.50M | 2.00 | 2.50x |",
        "| svd | ih | 40.00 |  | 40.00 | 40.00 | 2.00 | 78.15 | 88.48 | 88.48 | 86.77 | 0.06 |",
    ):
        assert line in page.splitlines()
    assert "\n    - WikiText-2: **holds** (1 of 1 comparison)\n    - SNLI: **holds** (1 of 1 comparison)\n" in page
    # Of four fifths of a hundred examples the standard error is four.
    assert "SNLI: **does not hold** (0 of 1 comparison); below the score's standard error of 4.00: 1 of 2" in page
    assert "trained on: subset: 10 of 20 pairs. Not compressed: ESIM + ELMo 80.00 ± 1.41 (printed 88.5). Means of 2" in page
    assert (
        "- ELMo: 3.00M parameters (512 cells, projected to 128; the paper's: 4096 and 512), trained on wikitext-2" in page
    )
    assert (
        "Fine-tuned, 2 of 48 cells have been run, each for 1 epoch by averaged SGD from a rate of 5 with dropout at 0.6 of "
        "the published rates.\n" in page
    )
    assert "run; missing, of the 12 that the paper prints: semi-nmf hh 10, semi-nmf hh 400, semi-nmf ih 10" in page
    assert page.count("| svd | hh | 50 |") == 1, "of cells that were neither printed nor run there is no row"
    assert "WikiText-2: **holds in part** (1 of 2 comparisons)" in page
    assert "    - WikiText-2: not measured; fine-tuned **holds** (1 of 1 comparison)" in page.splitlines()
    assert "in 10 minutes on cpu (a processor). Its test perplexity is 195.50." in page
    assert "has 30.00M parameters (embedding 400, hidden 650; the paper's: 400, 1150) and was trained" in page
    assert "on wikitext-2 for 5 epochs by AdamW with one cycle in bfloat16, with dropout at 0.5" in page
    assert "10 minutes on cpu (a processor). It has a test perplexity of 66.00" in page
    assert "WikiText-2, were not measured" not in page
    assert "- Not run: hh as SVD factors of rank 10, fine-tuned; int8, PyTorch's dynamic quantisation; a smaller" in page
    for name in ("ptb-perplexity", "wikitext2-perplexity", "wikitext2-norms", "wikitext2-spectra", "elmo-norms"):
        assert (tmp_path / "paper" / f"{name}.png").exists()
    assert "wikitext2-spectra.png" in page
