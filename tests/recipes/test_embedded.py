"""The embedded language model: its files, and its quality after every kind of compression."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimlstm import Calibration, LowRank, Quantize, calibrate, compress_
from slimlstm.demo.model import FOLDER, embedded_model, encode, held_out_text, held_out_tokens
from slimlstm.evaluate import NextTokens, perplexity
from slimlstm.ops import native
from slimlstm.pipeline.fitting import PASSES


def test_perplexity_on_text_it_never_saw():
    model = embedded_model()
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert perplexity(model, held_out_tokens()[:8_000], streams=20).perplexity < 60


def test_the_stored_ids_are_those_of_the_text():
    assert torch.equal(encode(held_out_text()), held_out_tokens())


def test_the_files_take_at_most_ten_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000


def test_the_text_is_attributed():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for words in ("WikiText-2", "Wikipedia", "CC BY-SA", "Merity"):
        assert words in readme


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_perplexity_of_the_embedded_model(storage, backend):
    """All matrices; with the kernel, inputs and hidden states are rounded too."""
    if backend == "fused" and native.missing:
        pytest.skip(native.missing)
    tokens = held_out_tokens()[:6000]
    dense, model = embedded_model(), embedded_model()
    compress_(model, Quantize(storage))
    for module in model.lstms:
        module.backend = backend
    before, after = (perplexity(one, tokens, streams=20).perplexity for one in (dense, model))
    assert abs(after / before - 1) < 0.005


@pytest.mark.skipif(bool(native.missing), reason=native.missing or "")
def test_rounded_inputs_change_logits_less_than_rounded_weights():
    tokens = held_out_tokens()[:6000].view(20, -1).t()
    model = embedded_model()
    with torch.no_grad():
        dense = model(tokens, None)[0]
        compress_(model, Quantize("int8"))
        fused = model(tokens, None)[0]
        for module in model.lstms:
            module.backend = "reference"
        rounded = model(tokens, None)[0]
    difference = (fused - rounded).norm() / rounded.norm()
    assert 1e-4 < difference < 0.0025
    assert difference < (rounded - dense).norm() / dense.norm()


@pytest.fixture(scope="module")
def calibrated() -> tuple[Calibration, Tensor, float]:
    """Of the embedded model on some held-out text; text after that, and the loss on it."""
    tokens, model = held_out_tokens(), embedded_model()
    text = tokens[:3000].view(20, -1).t()
    batches = [text[start : start + 51] for start in range(0, len(text) - 1, 50)]

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(m(batch[:-1])[0].flatten(0, 1), batch[1:].flatten(), reduction="none")

    after = tokens[3000:7000]
    return calibrate(model, batches, loss), after, perplexity(model, after).loss


def rise(config: LowRank, calibrated: tuple[Calibration, Tensor, float]) -> float:
    calibration, text, before = calibrated
    model = embedded_model()
    compress_(model, config, calibration=calibration)
    return perplexity(model, text).loss - before


def test_a_trained_model_loses_less_by_what_it_was_calibrated_for(calibrated):
    """On text that it was not calibrated on: SVD loses twice as much as Fisher-weighted factors of the same size."""
    rises = {method: rise(LowRank(method, keep=0.25), calibrated) for method in ("svd", "activation", "fisher")}
    assert rises["fisher"] < 0.5 * rises["svd"]
    assert rises["activation"] < rises["svd"]


def test_less_is_lost_on_text_that_was_not_seen():
    text = held_out_tokens()
    seen, unseen = (part.view(20, -1).t() for part in (text[:5000], text[5000:8000]))
    batches = [(start, seen[start : start + 71]) for start in range(0, len(seen) - 1, 70)]
    losses = {}
    for refits in (0, None):
        model = embedded_model()
        report = compress_(model, LowRank("fisher", keep=0.1), batches=batches, loss=NextTokens(), refit=refits)
        with torch.no_grad():
            logits, _ = model(unseen[:-1])
        losses[refits] = float(cross_entropy(logits.flatten(0, 1), unseen[1:].flatten()))
    with torch.no_grad():
        logits, _ = embedded_model()(unseen[:-1])
    dense = float(cross_entropy(logits.flatten(0, 1), unseen[1:].flatten()))
    assert losses[None] - dense < 0.95 * (losses[0] - dense)
    assert f"6 matrices were fitted {PASSES} times again to their new inputs" in report.notes


def test_int8_factors_are_fitted_before_they_are_rounded():
    text = held_out_tokens()[:400].view(20, -1).t()
    model = embedded_model()
    config = LowRank("activation", keep=0.2, storage="int8")
    report = compress_(model, config, batches=[(text,)])
    again = compress_(copy.deepcopy(model), Quantize("int8"))
    assert all(site.storage == "int8" for site in report.sites)
    assert max(site.relative_error for site in again.sites) == 0.0
    assert "fitted 2 times again" in str(report)
