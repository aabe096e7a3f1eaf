"""ONNX files that other tools write, and that differ in one thing from the usual ones."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import DIRECTIONS, INPUTS, H, feed, low_rank, lstm_parts, onnxruntime, save, written_out

from slimlstm import LowRank, Quantize, SlimLSTMError
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.difference import output_difference
from slimlstm.onnx.samples import OPEN_SIZE, random_inputs
from slimlstm.onnx.sizes import count_numbers
from slimlstm.search import shrink_onnx

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
    monkeypatch.setattr("slimlstm.onnx.as_scan.choose_form", lambda *_: pytest.fail("the form is not open"))
    report = compress_onnx(path, Quantize("int8"), small)
    assert "its bias is no constant" in report.forms["lstm"]
    values = [feed(path)]
    with pytest.raises(SlimLSTMError, match="lstm has a bias that is no constant of the file"):
        compress_onnx(path, LowRank("fisher", rank=2), tmp_path / "other.onnx", batches=values)
    compress_onnx(path, LowRank("activation", rank=2), tmp_path / "other.onnx", batches=values)


def decoder(path, gemm, steps=3, is_same=True):
    """Steps of a cell whose input is constant: exporters compute its product with W once, and all steps read it."""
    rng = np.random.default_rng(0)
    first, weights, _ = written_out(rng, gemm)
    nodes = list(first)
    for step in range(1, steps):
        before = "h" if step == 1 else f"h_{step - 1}", "c" if step == 1 else f"c_{step - 1}"
        names = {"h0": before[0], "c0": before[1]} | {name: name for name in ("x", "xw", "w", "b", "r")}
        names |= {} if is_same else {"r": f"r_{step}"}
        for node in first[1:]:
            inputs = [names.get(name, f"{name}_{step}") for name in node.input]
            attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
            outputs = [f"{name}_{step}" for name in node.output]
            nodes.append(helper.make_node(node.op_type, inputs, outputs, node.name and f"{node.name}_{step}", **attributes))
    if not is_same:
        shape = (4 * H, H) if gemm else (H, 4 * H)
        weights += [numpy_helper.from_array(low_rank(rng, *shape), f"r_{step}") for step in range(1, steps)]
    model = onnx.load(save(path, nodes, weights, [f"h_{steps - 1}", f"c_{steps - 1}"], 12))
    for value in model.graph.input:
        value.CopyFrom(helper.make_tensor_value_info(value.name, 1, ["b", INPUTS if value.name == "x" else H]))
    onnx.save(model, path)
    return path


def cell_feed():
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal((3, n)).astype(np.float32) for name, n in (("x", INPUTS), ("h0", H), ("c0", H))}


@pytest.mark.parametrize("gemm", [False, True])
@pytest.mark.parametrize("method", ["svd", "activation", "fisher"])
def test_a_product_that_all_steps_read_changes_once(gemm, method, tmp_path):
    path, small = decoder(tmp_path / "model.onnx", gemm), tmp_path / "small.onnx"
    report = compress_onnx(path, LowRank(method, rank=2), small, batches=[cell_feed()])
    assert [site.rank for site in report.sites] == [2, 2]
    assert output_difference(path, small, [cell_feed()]) < 1e-4  # the matrices have rank 2
    again = compress_onnx(small, LowRank("svd", rank=1), tmp_path / "smaller.onnx")
    assert [site.rank for site in again.sites] == [1, 1]
    assert 0 < output_difference(path, tmp_path / "smaller.onnx", [cell_feed()]) < 1


def test_a_product_of_lstms_that_differ_is_refused(tmp_path):
    path, small = decoder(tmp_path / "model.onnx", gemm=True, is_same=False), tmp_path / "small.onnx"
    with pytest.raises(SlimLSTMError, match="are one product in the file, xw, of LSTMs that differ"):
        compress_onnx(path, LowRank("svd", rank=2), small)
    assert not small.exists()
    compress_onnx(path, LowRank("svd", rank=2, target="hh"), small)
    assert output_difference(path, small, [cell_feed()]) < 1e-4


def test_shapes_that_do_not_fit_are_noticed(tmp_path, monkeypatch):
    path, small = decoder(tmp_path / "model.onnx", gemm=True), tmp_path / "small.onnx"
    monkeypatch.setattr("slimlstm.onnx.rewrite._place", lambda _: object())
    with pytest.raises(SlimLSTMError, match=r"the shapes in .* would not fit each other"):
        compress_onnx(path, LowRank("svd", rank=2), small)
    assert not small.exists()


@pytest.mark.parametrize("config", [Quantize, lambda storage: LowRank("svd", rank=2, storage=storage)], ids=["all", "rank"])
@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("opset", [7, 8, 11, 12, 13, 21])
def test_storages_are_written_where_the_opset_has_them(opset, storage, config, tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0), "bidirectional")
    path, small = save(tmp_path / "model.onnx", [node], weights, node.output, opset), tmp_path / "small.onnx"
    if opset < {"bfloat16": 13, "int8": 7, "int4": 21}[storage]:
        with pytest.raises(SlimLSTMError, match=f"the file's opset {opset} has no"):
            compress_onnx(path, config(storage), small)
        assert not small.exists()
    else:
        compress_onnx(path, config(storage), small)
        assert output_difference(path, small, [feed(path, directions=2)]) < (0.3 if storage == "int4" else 0.02)


def with_weights_outside(folder, location="weights.onnx"):
    node, weights = lstm_parts(np.random.default_rng(0), hidden=H)
    inside, path = save(folder / "inside.onnx", [node], weights, node.output), folder / "model.onnx"
    onnx.save(onnx.load(inside), path, save_as_external_data=True, location=location, size_threshold=0)
    return inside, path


OVER_WEIGHTS = {
    "compress_onnx": lambda path, output, run: compress_onnx(path, Quantize("int8"), output),
    "shrink_onnx": lambda path, output, run: shrink_onnx(path, output, [feed(path)]),
    "compress": lambda path, output, run: run("compress", str(path), "-o", str(output), "--storage", "int8", "--force"),
    "shrink": lambda path, output, run: run("shrink", path, "-o", output, "--inputs", path.parent / "x.npz", "--force"),
}


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("name", OVER_WEIGHTS)
def test_weights_in_other_files_are_never_the_output(name, is_linked, tmp_path, run):
    inside, path = with_weights_outside(tmp_path)
    np.savez(tmp_path / "x.npz", **{key: value[None] for key, value in feed(path).items()})
    output = tmp_path / "weights.onnx"
    if is_linked:
        output = tmp_path / "link.onnx"
        output.symlink_to("weights.onnx")
    if name.endswith("_onnx"):
        with pytest.raises(SlimLSTMError, match="holds weights of the input"):
            OVER_WEIGHTS[name](path, output, run)
    else:
        status, _, err = OVER_WEIGHTS[name](path, output, lambda *words: run(*map(str, words)))
        assert (status, "holds weights of the input" in " ".join(err.split())) == (1, True)
    assert output_difference(inside, path, [feed(inside)]) == 0


LENGTHS = {
    "directly": [],
    "cast": [("Cast", ["given"], {"to": 6})],
    "identity": [("Identity", ["given"], {})],
    "squeezed": [("Unsqueeze", ["given", "zero"], {}), ("Squeeze", ["at_0", "zero"], {})],
    "one less and one more": [("Sub", ["given", "one"], {}), ("Add", ["at_0", "one"], {})],
    "mask": [("ReduceSum", ["given", "zero"], {"keepdims": 0})],
    "mask of another type": [("Cast", ["given"], {"to": 6}), ("ReduceSum", ["at_0", "zero"], {"keepdims": 0})],
    "padding": [
        ("Not", ["given"], {}),
        ("Cast", ["at_0"], {"to": 6}),
        ("ReduceSum", ["at_1", "zero"], {"keepdims": 0}),
    ],
    "floating-point mask": [("ReduceSum", ["given", "zero"], {"keepdims": 0}), ("Cast", ["at_0"], {"to": 6})],
    "floating-point lengths": [("Cast", ["given"], {"to": 6})],
}
GIVEN = {"mask of another type": "bool", "cast": "int64", "padding": "bool"}
TYPES = {
    "float": 1,
    "int8": 3,
    "uint8": 2,
    "int16": 5,
    "uint16": 4,
    "int32": 6,
    "uint32": 12,
    "int64": 7,
    "uint64": 13,
    "bool": 9,
}


def with_lengths(path, name, kind="int32", steps="t", layout=0):
    """An operator whose sequence_lens the nodes of this name compute from the input "given"."""
    node, weights = lstm_parts(np.random.default_rng(0), lengths=True)
    nodes, last = [], "given"
    for number, (operator, inputs, attributes) in enumerate(LENGTHS[name]):
        last = f"at_{number}"
        nodes.append(helper.make_node(operator, inputs, [last], **attributes))
    node.input[4] = last
    weights += [numpy_helper.from_array(np.array([0]), "zero"), numpy_helper.from_array(np.array([1], np.int32), "one")]
    shape = [steps, "b"] if "mask" in name or name == "padding" else ["b"]
    x = helper.make_tensor_value_info("x", 1, [steps, "b", INPUTS])
    given = helper.make_tensor_value_info("given", TYPES[kind], shape)
    y = helper.make_tensor_value_info("lstm_y", 1, [steps, 1, "b", H])
    graph = helper.make_graph([*nodes, node], "graph", [x, given], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def own_inputs(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return random_inputs(path, session.get_inputs())


@pytest.mark.parametrize("steps", ["t", 3, 7])
@pytest.mark.parametrize("name", LENGTHS)
def test_random_inputs_have_all_steps(name, steps, tmp_path):
    kind = "float" if "float" in name else GIVEN.get(name, "int32")
    path, small = with_lengths(tmp_path / "model.onnx", name, kind, steps), tmp_path / "small.onnx"
    count = OPEN_SIZE if steps == "t" else steps
    value = 1 if "mask" in name else 0 if name == "padding" else count
    assert (own_inputs(path)["given"] == value).all()
    compress_onnx(path, LowRank("svd", rank=1), small)
    assert 0.01 < output_difference(path, small) < 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimlstm.onnx.compress._check_size", lambda *_: None)
        compress_onnx(path, LowRank("svd", rank=1), small, form="scan")
    assert (own_inputs(small)["given"] == value).all()
    assert 0.01 < output_difference(small, path) < 2


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "float"])
def test_integers_of_every_type_are_fed(kind, tmp_path):
    path = with_lengths(tmp_path / "model.onnx", "cast", kind)
    assert own_inputs(path)["given"].dtype.name == kind
    assert output_difference(path, path) == 0


@pytest.mark.parametrize("ir_version", [3, 8])
@pytest.mark.parametrize(
    ("config", "form", "left"),
    [
        (Quantize("bfloat16"), "lstm", ["x", "lstm_B"]),
        (Quantize("bfloat16"), "scan", ["x"]),
        (LowRank("svd", rank=2, target="hh"), "lstm", ["x", "lstm_W", "lstm_B"]),
    ],
    ids=["operator", "scan", "hh"],
)
def test_weights_that_were_inputs_are_fixed_with_a_note(config, form, left, ir_version, tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0), hidden=64)
    path, small = save(tmp_path / "model.onnx", [node], weights, node.output, 13, ir_version), tmp_path / "small.onnx"
    if ir_version > 3:
        assert not compress_onnx(path, config, small, form=form).notes
    model = onnx.load(path)
    model.graph.input.extend(helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in weights)
    onnx.save(model, path)
    report = compress_onnx(path, config, small, form=form)
    assert [value.name for value in onnx.load(small).graph.input] == left
    (note,) = report.notes
    gone = [weight.name for weight in weights if weight.name not in left]
    assert f"the inputs {', '.join(gone)} of the file" in note


def test_sizes_count_weights_in_other_files(tmp_path, run, run_json):
    """The command shows them in its results and on its pages, and a search in its first trial."""
    _, path = with_weights_outside(tmp_path, "weights.data")
    size = sum((tmp_path / name).stat().st_size for name in ("model.onnx", "weights.data"))
    assert run_json("inspect", path)["bytes"] == size
    runs = [feed(tmp_path / "inside.onnx", seed=seed) for seed in range(3)]
    found = shrink_onnx(path, tmp_path / "small.onnx", runs, at_most="50%", evaluations=2)
    assert found.dense.bytes == size
    np.savez(tmp_path / "x.npz", x=np.stack([values["x"] for values in runs]))
    for number, words in enumerate((["compress", "--storage", "int8"], ["shrink", "--inputs", tmp_path / "x.npz"])):
        page, output = tmp_path / f"{number}.html", tmp_path / f"{number}.onnx"
        more = ["--at-most", "50%", "--evaluations", "2"] if words[0] == "shrink" else []
        status, _, err = run(*map(str, [words[0], path, "-o", output, "--report", page, *words[1:], *more]))
        assert (status, err) == (0, "")
        assert "weights.data" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("head", ["MatMul", "Gemm"])
@pytest.mark.parametrize("form", ["lstm", "scan"])
@pytest.mark.parametrize("config", [LowRank("svd", keep=0.8), Quantize("int8"), Quantize("bfloat16")], ids=str)
def test_the_lstms_own_products_are_no_other_weights(config, form, head, tmp_path):
    rng, wide = np.random.default_rng(0), 64
    node, weights = lstm_parts(rng, hidden=wide)
    weights += [numpy_helper.from_array(rng.standard_normal((wide, 20)).astype(np.float32), "head")]
    weights += [numpy_helper.from_array(np.array([0]), "zero")]
    last = helper.make_node("Squeeze", ["lstm_h", "zero"], ["rows"])
    nodes = [node, last, helper.make_node(head, ["rows", "head"], ["scores"])]
    path, small = save(tmp_path / "model.onnx", nodes, weights, ["scores"], 13), tmp_path / "small.onnx"
    report = compress_onnx(path, config, small, also=["linear"], form=form, batches=[feed(path)])
    assert any(note.startswith("1 other weights (linear)") for note in report.notes)
    made = onnx.load(small).graph
    integers = [one for one in made.node if one.op_type == "MatMulInteger"]
    (own,) = (one for one in integers if any(name.startswith("head") for name in one.input))
    assert len(integers) == 1 or (form == "scan" and "int8" in str(config)), own
    assert output_difference(path, small, [feed(path)]) < 0.1


SHRUNK = {
    "clip": ({"clip": 50.0}, "lstm has clip"),
    "input_forget": ({"input_forget": 1}, "lstm has input_forget"),
    "activations": ({"activations": ["HardSigmoid", "Tanh", "Tanh"]}, "lstm has other activations"),
    "peepholes": ({}, "lstm has peepholes"),
    "computed bias": ({}, "lstm has a bias that is no constant of the file"),
}


@pytest.mark.parametrize("name", SHRUNK)
def test_what_fisher_cannot_differentiate_still_shrinks(name, tmp_path):
    attributes, reason = SHRUNK[name]
    node, weights = lstm_parts(np.random.default_rng(0), hidden=64, **attributes)
    nodes = [node]
    if name == "peepholes":
        node.input.extend([""] * (7 - len(node.input)) + ["P"])
        weights.append(numpy_helper.from_array(np.ones((1, 3 * 64), np.float32), "P"))
    if name == "computed bias":
        nodes = [helper.make_node("Abs", ["lstm_B"], ["bias"]), node]
        node.input[3] = "bias"
    path, small = save(tmp_path / "model.onnx", nodes, weights, node.output[:1]), tmp_path / "small.onnx"
    runs = [{"x": np.random.default_rng(seed).standard_normal((9, 2, INPUTS)).astype(np.float32)} for seed in range(3)]
    found = shrink_onnx(path, small, runs, at_most="20%", evaluations=4)
    assert found.best.label == "int8"
    assert f"no factors were tried, because {reason}" in " ".join(found.notes)
    assert output_difference(path, small, runs) < 0.1


@pytest.mark.parametrize("name", ["model.onnx", "inside.onnx"])
@pytest.mark.parametrize("has_length", [False, True])
def test_files_beyond_the_largest_are_refused_before_they_are_read(name, has_length, tmp_path, monkeypatch, run):
    with_weights_outside(tmp_path, "weights.data")
    if not has_length:
        model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            kept = [entry for entry in tensor.external_data if entry.key != "length"]
            del tensor.external_data[:]
            tensor.external_data.extend(kept)
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    largest = (tmp_path / name).stat().st_size - (name == "inside.onnx")
    monkeypatch.setattr("slimlstm.onnx.reading.LARGEST_FILE", largest)
    monkeypatch.setattr("onnx.load_external_data_for_model", lambda *_: pytest.fail("the weights were read"))
    message = f"bytes, more than the {largest:,} that one ONNX file can hold"
    with pytest.raises(SlimLSTMError, match=message):
        compress_onnx(tmp_path / name, Quantize("int8"), tmp_path / "small.onnx")
    status, _, err = run("inspect", str(tmp_path / name))
    assert (status, message in " ".join(err.split())) == (1, True)
    assert not (tmp_path / "small.onnx").exists()


@pytest.mark.parametrize(("dtype", "itemsize"), [("float16", 2), ("float32", 4), ("float64", 8)])
@pytest.mark.parametrize("kind", ["operator", "both directions", "MatMul", "Gemm"])
def test_bytes_before_are_those_of_the_dtype_in_the_file(kind, dtype, itemsize, tmp_path):
    rng = np.random.default_rng(0)
    if kind in ("MatMul", "Gemm"):
        nodes, weights, _ = written_out(rng, kind == "Gemm")
        outputs, names = ["h", "c"], ["w", "r"]
    else:
        node, weights = lstm_parts(rng, "bidirectional" if kind == "both directions" else "forward", bias=False)
        nodes, outputs, names = [node], node.output, ["lstm_W", "lstm_R"]
    for tensor in weights:
        if tensor.name in names:
            array, name = numpy_helper.to_array(tensor), tensor.name
            tensor.CopyFrom(numpy_helper.from_array(array.astype(dtype), f"{name}_stored"))
            nodes.insert(0, helper.make_node("Cast", [f"{name}_stored"], [name], to=1))
    path = save(tmp_path / "model.onnx", nodes, weights, outputs, 12)
    report = compress_onnx(path, LowRank("svd", rank=2, target="hh"), tmp_path / "small.onnx")
    site = report.sites[0]
    rows, columns = site.shape
    assert (site.bytes_before, site.bytes_after) == (itemsize * rows * columns, 4 * 2 * (rows + columns))
    directions = 2 if kind == "both directions" else 1
    others = itemsize * directions * 4 * H * INPUTS
    assert report.lstm.bytes_before == directions * site.bytes_before + others
    assert report.lstm.bytes_after == directions * site.bytes_after + others


def test_two_gates_of_one_output_are_no_lstm(tmp_path):
    nodes, weights, _ = written_out(np.random.default_rng(0))
    (o,) = (node for node in nodes if list(node.input) == ["o"])
    o.input[0] = "f"
    path = save(tmp_path / "model.onnx", nodes, weights, ["h", "c"], 12)
    with pytest.raises(SlimLSTMError, match="holds no LSTM with constant weights"):
        compress_onnx(path, Quantize("int8"), tmp_path / "small.onnx")


@pytest.mark.parametrize("form", ["lstm", "scan"])
@pytest.mark.parametrize("config", [Quantize("int8"), LowRank("svd", rank=8, storage="int8")], ids=["all", "rank"])
def test_scales_are_no_parameters(config, form, tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0), "bidirectional", hidden=64)
    path, small = save(tmp_path / "model.onnx", [node], weights, node.output), tmp_path / "small.onnx"
    report = compress_onnx(path, config, small, form=form)
    assert report.model.parameters_before == report.lstm.parameters_before
    summed = 2 * 4 * 64 if form == "scan" else 0  # a Scan adds both biases once
    assert report.model.parameters_after == report.lstm.parameters_after - summed == count_numbers(onnx.load(small))


def scaled(path):
    """A file that multiplies its input by a number without axes, as models take a sampling rate."""
    node, weights = lstm_parts(np.random.default_rng(0), hidden=64)
    node.input[0] = "scaled"
    save(path, [helper.make_node("Mul", ["x", "scale"], ["scaled"]), node], weights, node.output)
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, []))
    onnx.save(model, path)
    return path


SCALED = {
    "calibrated": ("compress", "--method", "activation", "--rank", 2, "--batches"),
    "compared": ("compress", "--storage", "int8", "--inputs"),
    "searched": ("shrink", "--at-most", "50%", "--evaluations", 2, "--inputs"),
}


@pytest.mark.parametrize("words", SCALED.values(), ids=SCALED)
def test_inputs_without_axes_are_given_in_files(words, tmp_path, run):
    path, runs = scaled(tmp_path / "model.onnx"), tmp_path / "runs.npz"
    x = np.random.default_rng(0).standard_normal((4, 5, 2, INPUTS)).astype(np.float32)
    np.savez(runs, x=x, scale=np.full(4, 2.0, np.float32))
    verb, *options = words
    assert run(verb, path, "-o", tmp_path / "small.onnx", *options, runs)[0] == 0


@pytest.mark.parametrize("scale", [np.float32(2), np.array(2, np.float32)], ids=["scalar", "array"])
def test_inputs_without_axes_are_given_in_python(scale, tmp_path):
    path, small = scaled(tmp_path / "model.onnx"), tmp_path / "small.onnx"
    runs = [{"x": np.ones((5, 2, INPUTS), np.float32), "scale": scale}]
    compress_onnx(path, LowRank("activation", rank=2), small, batches=runs)
    assert output_difference(path, small, runs) < 1e-3
