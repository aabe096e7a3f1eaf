"""Codes of 4 bits in ONNX files: exact, half as large as int8, and widened once, when a runtime loads the file."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import INPUTS, RANK, H, feed, lstm_parts, run, save, written_out
from torch import nn

import slimlstm as sl
from slimlstm.methods import rounded
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.find import find_lstms
from slimlstm.onnx.graph import graphs_of
from slimlstm.weight_files import read_tensors

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
WIDE = 80  # two groups of columns


def kinds(path):
    """The dtypes of a file's constants."""
    return {tensor.data_type for graph in graphs_of(onnx.load(path).graph) for tensor in graph.initializer}


def left_after_loading(path, folder):
    """The operators that a runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {node.op_type for graph in graphs_of(onnx.load(folder / "optimized.onnx").graph) for node in graph.node}


def plain(tensors, x, bidirectional):
    """What PyTorch computes with the weights of a file."""
    lstm = nn.LSTM(INPUTS, WIDE, bidirectional=bidirectional)
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            key = f"lstm.{name}"
            parameter.copy_(tensors[key] if key in tensors else tensors[f"{key}_u"] @ tensors[f"{key}_v"])
        return lstm(torch.from_numpy(x))[0].numpy()


@pytest.mark.parametrize("rank", [None, RANK])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_operators(rank, bidirectional, tmp_path):
    direction = "bidirectional" if bidirectional else "forward"
    node, weights = lstm_parts(np.random.default_rng(0), direction, hidden=WIDE)
    path = save(tmp_path / "model.onnx", [node], weights, node.output[:1], opset=21, ir_version=10)
    config = sl.Quantize("int4") if rank is None else sl.LowRank("svd", rank=rank, storage="int4")
    values = feed(path)
    found = {}
    for form in ("lstm", "scan"):
        small = tmp_path / f"{form}.onnx"
        report = compress_onnx(path, config, small, form=form)
        assert report.model.bytes_after == small.stat().st_size
        assert TensorProto.INT4 in kinds(small)
        assert "Cast" not in left_after_loading(small, tmp_path)
        matrices = [tensor for name, tensor in read_tensors(small).items() if "weight" in name]
        assert all(torch.equal(rounded(matrix, "int4"), matrix) for matrix in matrices)
        (found[form],) = run(small, values)
    together = found["lstm"].transpose(0, 2, 1, 3).reshape(*values["x"].shape[:2], -1)
    expected = plain(read_tensors(tmp_path / "lstm.onnx"), values["x"], bidirectional)
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["scan"], found["lstm"], rtol=0, atol=1e-5)
    (layer,) = find_lstms(onnx.load(tmp_path / "lstm.onnx"), path)
    assert {location.storage for location in layer.locations} == {"int4"}
    with pytest.raises(sl.SlimLSTMError, match=r"already|would take"):
        compress_onnx(tmp_path / "lstm.onnx", config, tmp_path / "again.onnx", form="lstm")


@pytest.mark.parametrize("config", [sl.Quantize("int4"), sl.LowRank("svd", rank=RANK, storage="int4")])
def test_batches_help_to_round(config, tmp_path):
    rng = np.random.default_rng(0)
    node, weights = lstm_parts(rng, "forward", hidden=WIDE)
    path = save(tmp_path / "model.onnx", [node], weights, node.output[:1], opset=21, ir_version=10)
    size = feed(path)["x"].shape[-1]
    mixing = rng.standard_normal((size, size)).astype(np.float32) * np.logspace(0, -2, size, dtype=np.float32)[:, None]
    runs = [{"x": rng.standard_normal((20, 3, size)).astype(np.float32) @ mixing} for _ in range(9)]
    errors = []
    for batches in (None, iter(runs[:6])):
        compress_onnx(path, config, tmp_path / "small.onnx", batches=batches)
        errors.append(sum(np.square(run(path, one)[0] - run(tmp_path / "small.onnx", one)[0]).sum() for one in runs[6:]))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("gemm", [False, True])
def test_lstms_that_are_written_out(gemm, rank, tmp_path, monkeypatch):
    monkeypatch.setattr("slimlstm.onnx.compress._check_size", lambda *_: None)  # nodes outweigh so few weights
    nodes, weights, _ = written_out(np.random.default_rng(0), gemm)
    (split,) = (node for node in nodes if node.op_type == "Split")
    split.attribute.append(helper.make_attribute("num_outputs", 4))
    path = save(tmp_path / "model.onnx", nodes, weights, ["h", "c"], opset=21, ir_version=10)
    config = sl.Quantize("int4") if rank is None else sl.LowRank("svd", rank=rank, storage="int4")
    compress_onnx(path, config, tmp_path / "small.onnx")
    compress_onnx(path, sl.LowRank("svd", rank=rank) if rank else sl.Quantize("bfloat16"), tmp_path / "plain.onnx")
    assert TensorProto.INT4 in kinds(tmp_path / "small.onnx")
    rng = np.random.default_rng(1)
    values = {
        name: rng.standard_normal((3, size)).astype(np.float32) for name, size in (("x", INPUTS), ("h0", H), ("c0", H))
    }
    for one, other in zip(run(tmp_path / "plain.onnx", values), run(tmp_path / "small.onnx", values), strict=True):
        assert 0 < np.linalg.norm(one - other) < 0.2 * np.linalg.norm(one)


@pytest.mark.parametrize(
    ("opset", "storage", "message"),
    [
        (17, "int4", "opset 17 has no integers of 4 bits.* of opset 21"),
        (21, "int3", "no integers of 3 bits, so int3 would save nothing"),
        (21, "int6", "no integers of 6 bits, so int6 would save nothing"),
    ],
)
def test_codes_that_would_save_nothing_are_refused(opset, storage, message, tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0))
    path = save(tmp_path / "model.onnx", [node], weights, node.output, opset=opset)
    with pytest.raises(sl.SlimLSTMError, match=message):
        compress_onnx(path, sl.Quantize(storage), tmp_path / "small.onnx")
    assert not (tmp_path / "small.onnx").exists()


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, WIDE, 2)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["auto", "scan"])
@pytest.mark.parametrize("storage", ["int4", "int3"])
def test_exports(storage, form, tmp_path):
    model, x = Outputs().eval(), torch.randn(5, 2, INPUTS)
    sl.compress_(model, sl.LowRank("svd", rank=40, storage=storage))
    found = sl.export_onnx(model, x, tmp_path / "small.onnx", form=form)
    assert found.opset == 21
    assert TensorProto.INT4 in kinds(tmp_path / "small.onnx")
    older = sl.export_onnx(model, x, tmp_path / "older.onnx", opset=18)
    assert TensorProto.INT4 not in kinds(tmp_path / "older.onnx")
    assert found.bytes < older.bytes
    model.lstm.backend = "reference"
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "small.onnx", {"x": x.numpy()})[0], model(x), rtol=0, atol=1e-5)
