"""The backends that :func:`slimlstm.bench.explain` reports are those that run."""

import pytest
import torch
from strangers import STRANGERS
from torch import nn

from slimlstm import LowRank, LowRankLSTM, Prune, Quantize, SlimLSTMError, compress_, ops
from slimlstm.bench import Explanation, explain
from slimlstm.ops import cpu, native

needs_kernel = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))


@pytest.fixture
def ran(monkeypatch):
    """The backends that ran, in order: those of layers, and the recurrences of cells."""
    seen = []

    def watch(owner, name, label, table=None):
        original = table[name] if table else getattr(owner, name)

        def watched(*args, **kwargs):
            seen.append(label)
            return original(*args, **kwargs)

        if table:
            monkeypatch.setitem(table, name, watched)
        else:
            monkeypatch.setattr(owner, name, watched)

    for name in ("dense", "reference", "training"):
        watch(None, name, name, ops.BACKENDS)
    watch(cpu, "run", "fused")
    watch(ops.reference, "cell", "reference")
    return seen


def expected(explanation: Explanation) -> list[str]:
    return sorted(layer.backend for layer in explanation.layers for _ in range(layer.calls))


MODES = {
    "inference": (torch.no_grad, False, torch.float32),
    "training": (torch.enable_grad, True, torch.float32),
    "evaluation": (torch.enable_grad, False, torch.float32),
    "float64": (torch.no_grad, False, torch.float64),
}


@pytest.mark.parametrize("name", ["CRNN", "seq2seq", "tagger", "shared", "cell", "projected"])
@pytest.mark.parametrize(("mode", "training", "dtype"), MODES.values(), ids=MODES)
@pytest.mark.parametrize("config", [LowRank(rank=2), None], ids=["factored", "masked"])
@pytest.mark.slow
def test_the_reported_backends_run(name, mode, training, dtype, config, ran):
    stranger = STRANGERS[name]
    model = stranger.make().to(dtype)
    compress_(model, LowRank(rank=2, target="ih"))
    compress_(model, config or Prune(keep=0.5, target="hh"))
    model.train(training)
    torch.manual_seed(1)
    inputs = [value.to(dtype) if value.is_floating_point() else value for value in stranger.inputs()]
    with mode():
        explanation = explain(model, *inputs)
        reported, inside = expected(explanation), sorted(ran)
    assert reported == inside
    assert reported
    assert {layer.module for layer in explanation.layers} <= {path for path, _ in model.named_modules()}
    for layer in explanation.layers:
        assert layer.reason
        assert layer.reason[:20] in str(explanation)
        assert (layer.instruction_set is None) == (layer.backend != "fused")


@needs_kernel
@torch.no_grad()
def test_storages_instructions_and_threads():
    model = nn.ModuleDict({"lstm": nn.LSTM(5, 8, 2, bidirectional=True)})
    compress_(model, Quantize("int8", filter=lambda site: site.layer == 1 and site.target == "hh"))
    explanation = explain(model["lstm"], torch.randn(3, 2, 5))
    assert [(one.module, one.layer, one.backend, one.storage) for one in explanation.layers] == [
        ("", 0, "fused", "float32"),
        ("", 1, "fused", "float32, int8"),
    ]
    assert {one.instruction_set for one in explanation.layers} == {native.instruction_set()}
    assert {one.threads for one in explanation.layers} == {torch.get_num_threads()}
    assert explanation.to_dict()["layers"][1]["storage"] == "float32, int8"


def test_a_requested_backend():
    module = LowRankLSTM(5, 8, backend="dense")
    (one,) = explain(module, torch.randn(3, 2, 5)).layers
    assert (one.backend, one.reason) == ("dense", "requested by backend='dense'")


def test_layers_that_are_not_compressed():
    model = STRANGERS["seq2seq"].make()
    compress_(model, LowRank(rank=2, filter=lambda site: site.module == "decoder"))
    explanation = explain(model, *STRANGERS["seq2seq"].inputs())
    (encoder, decoder) = explanation.layers
    assert (encoder.module, encoder.backend, encoder.calls) == ("encoder", "nn.LSTM", 1)
    assert "not compressed" in encoder.reason
    assert (decoder.module, decoder.backend, decoder.calls) == ("decoder", "dense", 3)
    assert decoder.reason.startswith("the input is torch.float64")


def test_models_without_lstms_are_refused_and_hooks_removed():
    model = STRANGERS["tagger"].make()
    with pytest.raises(SlimLSTMError, match="the call reached no LSTM"):
        explain(model.labels, torch.randn(2, 16, dtype=torch.float64))
    with pytest.raises(TypeError):
        explain(model, torch.randn(2))
    assert not model.lstm._forward_pre_hooks
