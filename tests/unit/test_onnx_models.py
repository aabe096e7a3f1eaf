"""LSTMs of ONNX files, compressed where they are; ONNX Runtime says what the files compute."""

import json
import random
import re

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_files import DIRECTIONS, INPUTS, RANK, H, feed, info, low_rank, lstm_parts, run, save, written_out
from typer.testing import CliRunner

from slimlstm import LowRank, Plan, Quantize, SlimLSTMError
from slimlstm.cli import app
from slimlstm.onnx.calibrate import calibrate_graph
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.find import find_lstms
from slimlstm.onnx.graph import graphs_of
from slimlstm.pipeline.plan import SitePlan
from slimlstm.weight_files import find_matrices, read_tensors

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")


def assert_same(path, other, values, tolerance=1e-4):
    for expected, found in zip(run(path, values), run(other, values), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(
    direction=st.sampled_from(list(DIRECTIONS)),
    opset=st.sampled_from([7, 11, 13, 17, 21]),
    lengths=st.booleans(),
    states=st.booleans(),
    bias=st.booleans(),
    target=st.sampled_from(["ih", "hh", "both"]),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 4)),
    seed=st.integers(0, 2**16),
    form=st.sampled_from(["auto", "scan"]),
)
def test_factors_of_full_rank_compute_the_same(
    tmp_path_factory, direction, opset, lengths, states, bias, target, sizes, seed, form
):
    folder = tmp_path_factory.mktemp("onnx")
    node, weights = lstm_parts(np.random.default_rng(seed), direction, lengths, states, bias=bias)
    path = save(folder / "model.onnx", [node], weights, node.output, opset)
    config = LowRank("svd", rank=RANK, target=target)
    if form == "scan" and opset < 13:
        with pytest.raises(SlimLSTMError, match=f"lstm cannot become a Scan, because the file's opset {opset} is older"):
            compress_onnx(path, config, folder / "small.onnx", form=form)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimlstm.onnx.compress._check_size", lambda *_: None)  # a Scan's nodes outweigh so few weights
        report = compress_onnx(path, config, folder / "small.onnx", form=form)
    assert report.forms["lstm"].startswith("scan" if form == "scan" else "lstm")
    assert {site.rank for site in report.sites} == {RANK}
    assert onnx.load(folder / "small.onnx").opset_import == onnx.load(path).opset_import
    assert_same(path, folder / "small.onnx", feed(path, *sizes, DIRECTIONS[direction], seed=seed))


def test_a_runtime_that_does_not_fold_constants_computes_the_same(tmp_path):
    from onnx.reference import ReferenceEvaluator

    node, weights = lstm_parts(np.random.default_rng(0))
    path = save(tmp_path / "model.onnx", [node], weights, node.output[:1])
    compress_onnx(path, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
    values = feed(path)
    (found,) = ReferenceEvaluator(onnx.load(tmp_path / "small.onnx")).run(None, values)
    np.testing.assert_allclose(found, run(path, values)[0], rtol=0, atol=1e-4)


ATTRIBUTES = {
    "clip": {"clip": 0.5},
    "coupled gates": {"input_forget": 1},
    "other activations": {"activations": ["HardSigmoid", "Tanh", "Tanh"]},
}


@pytest.mark.parametrize("attributes", ATTRIBUTES.values(), ids=list(ATTRIBUTES))
def test_attributes_of_the_operator_stay(attributes, tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0), states=True, **attributes)
    path = save(tmp_path / "model.onnx", [node], weights, node.output)
    compress_onnx(path, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
    assert_same(path, tmp_path / "small.onnx", feed(path))


def test_batch_first_layouts_and_peepholes_stay(tmp_path):
    """ONNX Runtime's LSTM has no batch-first layout; the reference evaluator has no peepholes."""
    rng = np.random.default_rng(0)
    node, weights = lstm_parts(rng, states=True)
    node.input.append("P")
    weights.append(numpy_helper.from_array(rng.standard_normal((1, 3 * H)).astype(np.float32), "P"))
    path = save(tmp_path / "peepholes.onnx", [node], weights, node.output)
    compress_onnx(path, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
    assert_same(path, tmp_path / "small.onnx", feed(path))
    node, weights = lstm_parts(rng, layout=1)
    path = save(tmp_path / "layout.onnx", [node], weights, node.output)
    compress_onnx(path, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
    (kept,) = [node for node in onnx.load(tmp_path / "small.onnx").graph.node if node.op_type == "LSTM"]
    assert kept.attribute == node.attribute
    assert list(kept.output) == list(node.output)


def branches(rng, shared=False, opset=17):
    """An If with an LSTM in each branch: weights inside, or one set of them outside."""
    parts = {name: lstm_parts(rng, name=name) for name in ("then", "else")}
    graphs, outer = {}, []
    for name, (node, weights) in parts.items():
        inner = weights
        if shared:
            node.input[1:4] = ["then_W", "then_R", "then_B"]
            inner, outer = [], parts["then"][1]
        graphs[f"{name}_branch"] = helper.make_graph([node], name, [], [info(node.output[0])], inner)
    return helper.make_node("If", ["on"], ["y"], **graphs), outer


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("shared", [False, True])
def test_nested_graphs(shared, opset, tmp_path):
    node, outer = branches(np.random.default_rng(0), shared)
    path = save(tmp_path / "model.onnx", [node], outer, ["y"], opset)
    report = compress_onnx(path, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
    assert len(report.sites) == (2 if shared else 4)
    for on in (True, False):
        assert_same(path, tmp_path / "small.onnx", feed(path, on=on))
    kept = [tensor for graph in graphs_of(onnx.load(tmp_path / "small.onnx").graph) for tensor in graph.initializer]
    assert not {tensor.name for tensor in kept} & {"then_W", "then_R", "else_W", "else_R"}
    assert len([tensor for tensor in kept if tensor.name.endswith(("_u", "_v"))]) == (4 if shared else 8)


def shaped_by_nodes(rng, opset):
    """Weights as transposed constants that nodes turn and cut."""
    w, r = low_rank(rng, 4 * H, INPUTS), low_rank(rng, 4 * H, H)
    constants = [numpy_helper.from_array(np.ascontiguousarray(value.T), name) for name, value in (("Wt", w), ("Rt", r))]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [0])
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in constants]
    for name in "WR":
        nodes.append(helper.make_node("Transpose", [f"{name}t"], [f"{name}2"], perm=[1, 0]))
        if opset < 13:
            nodes.append(helper.make_node("Unsqueeze", [f"{name}2"], [name], axes=[0]))
        else:
            nodes.append(helper.make_node("Unsqueeze", [f"{name}2", "axes"], [name]))
    nodes.append(helper.make_node("LSTM", ["x", "W", "R"], ["y"], "lstm", hidden_size=H))
    return nodes, [axes] if opset >= 13 else []


@pytest.mark.parametrize("opset", [11, 17])
def test_what_made_the_weights_goes(opset, tmp_path):
    path = save(tmp_path / "model.onnx", *shaped_by_nodes(np.random.default_rng(0), opset), ["y"], opset)
    compress_onnx(path, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
    small = onnx.load(tmp_path / "small.onnx")
    assert [node.op_type for node in small.graph.node] == ["MatMul", "MatMul", "LSTM"]
    assert {tensor.name for tensor in small.graph.initializer} == {
        f"lstm.weight_{kind}_l0_{part}" for kind in ("ih", "hh") for part in "uv"
    }
    assert_same(path, tmp_path / "small.onnx", feed(path))


def test_weights_that_something_else_uses_stay(tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0))
    total = helper.make_node("Identity", ["lstm_W"], ["w"])
    path = save(tmp_path / "model.onnx", [node, total], weights, ["lstm_y", "w"])
    compress_onnx(path, LowRank("svd", rank=RANK, target="hh"), tmp_path / "small.onnx")
    assert_same(path, tmp_path / "small.onnx", feed(path))
    output = tmp_path / "none.onnx"
    with pytest.raises(SlimLSTMError, match="used elsewhere too"):
        compress_onnx(path, LowRank("svd", rank=RANK, target="ih"), output)
    assert not output.exists()


def cell_feed(batch=3):
    rng = np.random.default_rng(1)
    sizes = {"x": INPUTS, "h0": H, "c0": H}
    return {name: rng.standard_normal((batch, size)).astype(np.float32) for name, size in sizes.items()}


@pytest.mark.parametrize("gemm", [False, True])
def test_lstms_that_are_written_out(gemm, tmp_path):
    nodes, weights, (w, r) = written_out(np.random.default_rng(0), gemm)
    path = save(tmp_path / "model.onnx", nodes, weights, ["h", "c"], 12)
    tensors = read_tensors(path)
    in_order = [2, 0, 3, 1]  # i, f, g, o among f, o, i, g
    for kind, matrix in (("ih", w), ("hh", r)):
        expected = np.concatenate([np.split(matrix, 4)[gate] for gate in in_order])
        np.testing.assert_array_equal(tensors[f"net/cell.weight_{kind}_l0"].numpy(), expected)
    compress_onnx(path, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
    assert {site.rank for site in find_matrices(read_tensors(tmp_path / "small.onnx"))} == {RANK}
    assert_same(path, tmp_path / "small.onnx", cell_feed())
    compress_onnx(tmp_path / "small.onnx", LowRank("svd", rank=1), tmp_path / "smaller.onnx")
    assert {site.rank for site in find_matrices(read_tensors(tmp_path / "smaller.onnx"))} == {1}
    assert len(run(tmp_path / "smaller.onnx", cell_feed())) == 2


@pytest.mark.parametrize("storage", ["int8", "bfloat16"])
@pytest.mark.parametrize("rank", [None, RANK])
def test_storages(storage, rank, tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0), "bidirectional")
    path = save(tmp_path / "model.onnx", [node], weights, node.output)
    config = Quantize(storage) if rank is None else LowRank("svd", rank=rank, storage=storage)
    report = compress_onnx(path, config, tmp_path / "small.onnx")
    assert all(site.bytes_after < site.bytes_before / (1.9 if storage == "bfloat16" else 2) for site in report.sites)
    values = feed(path, directions=2)
    expected, found = run(path, values)[0], run(tmp_path / "small.onnx", values)[0]
    assert 0 < np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    (layer,) = find_lstms(onnx.load(tmp_path / "small.onnx"), path)
    assert {location.storage for location in layer.locations} == {storage}
    with pytest.raises(SlimLSTMError, match=r"already|would take"):
        compress_onnx(tmp_path / "small.onnx", config, tmp_path / "again.onnx")


def test_one_direction_alone(tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0), "bidirectional")
    path = save(tmp_path / "model.onnx", [node], weights, node.output)
    plan = Plan({"lstm.weight_hh_l0_reverse": SitePlan("svd", rank=RANK)})
    compress_onnx(path, plan, tmp_path / "small.onnx")
    assert {site.rank for site in find_matrices(read_tensors(tmp_path / "small.onnx"))} == {None, RANK}
    assert_same(path, tmp_path / "small.onnx", feed(path, directions=2))


def test_files_whose_weights_are_listed_as_inputs(tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0))
    path = save(tmp_path / "model.onnx", [node], weights, node.output, opset=8, ir_version=3)
    model = onnx.load(path)
    model.graph.input.extend(helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in weights)
    onnx.save(model, path)
    compress_onnx(path, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
    assert [value.name for value in onnx.load(tmp_path / "small.onnx").graph.input] == ["x", "lstm_B"]
    assert_same(path, tmp_path / "small.onnx", {"x": np.ones((4, 2, INPUTS), np.float32)})


def test_weights_in_other_files(tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0))
    path = save(tmp_path / "model.onnx", [node], weights, node.output)
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(path), outside, save_as_external_data=True, location="weights.bin", size_threshold=0)
    report = compress_onnx(outside, LowRank("svd", rank=RANK), tmp_path / "small.onnx")
    assert report.model.bytes_before > sum(len(weight.raw_data) for weight in weights)
    assert_same(path, tmp_path / "small.onnx", feed(path))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
def test_moments_are_those_of_inputs_and_states(nested, lengths, tmp_path):
    rng = np.random.default_rng(0)
    node, weights = lstm_parts(rng, "bidirectional", lengths=lengths, states=True)
    nodes, outputs = [node], node.output[:1]
    if nested:
        other = helper.make_node("Identity", ["x"], ["same"])
        graphs = {"then_branch": helper.make_graph([node], "then", [], [info("lstm_y")])}
        graphs["else_branch"] = helper.make_graph([other], "else", [], [info("same")])
        nodes, outputs = [helper.make_node("If", ["on"], ["y"], **graphs)], ["y"]
    path = save(tmp_path / "model.onnx", nodes, weights, outputs)
    values, model = feed(path, directions=2), onnx.load(path)
    runs = [values, {**values, "on": np.array(False)}] if nested else [values]
    found = calibrate_graph(model, find_lstms(model, path), runs)
    ys, counts = run(path, values)[0], values.get("lengths", np.full(3, 5))
    rows = {"ih_l0": [], "hh_l0": [], "hh_l0_reverse": []}
    for column, count in enumerate(counts):
        for step in range(count):
            rows["ih_l0"].append(values["x"][step, column])
            rows["hh_l0"].append(ys[step - 1, 0, column] if step else values["h0"][0, column])
            rows["hh_l0_reverse"].append(ys[step + 1, 1, column] if step < count - 1 else values["h0"][1, column])
    for name, expected in rows.items():
        (moments,) = found[f"lstm.weight_{name}"]
        matrix = np.stack(expected).astype(np.float64)
        assert moments.rows == len(matrix)
        np.testing.assert_allclose(moments.inputs.numpy(), matrix.T @ matrix / len(matrix), atol=1e-6)


def test_activation_weights_beat_plain_ones(tmp_path):
    """Inputs of which half never vary: what meets them can go."""
    rng = np.random.default_rng(0)
    node, weights = lstm_parts(rng)
    for index, shape in ((0, (1, 4 * H, INPUTS)), (1, (1, 4 * H, H))):
        weights[index] = numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), weights[index].name)
    path = save(tmp_path / "model.onnx", [node], weights, node.output[:1])
    values = feed(path, steps=50)
    values["x"][..., RANK:] *= 1e-3
    errors = {}
    for method in ("svd", "activation"):
        batches = [values] if method == "activation" else None
        compress_onnx(path, LowRank(method, rank=RANK, target="ih"), tmp_path / "small.onnx", batches=batches)
        errors[method] = np.linalg.norm(run(tmp_path / "small.onnx", values)[0] - run(path, values)[0])
    assert errors["activation"] < 0.05 * errors["svd"]
    np.savez(tmp_path / "runs.npz", x=values["x"][None])
    arguments = ["compress", str(path), "-o", str(tmp_path / "cli.onnx"), "--method", "activation", "--rank", str(RANK)]
    result = CliRunner().invoke(app, [*arguments, "--target", "ih", "--batches", str(tmp_path / "runs.npz"), "--json"])
    assert json.loads(result.stdout)["sites"][0]["method"] == "activation"
    assert_same(tmp_path / "cli.onnx", tmp_path / "small.onnx", values)


def test_refusals_leave_what_is_there(tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0))
    path = save(tmp_path / "model.onnx", [node], weights, node.output)
    computed = helper.make_node("LSTM", ["x", "W", "R"], ["y"], "lstm", hidden_size=H)
    ones = [helper.make_node("Abs", ["w"], ["W"]), helper.make_node("Abs", ["r"], ["R"])]
    arrays = {"w": np.ones((1, 4 * H, INPUTS), np.float32), "r": np.ones((1, 4 * H, H), np.float32)}
    loose = save(
        tmp_path / "loose.onnx", [*ones, computed], [numpy_helper.from_array(v, k) for k, v in arrays.items()], ["y"]
    )
    foreign = save(tmp_path / "foreign.onnx", [helper.make_node("Relu", ["x"], ["y"])], [], ["y"])
    old = save(tmp_path / "old.onnx", [node], weights, node.output, opset=6, ir_version=3)
    output = tmp_path / "small.onnx"
    output.write_bytes(b"as it was")
    low = LowRank("svd", rank=RANK)
    for file, config, message, arguments in (
        (path, LowRank("activation", rank=RANK), "has to see data", {}),
        (path, LowRank("fisher", rank=RANK), "has to see data", {}),
        (path, LowRank("activation", rank=RANK), "no batch was given", {"batches": []}),
        (path, LowRank("activation", rank=RANK), "cannot run the model", {"batches": [{"y": np.ones(3)}]}),
        (path, LowRank("svd", rank=H), "not below break-even", {}),
        (loose, low, "no constants of the file", {}),
        (foreign, low, "holds no LSTM", {}),
        (old, low, "opset 6", {}),
        (tmp_path / "missing.onnx", low, "does not exist", {}),
    ):
        with pytest.raises(SlimLSTMError, match=message):
            compress_onnx(file, config, output, **arguments)
        assert output.read_bytes() == b"as it was"
    with pytest.raises(SlimLSTMError, match="name one that ends in"):
        compress_onnx(path, low, tmp_path)


def mutated(content, rng):
    """A file cut off, with bits, bytes or pieces changed, or with a field of its protocol buffers gone."""
    kind, data = rng.randrange(7), bytearray(content)
    at = rng.randrange(len(data))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        other = rng.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    elif kind == 3:
        del data[at : at + rng.randint(1, 40)]
    elif kind == 4:
        data[at:at] = rng.randbytes(rng.randint(1, 40))
    elif kind == 5:
        return rng.randbytes(rng.randint(0, 2000))
    else:
        return _with_changed_field(onnx.load_from_string(content), rng)
    return bytes(data)


def _with_changed_field(model, rng):
    message = model
    while True:
        fields = [(field, value) for field, value in message.ListFields()]
        if not fields:
            return model.SerializeToString()
        field, value = rng.choice(fields)
        inner = list(value) if hasattr(value, "append") else [value]
        is_message = bool(inner) and hasattr(inner[0], "ListFields")
        if is_message and rng.random() < 0.85:
            message = rng.choice(inner)
            continue
        if hasattr(value, "append") and len(value) and rng.random() < 0.5:
            del value[rng.randrange(len(value))]
        elif isinstance(value, int) and rng.random() < 0.7:
            numbers = [0, 1, 2, 7, 31] if field.name in ("data_type", "type") else [0, -1, 7, 2**31 - 1]
            setattr(message, field.name, rng.choice(numbers))
        else:
            message.ClearField(field.name)
        return model.SerializeToString()


def originals(folder):
    rng = np.random.default_rng(0)
    node, weights = lstm_parts(rng, "bidirectional", lengths=True, states=True)
    yield save(folder / "operator.onnx", [node], weights, node.output)
    node, outer = branches(rng, shared=True)
    yield save(folder / "nested.onnx", [node], outer, ["y"])
    yield save(folder / "chain.onnx", *shaped_by_nodes(rng, 11), ["y"], 11)
    nodes, weights, _ = written_out(rng)
    yield save(folder / "written_out.onnx", nodes, weights, ["h", "c"], 12)


def damage(contents, folder, count, seed):
    """How many of ``count`` damaged files were refused; the others were read and written."""
    rng = random.Random(seed)  # noqa: S311 (no secrets)
    path, output, refused = folder / "damaged.onnx", folder / "small.onnx", 0
    for index in range(count):
        path.write_bytes(mutated(contents[index % len(contents)], rng))
        output.write_bytes(b"as it was")
        try:
            compress_onnx(path, LowRank("svd", rank=1), output)
        except SlimLSTMError as error:
            assert re.search(r"\w{3}", str(error))
            assert output.read_bytes() == b"as it was"
            refused += 1
        else:
            assert find_lstms(onnx.load(output), output)
        assert {file.name for file in folder.iterdir() if "small" in file.name} == {"small.onnx"}
    return refused


@pytest.mark.slow
def test_damaged_files_are_refused_or_read(tmp_path):
    contents = [path.read_bytes() for path in originals(tmp_path)]
    refused = damage(contents, tmp_path, 400, seed=0)
    assert 40 < refused < 400


def test_foreign_files_are_refused(tmp_path):
    for index, content in enumerate(
        (b"", b"\x00", b"PK\x03\x04", b"\x08\x08", json.dumps({"a": 1}).encode(), b"\xff" * 999)
    ):
        path = tmp_path / f"{index}.onnx"
        path.write_bytes(content)
        with pytest.raises(SlimLSTMError):
            compress_onnx(path, LowRank("svd", rank=1), tmp_path / "small.onnx")
    assert not (tmp_path / "small.onnx").exists()


@pytest.mark.parametrize("name", ["LSTM", "weight_of_lstm", "input_forget", "ai.onnx.text", "graph_name"])
def test_names_that_are_no_text_are_refused(name, tmp_path):
    """The operator, a weight, an attribute, a domain and the graph have bytes for names that no reader can decode."""
    node, weights = lstm_parts(np.random.default_rng(0), "forward", lengths=False, states=False)
    node.input[1] = weights[0].name = "weight_of_lstm"
    node.attribute.append(helper.make_attribute("input_forget", 0))
    model = onnx.load(save(tmp_path / "in.onnx", [node], weights, node.output))
    model.graph.name = "graph_name"
    model.opset_import.append(helper.make_opsetid("ai.onnx.text", 1))
    content = model.SerializeToString()
    assert name.encode() in content
    (tmp_path / "in.onnx").write_bytes(content.replace(name.encode(), b"\xff" * len(name)))
    with pytest.raises(SlimLSTMError, match=r"in\.onnx is no intact ONNX file: .* is no UTF-8 text: b'"):
        compress_onnx(tmp_path / "in.onnx", Quantize("int8"), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
