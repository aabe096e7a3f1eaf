"""The form that a layer takes in an ONNX file: the LSTM operator or a Scan, by predicted time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slimlstm import LowRank, LowRankLSTM, Quantize, SlimLSTMError
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.find import find_lstms
from slimlstm.onnx.forms import COSTS, FORMS, choose_form, predicted
from slimlstm.onnx.reading import read_model
from slimlstm.ops.weights import Direction
from slimlstm.pipeline.report import Report

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
from onnx_files import INPUTS, lstm_parts, run, save  # noqa: E402 (imports onnx)

WIDE = 64
STORED = Path(__file__).parents[2] / "results" / "onnx_forms.json"


def directions(hidden, rank=None, storage="float32", count=1, dtype=torch.float32, **more):
    """Weights without numbers, of as many inputs as hidden units."""

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    matrix = empty(4 * hidden, hidden) if rank is None else (empty(4 * hidden, rank), empty(rank, hidden))
    return [Direction(matrix, matrix, None, None, None, storage, storage)._replace(**more)] * count


CASES = {
    "small factors, small layer": (directions(64, 4), "lstm"),
    "small layer, int8": (directions(64, storage="int8"), "lstm"),
    "both directions": (directions(64, 4, count=2), "lstm"),
    "dense": (directions(1024), "lstm"),
    "dense in bfloat16": (directions(1024, storage="bfloat16"), "lstm"),
    "factors, large layer": (directions(1024, 200), "scan"),
    "factors, large layer, both directions": (directions(1024, 200, count=2), "scan"),
    "int8, large layer": (directions(1024, storage="int8"), "scan"),
}


@pytest.mark.parametrize(("layer", "expected"), CASES.values(), ids=CASES)
def test_the_faster_form_is_chosen_and_the_reason_told(layer, expected):
    form = choose_form(layer)
    assert form.name == expected
    assert ("would take" in form.reason) == (expected == "lstm" and "no factors" not in form.reason)
    assert str(form).startswith(f"{expected}: ")
    for asked in FORMS[1:]:
        assert str(choose_form(layer, asked)) == f"{asked}: as asked for"


def test_int8_is_multiplied_as_integers_where_these_are_faster():
    assert choose_form(directions(1024, storage="int8")).is_integer
    small = directions(64, 4, storage="int8", cell_clip=3.0)
    assert not choose_form(small).is_integer
    assert choose_form(small, "scan").is_integer
    assert sum(predicted(small, "scan", is_integer=True)) > sum(predicted(small, "scan"))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (directions(8, hr=torch.empty(4, 8)), "the LSTM operator has no projections"),
        (directions(8, cell_clip=1.0), "the LSTM operator clips gates, not cells"),
        (directions(8, dtype=torch.float64), "ONNX Runtime has the LSTM operator for float32 only"),
    ],
    ids=["projected", "clipped", "float64"],
)
def test_layers_that_the_operator_cannot_compute_are_scans(layer, reason):
    assert str(choose_form(layer)) == f"scan: {reason}"
    with pytest.raises(SlimLSTMError, match=f"form='lstm' is not possible, because {reason}; give form='scan' or 'auto'"):
        choose_form(layer, "lstm")


@pytest.mark.parametrize("form", ["LSTM", "", None, 3])
def test_an_unknown_form_is_refused(form):
    with pytest.raises(SlimLSTMError, match=r"form=.* is none of 'auto', 'lstm', 'scan'"):
        choose_form(directions(8), form)


def test_the_costs_are_the_measured_ones():
    assert json.loads(STORED.read_text(encoding="utf-8"))["costs"] == COSTS


@pytest.mark.parametrize(
    "config", [LowRank("svd", rank=2), LowRank("svd", rank=2, storage="int8"), Quantize("int8")], ids=str
)
def test_operators_of_a_file_become_scans_where_these_are_faster(config, tmp_path, monkeypatch):
    node, weights = lstm_parts(np.random.default_rng(0), "bidirectional", states=True, hidden=WIDE)
    path = save(tmp_path / "model.onnx", [node], weights, node.output)
    stays = compress_onnx(path, config, tmp_path / "operator.onnx")
    assert stays.forms["lstm"].startswith("lstm: a Scan would take ")
    monkeypatch.setitem(COSTS, "operator_call", 1e6)
    report = compress_onnx(path, config, tmp_path / "scan.onnx")
    assert report.forms["lstm"].startswith("scan: a Scan takes ")
    assert "a Scan takes" in str(report)
    assert Report.from_dict(json.loads(report.to_json())).forms == report.forms
    kinds = {node.op_type for node in onnx.load(tmp_path / "scan.onnx").graph.node}
    assert "Scan" in kinds
    assert "LSTM" not in kinds
    rng = np.random.default_rng(1)
    values = {
        "x": rng.standard_normal((7, 3, INPUTS)),
        **{name: rng.standard_normal((2, 3, WIDE)) for name in ("h0", "c0")},
    }
    values = {name: value.astype(np.float32) for name, value in values.items()}
    for one, other in zip(*(run(tmp_path / f"{name}.onnx", values) for name in ("operator", "scan")), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 if config == LowRank("svd", rank=2) else 0.05)
    read = [location for lstm in find_lstms(read_model(tmp_path / "scan.onnx"), path) for location in lstm.locations]
    assert [location.name for location in read] == ["weight_ih_l0", "weight_hh_l0"] * 2


PECULIAR = {
    "clip": ({"clip": 3.0}, 17, "the operator has clip"),
    "input_forget": ({"input_forget": 1}, 17, "the operator has input_forget"),
    "activations": ({"activations": ["HardSigmoid", "Tanh", "Tanh"]}, 17, "the operator has other activations"),
    "old opset": ({}, 12, "the file's opset 12 is older than 13"),
    "batch first": ({"layout": 1}, 17, "the operator has a batch-first layout"),
}


@pytest.mark.parametrize(("attributes", "opset", "reason"), PECULIAR.values(), ids=PECULIAR)
def test_operators_that_no_scan_can_replace_stay(attributes, opset, reason, tmp_path, monkeypatch):
    monkeypatch.setitem(COSTS, "operator_call", 1e6)
    node, weights = lstm_parts(np.random.default_rng(0), **attributes)
    path = save(tmp_path / "model.onnx", [node], weights, node.output, opset)
    with pytest.raises(SlimLSTMError, match=f"lstm cannot become a Scan, because {reason}; give form='lstm' or 'auto'"):
        compress_onnx(path, LowRank("svd", rank=2), tmp_path / "small.onnx", form="scan")
    assert not (tmp_path / "small.onnx").exists()
    assert compress_onnx(path, LowRank("svd", rank=2), tmp_path / "small.onnx").forms == {"lstm": f"lstm: {reason}"}


def test_both_directions_share_equal_constants():
    from slimlstm.onnx.layers import layer_model

    layer = LowRankLSTM(5, 8, bidirectional=True, ranks={"weight_hh_l0": 2, "weight_hh_l0_reverse": 2})
    with torch.no_grad():
        for name in list(layer.state_dict()):
            if name.endswith("_reverse") or "_reverse_" in name:
                layer.get_parameter(name).copy_(layer.get_parameter(name.replace("_reverse", "")))
    for form in ("lstm", "scan"):
        tensors = layer_model(layer.layers()[0], form).graph.initializer
        contents = [(tensor.data_type, tuple(tensor.dims), tensor.raw_data) for tensor in tensors]
        assert len(set(contents)) == len(contents)
