"""The smallest ONNX file whose outputs hardly change, and how outputs are compared."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_files import INPUTS, H, lstm_parts, save
from onnx_files import run as run_file

import slimlstm as sl
from slimlstm.onnx.difference import output_difference
from slimlstm.search import agreement, shrink_onnx
from slimlstm.search.result import share_of

STEPS = 12


@pytest.fixture
def made(tmp_path):
    """A file with an LSTM of random matrices, a layer that reads its outputs, and six runs."""
    return make(tmp_path)


def make(tmp_path, **versions):
    rng = np.random.default_rng(0)
    node, weights = lstm_parts(rng, hidden=H)
    for index, shape in ((0, (1, 4 * H, INPUTS)), (1, (1, 4 * H, H))):
        weights[index] = numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), weights[index].name)
    scores = helper.make_node("MatMul", [node.output[0], "readout"], ["scores"])
    probabilities = helper.make_node("Softmax", ["scores"], ["probabilities"], axis=-1)
    weights.append(numpy_helper.from_array(rng.standard_normal((H, 5)).astype(np.float32), "readout"))
    path = Path(save(tmp_path / "model.onnx", [node, scores, probabilities], weights, ["probabilities"], **versions))
    runs = [{"x": rng.standard_normal((STEPS, 3, INPUTS)).astype(np.float32)} for _ in range(6)]
    return path, runs


@pytest.mark.parametrize("at_most", ["1%", "5%", 0.2])
def test_the_smallest_file_that_agrees(made, tmp_path, at_most):
    path, runs = made
    before, output = path.read_bytes(), tmp_path / "small.onnx"
    found = shrink_onnx(path, output, runs, at_most=at_most, evaluations=6)
    assert path.read_bytes() == before
    assert output.stat().st_size == found.best.bytes < found.dense.bytes == len(before)
    wrong = [(run_file(path, held)[0].argmax(-1) != run_file(output, held)[0].argmax(-1)).mean() for held in runs[-2:]]
    assert np.mean(wrong) == pytest.approx(found.best.metric)
    assert found.best.metric <= share_of(at_most)
    assert found.best.bytes == min(trial.bytes for trial in found.trials if trial.accepted)
    assert "by argmax" in found.limit
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.onnx", "small.onnx"}


@pytest.mark.parametrize(("opset", "labels"), [(18, ["int8"]), (21, ["int8", "int4"])])
def test_whole_matrices_are_tried_in_the_storages_of_the_opset(opset, labels, tmp_path):
    path, runs = make(tmp_path, opset=opset, ir_version=10)
    found = shrink_onnx(path, tmp_path / "small.onnx", runs, at_most="100%", evaluations=4)
    assert [trial.label for trial in found.trials if trial.label.startswith("int")] == labels


def test_an_interrupt_leaves_the_best_file_so_far(made, tmp_path):
    path, runs = made

    def progress(trial, left):
        raise KeyboardInterrupt

    found = shrink_onnx(path, tmp_path / "small.onnx", runs, at_most=0.5, progress=progress)
    assert found.interrupted
    assert [trial.label for trial in found.trials] == ["int8"]
    assert (tmp_path / "small.onnx").stat().st_size == found.best.bytes


REFUSED = {
    "no runs": ({"runs": []}, "no runs are given"),
    "nothing agrees": ({"at_most": 0.0, "measure": "noise"}, "nothing smaller meets the limit"),
    "unknown measure": ({"measure": "bleu"}, "the measure is one of 'auto', 'argmax', 'cosine', 'noise', not 'bleu'"),
    "unknown input": ({"runs": [{"y": np.zeros(3)}]}, "cannot run the model"),
    "limit": ({"at_most": "much"}, "at_most is a share"),
    "a limit above 100%": ({"at_most": "150%"}, "from 0 to 1 or from 0% to 100%"),
    "a limit above 1": ({"at_most": 5}, "from 0 to 1 or from 0% to 100%"),
    "evaluations": ({"evaluations": 1}, "at least two"),
    "the input": ({"output": "model.onnx"}, "is the input, which would be lost"),
    "a folder": ({"output": "."}, "is no name of a file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_write_nothing(made, tmp_path, name):
    path, runs = made
    changed, message = REFUSED[name]
    (tmp_path / "small.onnx").write_text("mine")
    changed = {"runs": runs, "output": "small.onnx"} | changed
    before = path.read_bytes()
    with pytest.raises(sl.SlimLSTMError, match=message):
        shrink_onnx(path, tmp_path / changed.pop("output"), **changed)
    assert (tmp_path / "small.onnx").read_text() == "mine"
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.onnx", "small.onnx"}


def test_the_command(made, tmp_path, run):
    path, runs = made
    np.savez(tmp_path / "runs.npz", x=np.stack([values["x"] for values in runs]))
    words = ("shrink", str(path), "-o", str(tmp_path / "small.onnx"), "--inputs", str(tmp_path / "runs.npz"))
    page = tmp_path / "report.html"
    status, out, err = run(*words, "--at-most", "5%", "--evaluations", "4", "--report", str(page))
    assert (status, err) == (0, "")
    assert "What was tried" in page.read_text(encoding="utf-8")
    assert "chosen" in out
    assert (tmp_path / "small.onnx").exists()
    for extra, message in (
        ((), "exists; add --force"),
        (("--at-most", "much", "--force"), "--at-most is a share such as 1%"),
    ):
        status, out, err = run(*words, *extra)
        assert (status, out) == (1, "")
        assert message in err
    status, _, err = run("shrink", str(path), "-o", str(path), "--force", "--inputs", str(tmp_path / "runs.npz"))
    assert status == 1
    assert "is the input" in err


P = np.array([[0.9, 0.1], [0.4, 0.6]], np.float32)
KINDS = {
    "probabilities": (P, "argmax"),
    "log-probabilities": (np.log(P), "argmax"),
    "labels": (np.array([3, 4]), "argmax"),
    "embeddings": (np.array([[1.0, -2.0]]), "cosine"),
    "a score": (np.array([[0.3]]), "noise"),
    "a scalar": (np.array(0.3), "noise"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_measure_is_chosen_by_the_kind_of_output(name):
    value, measure = KINDS[name]
    assert agreement.measure_of([value]) == measure
    assert agreement.disagreement([[value]], [[value]], [measure]) == pytest.approx(0.0, abs=1e-12)


UNFIT = {
    "a sequence": ([P], "auto", "the output y is a list and not an array"),
    "a map": ({"a": 1.0}, "cosine", "the output y is a dict and not an array"),
    "rows of a scalar": (np.array(0.3), "cosine", "the output y is a single number"),
    "the largest of a scalar": (np.array(0.3), "argmax", "the output y is a single number"),
    "not finite": (np.array([math.inf]), "auto", "is not finite"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_outputs_that_no_measure_compares_are_refused(name):
    value, measure, message = UNFIT[name]
    with pytest.raises(sl.SlimLSTMError, match=message):
        agreement.measures_of([[value]], ["y"], measure)


def test_only_arrays_of_numbers_have_a_difference(made):
    path, runs = made
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("SequenceConstruct", ["scores"], ["all"]))
    model.graph.output.append(helper.make_tensor_sequence_value_info("all", 1, None))
    onnx.save(model, path)
    found = sl.compress_onnx(path, sl.Quantize("int8"), path.with_name("small.onnx"))
    assert found.sites
    assert 0.0 < output_difference(path, path.with_name("small.onnx"), runs) < 0.1
    with pytest.raises(sl.SlimLSTMError, match="the output all is a list"):
        shrink_onnx(path, path.with_name("small.onnx"), runs)


def test_a_folder_for_the_output_is_made(made, tmp_path):
    path, runs = made
    shrink_onnx(path, tmp_path / "new" / "small.onnx", runs, at_most="50%", evaluations=2)
    assert (tmp_path / "new" / "small.onnx").exists()


def test_measures_are_what_their_names_say():
    one, other = np.array([[3.0, 4.0], [0.0, 1.0]]), np.array([[4.0, 3.0], [0.0, 2.0]])
    assert agreement.argmax_disagreement(one, other) == 0.5
    assert agreement.cosine_distance(one, other) == pytest.approx(1 - (24 / 25 + 1) / 2)
    assert agreement.noise_share(one, other) == pytest.approx(3 / 26)
    assert agreement.argmax_disagreement(np.array([1, 2]), np.array([1, 3])) == 0.5


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.array([[math.nan, 1.0], [0.0, 1.0]])], ids=["shape", "NaN"])
def test_wrong_outputs_disagree_without_limit(wrong):
    assert agreement.disagreement([[P]], [[wrong]], ["cosine"]) == math.inf


@pytest.mark.parametrize("measure", list(agreement.MEASURES))
def test_a_run_without_rows_hides_nothing(measure):
    rows, none = np.array([[0.5, -1.0, 2.0]]), np.zeros((0, 3))
    assert agreement.disagreement([[none], [rows]], [[none], [-rows]], [measure]) >= 1.0
    with pytest.raises(sl.SlimLSTMError, match="hold no numbers in any run"):
        agreement.measures_of([[none]], ["y"], measure)


def test_the_worst_output_counts():
    flipped = P[:, ::-1]
    assert agreement.disagreement([[P, P]], [[P, flipped]], ["argmax", "argmax"]) == 1.0
