"""ONNX files that other tools write, and that differ in one thing from the usual ones."""

import numpy as np
import pytest
from onnx import helper, numpy_helper
from onnx_files import DIRECTIONS, H, feed, lstm_parts, save

from slimlstm import LowRank, Quantize, SlimLSTMError
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.difference import output_difference

COMPUTED = {"W": 1, "R": 2, "B": 3, "lengths": 4, "h0": 5, "c0": 6, "P": 7}
"""The positions of an operator's inputs that a node may compute."""


def computed(path, name, direction="bidirectional"):
    """An operator whose input of this name is a sum that the file computes."""
    rng, d = np.random.default_rng(0), DIRECTIONS[direction]
    node, weights = lstm_parts(rng, direction, lengths=name == "lengths", states=name in ("h0", "c0"))
    node.input.extend([""] * (8 - len(node.input)))
    if name == "P":
        weights.append(numpy_helper.from_array(rng.standard_normal((d, 3 * H)).astype(np.float32), "peepholes"))
        node.input[7] = "peepholes"
    at = COMPUTED[name]
    zero = numpy_helper.from_array(np.zeros(1, np.int32 if name == "lengths" else np.float32), "zero")
    total = helper.make_node("Add", [node.input[at], "zero"], ["total"])
    node.input[at] = "total"
    return save(path, [total, node], [*weights, zero], node.output)


@pytest.mark.parametrize("form", ["auto", "lstm", "scan"])
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_inputs_of_an_operator_count(name, form, tmp_path):
    path, small = computed(tmp_path / "model.onnx", name), tmp_path / "small.onnx"
    if name in ("W", "R"):
        with pytest.raises(SlimLSTMError, match="its weights are no constants of the file"):
            compress_onnx(path, Quantize("bfloat16"), small, form=form)
    elif name in ("B", "P") and form == "scan":
        with pytest.raises(SlimLSTMError, match=r"its bias is no constant of the file|the operator has peepholes"):
            compress_onnx(path, Quantize("bfloat16"), small, form=form)
    else:
        compress_onnx(path, Quantize("bfloat16"), small, form=form)
        assert output_difference(path, small, [feed(path, directions=2)]) < 0.02
        return
    assert not small.exists()


def test_a_large_layer_with_a_computed_bias_stays_an_operator(tmp_path, monkeypatch):
    path, small = computed(tmp_path / "model.onnx", "B"), tmp_path / "small.onnx"
    monkeypatch.setattr("slimlstm.onnx.as_scan.choose", lambda *_: pytest.fail("the form is not open"))
    report = compress_onnx(path, Quantize("int8"), small)
    assert "its bias is no constant" in report.forms["lstm"]
    values = [feed(path)]
    with pytest.raises(SlimLSTMError, match="lstm has a bias that is no constant of the file"):
        compress_onnx(path, LowRank("fisher", rank=2), tmp_path / "other.onnx", batches=values)
    compress_onnx(path, LowRank("activation", rank=2), tmp_path / "other.onnx", batches=values)
