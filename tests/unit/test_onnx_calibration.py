"""Moments, gradients and refit observations of ONNX graphs, against PyTorch."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import DIRECTIONS, INPUTS, H, feed, info, lstm_parts, run, save, written_out
from torch import nn

from slimlstm import SlimLSTMError
from slimlstm.calibration.refit import fit_to_new_inputs
from slimlstm.onnx.calibrate import calibrate_graph
from slimlstm.onnx.find import find_lstms
from slimlstm.onnx.observe import GraphObserver
from slimlstm.ops.weights import rebuilt

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")


def calibrated(path, runs, with_gradients=False):
    model = onnx.load(path)
    return calibrate_graph(model, find_lstms(model, path), runs, with_gradients)


def torch_lstm(path):
    """The LSTM of a file as a module; a lone backward direction is its own module on reversed input."""
    (lstm,) = find_lstms(onnx.load(path), path)
    module = nn.LSTM(INPUTS, H, bidirectional=len(lstm.locations) == 4).double()
    with torch.no_grad():
        for location in lstm.locations:
            getattr(module, location.name).copy_(location.matrix)
        for name, bias in lstm.biases.items():
            getattr(module, name).copy_(bias)
    return module


def gauss_newton(module, x, states):
    """E[δ δᵀ] of hh's gates over rows, exactly: the sum over all outputs of the squared gradients.

    A bias of its own at every step and sequence would be a probe; the gradient of a step's bias is that of its input.
    """
    steps, batch, hidden = *x.shape[:2], module.hidden_size
    extra = nn.LSTM(INPUTS + 4 * hidden, hidden, bidirectional=module.bidirectional).double()
    found = {}
    for ending in ("", "_reverse")[: 1 + module.bidirectional]:
        probe = torch.zeros(steps, batch, 4 * hidden, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            for name, value in module.named_parameters():
                eye = torch.eye(4 * hidden) * (name == f"weight_ih_l0{ending}")
                getattr(extra, name).copy_(torch.cat([value, eye], 1) if name.startswith("weight_ih") else value)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(extra, name).requires_grad_(False)
        outputs = extra(torch.cat([x, probe], -1), states)[0].flatten()
        total = torch.zeros(4 * hidden, 4 * hidden, dtype=torch.float64)
        for output in outputs:
            (gradient,) = torch.autograd.grad(output, probe, retain_graph=True)
            rows = gradient.flatten(0, 1)
            total += rows.T @ rows
        found[f"weight_hh_l0{ending}"] = total / (steps * batch)
    return found


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_gradients_estimate_the_gauss_newton_matrix(direction, tmp_path):
    number = DIRECTIONS[direction]
    node, weights = lstm_parts(np.random.default_rng(0), direction, states=True)
    path = save(tmp_path / "model.onnx", [node], weights, node.output[:1])
    values = feed(path, steps=3, batch=2, directions=number)
    found = calibrated(path, [values] * 150, with_gradients=True)
    x, *states = (torch.from_numpy(values[name]).double() for name in ("x", "h0", "c0"))
    for name, expected in gauss_newton(torch_lstm(path), x, tuple(states)).items():
        (moments,) = found[f"lstm.{name}"]
        assert moments.rows == 150 * 6
        error = (moments.gradients - expected).norm() / expected.norm()
        assert error < 0.1
        plain = calibrated(path, [values])[f"lstm.{name}"][0]
        torch.testing.assert_close(moments.inputs, plain.inputs, rtol=1e-4, atol=1e-5)


def test_only_outputs_that_are_read_count(tmp_path):
    """The last state alone sends less to the gates than all outputs."""
    node, weights = lstm_parts(np.random.default_rng(0))
    found = []
    for output in (node.output[0], node.output[1]):
        path = save(tmp_path / "model.onnx", [node], weights, [output])
        (moments,) = calibrated(path, [feed(path)] * 3, with_gradients=True)["lstm.weight_hh_l0"]
        found.append(float(moments.gradients.trace()))
    assert found[1] < 0.7 * found[0]


def test_padding_does_not_count(tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0), "bidirectional", lengths=True)
    path = save(tmp_path / "model.onnx", [node], weights, node.output[:1])
    values = feed(path) | {"lengths": np.array([2, 5, 0], np.int32)}
    changed = values | {"x": values["x"].copy()}
    changed["x"][2:, 0] = changed["x"][:, 2] = 99.0
    first, second = (calibrated(path, [one], with_gradients=True) for one in (values, changed))
    assert {key: moments.rows for key, (moments,) in first.items()} == dict.fromkeys(first, 7)
    for key, (moments,) in first.items():
        torch.testing.assert_close(moments.gradients, second[key][0].gradients)
        torch.testing.assert_close(moments.inputs, second[key][0].inputs)


@pytest.mark.parametrize("gemm", [False, True])
def test_single_operators_give_the_gradients_of_one_step(gemm, tmp_path):
    nodes, weights, _ = written_out(np.random.default_rng(0), gemm)
    path = save(tmp_path / "model.onnx", nodes, weights, ["h", "c"], 12)
    rng = np.random.default_rng(1)
    values = {n: rng.standard_normal((3, size)).astype(np.float32) for n, size in (("x", INPUTS), ("h0", H), ("c0", H))}
    (lstm,) = find_lstms(onnx.load(path), path)
    found = calibrated(path, [values] * 200, with_gradients=True)["net/cell.weight_hh_l0"][0]
    x, h, c = (torch.from_numpy(values[name]).double() for name in ("x", "h0", "c0"))
    ih, hh = (location.matrix.double() for location in lstm.locations)
    bias = torch.tensor(numpy_helper.to_array(next(w for w in weights if w.name == "b"))).double()
    f, o, i, g = bias.chunk(4)
    gates = (x @ ih.T + h @ hh.T + torch.cat([i, f, g, o])).requires_grad_()
    i, f, g, o = gates.chunk(4, 1)
    after = f.sigmoid() * c + i.sigmoid() * g.tanh()
    outputs = torch.cat([o.sigmoid() * after.tanh(), after]).flatten()
    rows = [torch.autograd.grad(output, gates, retain_graph=True)[0] for output in outputs]
    expected = sum(row.T @ row for row in rows) / 3
    assert (found.gradients - expected).norm() / expected.norm() < 0.1


REFUSED = {
    "clip": ({"clip": 0.5}, "has clip"),
    "coupled gates": ({"input_forget": 1}, "has input_forget"),
    "other activations": ({"activations": ["HardSigmoid", "Tanh", "Tanh"]}, "has other activations"),
}


@pytest.mark.parametrize(("attributes", "message"), REFUSED.values(), ids=list(REFUSED))
def test_gradients_of_other_cells_are_refused(attributes, message, tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0), **attributes)
    path = save(tmp_path / "model.onnx", [node], weights, node.output)
    with pytest.raises(SlimLSTMError, match=f"lstm {message}"):
        calibrated(path, [feed(path)], with_gradients=True)


def batch_first(node, weights):
    """An operator with layout=1, which ONNX Runtime lacks, on transposed inputs."""
    node.attribute.append(helper.make_attribute("layout", 1))
    return [node], weights, lambda values: {name: array.swapaxes(0, 1).copy() for name, array in values.items()}


def of_dtype(dtype):
    def convert(node, weights):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        before = [helper.make_node("Cast", [name], [f"{name}_wide"], to=kind) for name in ("x", "h0", "c0")]
        for index in (0, 5, 6):
            node.input[index] += "_wide"
        after = helper.make_node("Cast", ["lstm_y"], ["y"], to=TensorProto.FLOAT)
        return [*before, node, after], [
            numpy_helper.from_array(numpy_helper.to_array(w).astype(dtype), w.name) for w in weights
        ]

    return convert


FORMS = {"batch first": batch_first, "float16": of_dtype(np.float16), "float64": of_dtype(np.float64)}


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_the_runtime_lacks_are_calibrated(form, with_gradients, tmp_path):
    node, weights = lstm_parts(np.random.default_rng(0), "bidirectional", states=True)
    plain = save(tmp_path / "plain.onnx", [node], weights, node.output[:1])
    values = feed(plain, directions=2)
    nodes, other_weights, *turned = FORMS[form](node, weights)
    path = save(tmp_path / "other.onnx", nodes, other_weights, ["lstm_y" if turned else "y"])
    found = calibrated(path, [turned[0](values) if turned else values], with_gradients)
    for key, (moments,) in calibrated(plain, [values], with_gradients).items():
        torch.testing.assert_close(found[key][0].inputs, moments.inputs, rtol=1e-2, atol=1e-2)
        if with_gradients:
            torch.testing.assert_close(found[key][0].gradients, moments.gradients, rtol=2e-2, atol=2e-2)


def looped(kind):
    """A cell in single operators inside a Loop or a Scan over x [5, 3, I]."""
    nodes, weights, _ = written_out(np.random.default_rng(0))
    states = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, H]) for name in ("h0", "c0")]
    after = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, H]) for name in ("h", "c", "y")]
    nodes.append(helper.make_node("Identity", ["h"], ["y"]))
    if kind == "Scan":
        entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, INPUTS])
        body = helper.make_graph(nodes, "body", [*states, entry], after)
        names = ["first_h", "first_c", "all_x"], ["last_h", "last_c", "all_y"]
        return [helper.make_node("Scan", *names, body=body, num_scan_inputs=1)], weights
    count, going = (helper.make_tensor_value_info(*one, []) for one in (("t", TensorProto.INT64), ("on", TensorProto.BOOL)))
    nodes = [helper.make_node("Gather", ["all_x", "t"], ["x"]), *nodes, helper.make_node("Identity", ["on"], ["on_2"])]
    body = helper.make_graph(nodes, "body", [count, going, *states], [info("on_2", TensorProto.BOOL), *after])
    steps = numpy_helper.from_array(np.array(5), "steps")
    names = ["steps", "", "first_h", "first_c"], ["last_h", "last_c", "all_y"]
    return [helper.make_node("Loop", *names, body=body)], [*weights, steps]


@pytest.mark.parametrize("kind", ["Scan", "Loop"])
def test_single_operators_inside_of_loops(kind, tmp_path):
    nodes, weights = looped(kind)
    rng, path = np.random.default_rng(0), tmp_path / "model.onnx"
    entries = [info(name) for name in ("all_x", "first_h", "first_c")]
    graph = helper.make_graph(nodes, "graph", entries, [info("all_y")], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=8), path)
    values = {"all_x": rng.standard_normal((5, 3, INPUTS)), "first_h": np.zeros((3, H)), "first_c": np.zeros((3, H))}
    values = {name: array.astype(np.float32) for name, array in values.items()}
    found = calibrated(path, [values], with_gradients=True)
    (y,) = run(path, values)
    before = np.concatenate([values["first_h"][None], y[:-1]]).reshape(-1, H).astype(np.float64)
    (moments,) = found["net/cell.weight_hh_l0"]
    assert moments.rows == 15
    np.testing.assert_allclose(moments.inputs.numpy(), before.T @ before / 15, atol=1e-6)
    assert found["net/cell.weight_ih_l0"][0].gradients.trace() > 0


def stacked(path, shared=False):
    """Two bidirectional layers; where shared, the second again on its own output."""
    rng = np.random.default_rng(0)
    first, weights = lstm_parts(rng, "bidirectional", name="first")
    second, _ = lstm_parts(rng, "bidirectional", name="second")
    shapes = {"W": (2, 4 * H, 2 * H), "R": (2, 4 * H, H), "B": (2, 8 * H)}
    weights += [
        numpy_helper.from_array((rng.standard_normal(shape) / 3).astype(np.float32), f"second_{kind}")
        for kind, shape in shapes.items()
    ]
    layout = numpy_helper.from_array(np.array([0, 0, -1]), "layout")
    nodes = [first]
    for name in ("first", "second") if shared else ("first",):
        nodes.append(helper.make_node("Transpose", [f"{name}_y"], [f"{name}_t"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"{name}_t", "layout"], [f"{name}_flat"]))
        node = helper.make_node("LSTM", [], [], hidden_size=H, direction="bidirectional")
        node.CopyFrom(second)
        node.input[0], node.name = f"{name}_flat", f"after_{name}"
        node.output[:] = ["second_y"] if name == "first" else ["third_y"]
        nodes.append(node)
    return save(path, nodes, [*weights, layout], ["third_y" if shared else "second_y"])


def groups_of(path, shared):
    lstms = find_lstms(onnx.load(path), path)
    return [lstms[:1], lstms[1:]] if shared else [[lstm] for lstm in lstms]


@pytest.mark.parametrize("shared", [False, True])
def test_observations_of_a_compressed_graph(shared, tmp_path):
    path = stacked(tmp_path / "model.onnx", shared)
    groups, runs = groups_of(path, shared), [feed(path, seed=seed) for seed in range(3)]
    observer = GraphObserver(onnx.load(path), groups, runs)
    assert (observer.batch_count, observer.has_costs) == (3, True)
    own = {f"{lstm.name}.{location.name}": location.matrix for lstm, *_ in groups for location in lstm.locations}
    for seen in observer.observe(own, range(3), range(3)):
        assert float(seen.costs.max()) < 1e-10
        for keys, rows in seen.dense.items():
            for one, other in zip(rows.inputs, seen.compressed[keys].inputs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    zeros = own | {"after_first.weight_hh_l0": torch.zeros(4 * H, H)}
    first, last = observer.observe(zeros, range(1), range(2, 3))
    assert first.costs is None
    assert float(last.costs.mean()) > 1e-3
    count = {keys: len(rows.inputs[0]) for keys, rows in first.dense.items()}
    assert count[("first.weight_ih_l0", "first.weight_hh_l0")] == 15
    assert count[("after_first.weight_ih_l0", "after_first.weight_hh_l0")] == (30 if shared else 15)


def test_refitting_a_graph_lowers_its_cost(tmp_path):
    path = stacked(tmp_path / "model.onnx")
    groups, runs = groups_of(path, False), [feed(path, steps=20, batch=4, seed=seed) for seed in range(10)]
    observer = GraphObserver(onnx.load(path), groups, runs)
    exact = {f"{lstm.name}.{location.name}": location.matrix for (lstm,) in groups for location in lstm.locations}

    def truncated(matrix, moment):
        u = torch.linalg.eigh(matrix @ moment @ matrix.T).eigenvectors[:, -6:].float()
        return u, u.T @ matrix.float()

    keys = [key for key in exact if key.startswith("after_first.weight")]
    weights = {key: truncated(exact[key].double(), torch.eye(exact[key].shape[1]).double()) for key in keys}
    best, fitted = fit_to_new_inputs(observer, exact, weights, dict.fromkeys(keys, truncated), 2)
    costs = [
        torch.stack([seen.costs.mean() for seen in observer.observe(now, range(0), range(10))]).mean()
        for now in (weights, fitted)
    ]
    assert best
    assert costs[1] < 0.7 * costs[0]
    assert all(rebuilt(fitted[key]).shape == exact[key].shape for key in keys)
