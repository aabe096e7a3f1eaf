"""The recipe that times a model: ratios to the best rival, of outputs that were checked."""

import json

import pytest
import torch
from recipe_helpers import RECIPES, run_script


def test_outputs_are_checked_before_they_are_timed(trained, tmp_path):
    command = [RECIPES / "speed.py", "--model", trained, "--output", tmp_path / "speed.json"]
    command += ["--ranks", "2", "3", "--steps", "5", "1", "--batch", "1", "3", "--seconds", "0.001"]
    assert not run_script(*command)
    result = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert len(result["rows"]) == 8
    for row in result["rows"]:
        assert set(row["candidates"]) == {
            *("PyTorch oneDNN", "PyTorch native"),
            *(f"{backend} rank {rank}" for backend in ("fused", "reference", "dense") for rank in (2, 3)),
        }
        assert all(one["error"] < 1e-5 for one in row["candidates"].values())
        times = {name: one["microseconds"] for name, one in row["candidates"].items()}
        dense = min(times["PyTorch oneDNN"], times["PyTorch native"])
        for name, ratios in row["faster"].items():
            assert ratios["fused"] == pytest.approx(dense / times[f"fused {name}"])
            plain = min(times[f"reference {name}"], times[f"dense {name}"])
            assert ratios["plain PyTorch"] == pytest.approx(dense / plain)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no LSTM in bfloat16 for this processor"
)
def test_gradients_are_checked_before_training_is_timed(trained, tmp_path):
    command = [RECIPES / "speed.py", "--model", trained, "--output", tmp_path / "speed.json"]
    command += ["--training", "--ranks", "2", "--steps", "5", "--batch", "3", "--seconds", "0.001"]
    assert not run_script(*command)
    rows = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["rows"]
    assert [row["scope"] for row in rows] == ["float32", "bfloat16"]
    for row, most in zip(rows, (1e-5, 5e-2), strict=True):
        assert all(0.0 < one["error"] < most for one in row["candidates"].values())
        times = {name: one["microseconds"] for name, one in row["candidates"].items()}
        dense = min(times["PyTorch oneDNN"], times["PyTorch native"])
        assert row["faster"]["rank 2"]["training"] == pytest.approx(dense / times["rank 2"])
