"""Models as programs: traces, scripts and exports are right for inputs of any size, or refused in words."""

import subprocess
import sys

import pytest
import torch
from helpers import assert_near
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from slimlstm import LowRank, LowRankLSTM, LowRankLSTMCell, SlimLSTMError, compress_, export_onnx

IN, H = 4, 1024
"""So large that PyTorch's operators would rather loop over thin factors than multiply them."""


def thin(**settings) -> LowRankLSTM:
    ranks = dict.fromkeys(("weight_hh_l0", "weight_hh_l0_reverse")[: 1 + settings.get("bidirectional", False)], 2)
    return LowRankLSTM(IN, H, ranks=ranks, **settings).eval()


class First(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x):
        return self.lstm(x)[0]


LAYERS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "training": {"train": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("sizes", "other"), [((3, 1), (3, 5)), ((3, 1), (7, 1)), ((1, 2), (4, 3))])
def test_traces_hold_for_other_sizes(settings, grad, sizes, other):
    settings = dict(settings)
    train = settings.pop("train", False)
    model = First(thin(**settings)).train(train)
    x = torch.randn(*other, IN)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, torch.randn(*sizes, IN))
        assert_near({"output": traced(x)}, {"output": model(x)})


def test_layers_that_clip_are_not_traced():
    with pytest.raises(SlimLSTMError, match="cannot be traced"):
        torch.jit.trace(First(thin(cell_clip=1.0)), torch.randn(3, 1, IN))


@pytest.mark.parametrize("module", [LowRankLSTM(3, 4), LowRankLSTMCell(3, 4)])
def test_scripting_is_refused_in_words(module):
    with pytest.raises(SlimLSTMError, match=r"cannot be scripted; trace the model"):
        torch.jit.script(nn.Sequential(module))
    torch.jit.script(module.to_dense())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", [(5, 1), (5, 2)])
def test_pytorchs_own_onnx_files_hold_for_other_sizes(sizes, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, path = First(thin()), torch.randn(9, 3, IN), str(tmp_path / "model.onnx")
    axes = {name: {0: "steps", 1: "batch"} for name in "xy"}
    torch.onnx.export(
        model, (torch.randn(*sizes, IN),), path, input_names=["x"], output_names=["y"], dynamic_axes=axes, dynamo=False
    )
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    assert_near({"output": torch.from_numpy(found)}, {"output": model(x)})


class Packed(nn.Module):
    def __init__(self, states):
        super().__init__()
        self.lstm, self.states = nn.LSTM(3, 4), states

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        given = (torch.zeros(1, x.shape[1], 4),) * 2 if self.states else None
        return pad_packed_sequence(self.lstm(packed, given)[0])[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_packed_sequences_are_refused_by_export_in_words(states, compressed, tmp_path):
    pytest.importorskip("onnxscript")
    model = Packed(states).eval()
    if compressed:
        compress_(model, LowRank(rank=2))
    with pytest.raises(SlimLSTMError, match="packed sequences cannot be written to ONNX"):
        export_onnx(model, (torch.randn(5, 2, 3), torch.tensor([5, 3])), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_export_takes_inputs_and_models_with_gradients(tmp_path):
    pytest.importorskip("onnxscript")
    model, x = First(nn.LSTM(3, 4)), torch.randn(5, 2, 3, requires_grad=True)
    model(x).sum().backward()
    gradient = x.grad.clone()
    export_onnx(model, x, tmp_path / "model.onnx")
    assert torch.equal(x.grad, gradient)


@pytest.mark.slow
def test_exported_programs_load_in_another_process(tmp_path):
    model, x = First(LowRankLSTM(3, 4, ranks={"weight_hh_l0": 2})).eval(), torch.randn(5, 2, 3)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.save((x, model(x)), tmp_path / "data.pt")
    code = (
        "import sys, torch, slimlstm.ops\n"
        "x, y = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x), y)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt2", tmp_path / "data.pt"], check=True)
