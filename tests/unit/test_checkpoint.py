import pickle
from collections import OrderedDict
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from slimlstm import LowRank, Plan, Prune, Quantize, SlimLSTMError, compress_, find_sites, load, save
from slimlstm.folders import read_config
from slimlstm.pipeline.plan import SitePlan
from slimlstm.weight_files import compress_file, find_matrices, matrix_of, read_tensors

INPUTS, H = 5, 6


def encoder():
    return nn.ModuleDict({"encoder": nn.LSTM(INPUTS, H), "out": nn.Linear(H, 2)})


def equal(found, expected):
    """Whether two sets of tensors have the same names, dtypes and numbers."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


WRITERS = {
    "safetensors": save_file,
    "pt": torch.save,
    "pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
}
every_ending = pytest.mark.parametrize("ending", WRITERS)


def write(state, path):
    WRITERS[path.suffix[1:]](state, path)
    return path


@every_ending
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_state_dict_is_read_as_it_is(ending, dtype, tmp_path):
    state = encoder().to(dtype).state_dict()
    assert equal(read_tensors(write(state, tmp_path / f"weights.{ending}")), state)


NESTED = {
    "state_dict": lambda state, moments: {"state_dict": state, "epoch": 3, "optimizer": moments, "args": {"lr": 0.1}},
    "model": lambda state, moments: {"optimizer": moments, "model": state, "best": None, "scaler": torch.ones(())},
    "two deep": lambda state, moments: {"trainer": {"epoch": 1, "optim": moments, "model": state}},
    "beside tensors": lambda state, moments: {"step": torch.tensor(7), "optim": moments, "net": OrderedDict(state)},
}


@pytest.mark.parametrize("wrap", NESTED.values(), ids=NESTED)
def test_a_nested_state_dict_is_found(wrap, tmp_path):
    model = encoder()
    optimizer = torch.optim.Adam(model.parameters())
    model["encoder"](torch.ones(2, 1, INPUTS))[0].sum().backward()
    optimizer.step()
    torch.save(wrap(model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    assert equal(read_tensors(str(tmp_path / "checkpoint.pt")), model.state_dict())


def test_one_of_several_models_in_a_file_is_chosen(tmp_path):
    first, second = encoder().state_dict(), nn.LSTM(3, 4).state_dict()
    path = tmp_path / "both.pt"
    torch.save({"generator": first, "critic": {"model": second, "more": first.copy()}, "epoch": 1}, path)
    with pytest.raises(SlimLSTMError, match=r"'generator' \(6 tensors\), 'critic\.model' \(4 tensors\).*--part generator"):
        read_tensors(path)
    assert equal(read_tensors(path, "generator"), first)
    assert equal(read_tensors(path, "critic.model"), second)
    joined = {f"model.{name}": value for name, value in second.items()}
    assert equal(read_tensors(path, "critic"), joined | {f"more.{name}": value for name, value in first.items()})
    with pytest.raises(SlimLSTMError, match="no part 'ema'; it has 'generator'"):
        read_tensors(path, "ema")


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    content = {"model": encoder().state_dict()}
    content["parent"] = content
    torch.save(content, tmp_path / "circle.pt")
    assert equal(read_tensors(tmp_path / "circle.pt"), content["model"])


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


PICKLERS = {
    "zip": torch.save,
    "legacy": WRITERS["pth"],
    "bare": lambda content, path: path.write_bytes(pickle.dumps(content)),
}


@pytest.mark.parametrize("pickler", PICKLERS.values(), ids=PICKLERS)
def test_code_in_a_file_is_not_run(pickler, tmp_path):
    path, marker, state = tmp_path / "model.pt", tmp_path / "marker", encoder().state_dict()
    pickler({"state_dict": state, "config": Touch(marker)}, path)
    with pytest.raises(SlimLSTMError, match="pickled code, which is not run"):
        read_tensors(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if pickler is not PICKLERS["bare"] else pickle.loads(path.read_bytes())  # noqa: S301
    assert marker.exists(), "the file would not have done anything"


def test_a_pickled_module_is_read_without_its_code(tmp_path):
    model = encoder()
    torch.save(model, tmp_path / "model.pt")
    assert equal(read_tensors(tmp_path / "model.pt"), model.state_dict())


def test_a_torchscript_archive_is_refused(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "model.pt")
    with pytest.raises(SlimLSTMError, match="TorchScript"):
        read_tensors(tmp_path / "model.pt")


UNREADABLE = {
    "missing.safetensors": (None, "does not exist"),
    "weights.h5": (b"HDF", r"ends in \.h5, and its content is none that can be read: safetensors, PyTorch's"),
    "weights": (b"bits", "ends in nothing"),
    "empty.safetensors": (b"", "is empty"),
    "noise.safetensors": (b"bits", "no intact safetensors file"),
    "empty.pt": (b"", "is empty"),
    "text.pth": (b"a text\n", "checkpoint|pickled code"),
    "noise.onnx": (bytes(range(256)), "no intact ONNX file"),
}


@pytest.mark.parametrize(("name", "content", "message"), [(k, *v) for k, v in UNREADABLE.items()], ids=UNREADABLE)
def test_what_is_no_weight_file_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SlimLSTMError, match=message):
        read_tensors(tmp_path / name)


def test_a_folder_is_read_if_it_was_saved(tmp_path):
    with pytest.raises(SlimLSTMError, match=r"a folder without config\.json"):
        read_tensors(tmp_path)
    model = encoder()
    compress_(model, LowRank(rank=1))
    save(model, tmp_path)
    assert equal(read_tensors(tmp_path), model.state_dict())


def test_the_weights_file_of_a_quantised_folder_is_read_without_the_folder(tmp_path):
    model = encoder()
    compress_(model, Quantize("int8"))
    save(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert equal(read_tensors(file), model.state_dict())


MODELS = {
    "stacked": lambda: nn.LSTM(INPUTS, H, num_layers=2),
    "bidirectional": lambda: nn.LSTM(INPUTS, H, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(INPUTS, H, proj_size=3, bidirectional=True),
    "no biases": lambda: nn.LSTM(INPUTS, H, bias=False),
    "cell": lambda: nn.LSTMCell(INPUTS, H),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def inside(lstm):
    """A model around an LSTM."""
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2), lstm), "head": nn.Linear(H, 2)})


CONFIGS = {
    "svd": LowRank(rank=2),
    "svd of hh": LowRank(keep=0.5, target="hh"),
    "semi-nmf of ih": LowRank("semi-nmf", rank=2, target="ih"),
    "prune": Prune(rank=1),
    "prune hh": Prune(keep=0.5, target="hh"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every_model
@pytest.mark.parametrize("config", [None, *CONFIGS.values()], ids=["dense", *CONFIGS])
def test_the_matrices_of_a_state_dict_are_the_models_sites(make, config):
    model = inside(make())
    if config is not None:
        compress_(model, config)
    assert set(find_matrices(model.state_dict())) == set(find_sites(model))


@every_config
def test_the_matrix_is_what_inference_sees(config):
    model = encoder()
    compress_(model, config)
    tensors = model.state_dict()
    found = {site.name: matrix_of(names, tensors) for site, names in find_matrices(tensors).items()}
    lstm = model["encoder"]
    for name, matrix in found.items():
        assert_close(matrix, lstm.product(name) if name in getattr(lstm, "ranks", {}) else getattr(lstm, name))


def test_a_bare_lstms_weights_need_no_prefix():
    assert [site.key for site in find_matrices(nn.LSTM(INPUTS, H).state_dict())] == ["weight_ih_l0", "weight_hh_l0"]


OTHERS = {
    "GRU": lambda: nn.GRU(INPUTS, H),
    "GRU, bidirectional": lambda: nn.GRU(4, 4, num_layers=2, bidirectional=True),
    "RNN": lambda: nn.RNN(INPUTS, H),
    "GRUCell": lambda: nn.GRUCell(INPUTS, H),
    "RNNCell": lambda: nn.RNNCell(INPUTS, H),
    "no recurrence": lambda: nn.Linear(INPUTS, 4 * H),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_layers_are_not_taken_for_lstms(make, tmp_path):
    model = nn.ModuleDict({"a": make()})
    assert find_matrices(model.state_dict()) == {}
    path = write(model.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(SlimLSTMError, match="no weights of an LSTM"):
        compress_file(path, LowRank(rank=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def renamed(state, **changes):
    return {changes.get(name, name): tensor for name, tensor in state.items()}


WEIGHT_DROP = {
    "raw": {"weight_hh_l0": "weight_hh_l0_raw"},
    "parametrized": {"weight_hh_l0": "parametrizations.weight_hh_l0.original"},
    "both parametrized": {f"weight_{kind}_l0": f"parametrizations.weight_{kind}_l0.original" for kind in ("ih", "hh")},
}


@pytest.mark.parametrize("module", ["", "rnns.0.module"])
@pytest.mark.parametrize("changes", WEIGHT_DROP.values(), ids=WEIGHT_DROP)
def test_the_raw_weight_under_weight_drop_is_found(changes, module):
    dot = "." if module else ""
    state = {module + dot + name: value for name, value in renamed(nn.LSTM(INPUTS, H).state_dict(), **changes).items()}
    found = {site.key: names for site, names in find_matrices(state).items()}
    assert found == {
        f"{module}{dot}{name}": (f"{module}{dot}{changes.get(name, name)}",) for name in ("weight_ih_l0", "weight_hh_l0")
    }


@pytest.mark.parametrize("place", ["module.", ""], ids=["in the LSTM", "in its wrapper"])
@pytest.mark.parametrize("raw_first", [False, True])
def test_the_raw_weight_goes_before_what_was_last_made_of_it(raw_first, place):
    state = {f"rnn.module.{name}": tensor for name, tensor in nn.LSTM(INPUTS, H).state_dict().items()}
    raw = {f"rnn.{place}weight_hh_l0_raw": torch.ones(4 * H, H)}
    tensors = raw | state if raw_first else state | raw
    assert set(find_matrices(tensors).values()) == {("rnn.module.weight_ih_l0",), tuple(raw)}


IOFC = (0, 3, 1, 2)
"""Where ONNX's gates i, o, f, c are among PyTorch's i, f, g, o."""
ENDINGS = {"forward": [""], "reverse": ["_reverse"], "bidirectional": ["", "_reverse"]}


def onnx_lstm(lstm, name="lstm", direction="forward", inputs=("W", "R", "B")):
    """A node, and its weights as initializers, that computes what ``lstm``'s only layer does."""
    state = lstm.state_dict()

    def gates(kind, ending):
        return torch.cat([state[f"{kind}_l0{ending}"].chunk(4)[gate] for gate in IOFC])

    endings = ENDINGS[direction]
    weights = {"W": [gates("weight_ih", e) for e in endings], "R": [gates("weight_hh", e) for e in endings]}
    if lstm.bias:
        weights["B"] = [torch.cat([gates("bias_ih", e), gates("bias_hh", e)]) for e in endings]
    names = [f"{name}_{kind}" for kind in inputs if kind in weights]
    node = helper.make_node("LSTM", ["x", *names], [f"{name}_y"], name, hidden_size=lstm.hidden_size, direction=direction)
    tensors = [constant(f"{name}_{kind}", torch.stack(weights[kind])) for kind in inputs if kind in weights]
    return node, tensors


def constant(name, value):
    return numpy_helper.from_array(value.numpy() if isinstance(value, torch.Tensor) else value, name)


def integers(name, *values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def write_onnx(path, nodes, initializers, outputs=("lstm_y",), opset=13):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", INPUTS])
    ys = [helper.make_tensor_value_info(y, TensorProto.FLOAT, None) for y in outputs]
    graph = helper.make_graph(nodes, "graph", [x], ys, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def under(prefix, lstm, direction="forward"):
    """The tensors of one direction or both, as named after an ONNX node."""
    reverse = {"forward": {False}, "reverse": {True}, "bidirectional": {False, True}}[direction]
    return {f"{prefix}.{k}": v for k, v in lstm.state_dict().items() if k.endswith("_reverse") in reverse}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("direction", ENDINGS)
def test_onnx_weights_are_read_in_pytorchs_order(direction, bias, tmp_path):
    lstm = nn.LSTM(INPUTS, H, bias=bias, bidirectional=direction != "forward")
    node, tensors = onnx_lstm(lstm, direction=direction)
    found = read_tensors(write_onnx(tmp_path / "model.onnx", [node], tensors))
    assert equal(found, under("lstm", lstm, direction))
    assert {site.key for site in find_matrices(found)} == {name for name in found if ".weight_" in name}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_onnx_dtypes_are_kept(dtype, tmp_path):
    lstm = nn.LSTM(INPUTS, H).to(dtype)
    node, tensors = onnx_lstm(lstm)
    assert equal(read_tensors(write_onnx(tmp_path / "model.onnx", [node], tensors)), under("lstm", lstm))


def test_onnx_bfloat16_is_read(tmp_path):
    lstm = nn.LSTM(INPUTS, H, bias=False).bfloat16()
    node, tensors = onnx_lstm(lstm.float())
    for tensor in tensors:
        values = numpy_helper.to_array(tensor).flatten()
        tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.BFLOAT16, tensor.dims, values))
    expected = under("lstm", lstm.bfloat16())
    assert equal(read_tensors(write_onnx(tmp_path / "model.onnx", [node], tensors)), expected)


@pytest.mark.parametrize("inner_weights", [False, True])
def test_onnx_lstms_in_the_branches_of_an_if(inner_weights, tmp_path):
    lstms = {"then": nn.LSTM(INPUTS, H), "else": nn.LSTM(INPUTS, 3)}
    parts = {name: onnx_lstm(lstm, name) for name, lstm in lstms.items()}
    branches, outer = {}, [constant("condition", torch.tensor(True))]
    for name, (node, tensors) in parts.items():
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        branches[f"{name}_branch"] = helper.make_graph([node], name, [], [out], tensors if inner_weights else [])
        outer += [] if inner_weights else tensors
    node = helper.make_node("If", ["condition"], ["y"], **branches)
    found = read_tensors(write_onnx(tmp_path / "model.onnx", [node], outer, ["y"]))
    assert equal(found, under("then", lstms["then"]) | under("else", lstms["else"]))


def test_onnx_branches_may_use_one_name_twice(tmp_path):
    """Exporters give the LSTMs of both branches of an If the name that they have in the model."""
    lstms, branches = {"then": nn.LSTM(INPUTS, H), "else": nn.LSTM(INPUTS, 3)}, {}
    for name, lstm in lstms.items():
        node, tensors = onnx_lstm(lstm, "rnn")
        out = helper.make_tensor_value_info("rnn_y", TensorProto.FLOAT, None)
        branches[f"{name}_branch"] = helper.make_graph([node], name, [], [out], tensors)
    node = helper.make_node("If", ["condition"], ["y"], **branches)
    path = write_onnx(tmp_path / "model.onnx", [node], [constant("condition", torch.tensor(True))], ["y"])
    shapes = sorted(site.shape for site in find_matrices(read_tensors(path)))
    assert shapes == [(12, 3), (12, INPUTS), (4 * H, INPUTS), (4 * H, H)]


def test_onnx_lstms_without_names_are_told_apart(tmp_path):
    """Only h or c of each is used."""
    lstms, nodes, initializers = [nn.LSTM(INPUTS, H), nn.LSTM(INPUTS, 3)], [], []
    for index, lstm in enumerate(lstms):
        node, tensors = onnx_lstm(lstm, f"n{index}")
        node.name = ""
        del node.output[:]
        node.output.extend(["", "h0"] if index == 0 else ["", "", "c1"])
        nodes.append(node)
        initializers += tensors
    found = read_tensors(write_onnx(tmp_path / "model.onnx", nodes, initializers, ["h0", "c1"]))
    assert equal(found, under("h0", lstms[0]) | under("c1", lstms[1]))


def shaped_by_nodes(lstm, opset):
    """``lstm`` as exporters write it that do not fold constants: PyTorch's weights, cut and put together by nodes."""
    state, nodes = lstm.state_dict(), []
    initializers = [constant(name, value) for name, value in state.items()]
    initializers += [integers("axis", 0), *(integers(str(gate * H), gate * H) for gate in range(5))]

    def add(op, inputs, output, **attributes):
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def in_onnx_order(name):
        cuts = [add("Slice", [name, str(g * H), str((g + 1) * H), "axis"], f"{name}_{g}") for g in IOFC]
        return add("Concat", cuts, f"{name}_iofc", axis=0)

    def stacked(name):
        if opset < 13:
            return add("Unsqueeze", [name], f"{name}_1", axes=[0])
        axes = add("Constant", [], f"{name}_axes", value=integers("", 0))
        return add("Unsqueeze", [name, axes], f"{name}_1")

    w, r = (stacked(in_onnx_order(f"weight_{kind}_l0")) for kind in ("ih", "hh"))
    b = stacked(add("Concat", [in_onnx_order("bias_ih_l0"), in_onnx_order("bias_hh_l0")], "b", axis=0))
    nodes.append(helper.make_node("LSTM", ["x", w, r, b], ["lstm_y"], "lstm", hidden_size=H))
    return nodes, initializers


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_onnx_weights_are_followed_through_nodes(opset, tmp_path):
    lstm = nn.LSTM(INPUTS, H)
    path = write_onnx(tmp_path / "model.onnx", *shaped_by_nodes(lstm, opset), opset=opset)
    assert equal(read_tensors(path), under("lstm", lstm))


def test_onnx_weights_in_constant_nodes(tmp_path):
    lstm = nn.LSTM(INPUTS, H)
    node, tensors = onnx_lstm(lstm)
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors]
    assert equal(read_tensors(write_onnx(tmp_path / "model.onnx", [*constants, node], [])), under("lstm", lstm))


COMPUTED = {
    "dynamic": lambda tensor: ([helper.make_node("Identity", ["x"], [tensor.name])], []),
    "cut from the input": lambda tensor: ([helper.make_node("Concat", ["x", "x"], [tensor.name], axis=0)], []),
    "an unknown operator": lambda tensor: ([helper.make_node("Mystery", [], [tensor.name], domain="my.own")], []),
    "a reshape that cannot be": lambda tensor: (
        [helper.make_node("Reshape", ["seven", "two"], [tensor.name])],
        [integers("seven", *range(7)), integers("two", 2, 2)],
    ),
}


@pytest.mark.parametrize("which", [0, 1], ids=["ih", "hh"])
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_onnx_weights_that_are_no_numbers_in_the_file_are_left_out(compute, which, tmp_path):
    plain = nn.LSTM(INPUTS, H)
    node, tensors = onnx_lstm(nn.LSTM(INPUTS, H), "computed")
    nodes, initializers = compute(tensors.pop(which))
    last, weights = onnx_lstm(plain)
    path = write_onnx(tmp_path / "model.onnx", [*nodes, node, last], [*initializers, *tensors, *weights])
    assert equal(read_tensors(path), under("lstm", plain))


REAL = {
    "silero_vad/silero_vad.onnx": {("weight_ih_l0", (512, 128)): 4, ("weight_hh_l0", (512, 128)): 4},
    "dtln/model_1.onnx": {
        ("lstm_4.weight_ih_l0", (512, 257)): 1,
        ("lstm_4.weight_hh_l0", (512, 128)): 1,
        ("lstm_5.weight_ih_l0", (512, 128)): 1,
        ("lstm_5.weight_hh_l0", (512, 128)): 1,
    },
}


@pytest.mark.parametrize(("file", "expected"), REAL.items(), ids=REAL)
def test_real_onnx_files(file, expected, data_folder):
    sites = find_matrices(read_tensors(data_folder / "pretrained" / file))
    assert len(sites) == sum(expected.values())
    for (key, shape), count in expected.items():
        assert sum(site.key.endswith(key) and site.shape == shape for site in sites) == count


STATE = nn.LSTM(2, 2).state_dict()
CHECKPOINT = {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "lr": [0.1]}, "epoch": 3}
KINDS = {
    "state dict.safetensors": lambda path: save_file(STATE, path),
    "state dict.pt": lambda path: torch.save(STATE, path),
    "checkpoint.pt": lambda path: torch.save(CHECKPOINT, path),
    "legacy.pth": lambda path: WRITERS["pth"](STATE, path),
    "initializers.onnx": lambda path: write_onnx(path, *one_node(nn.LSTM(2, 2, bidirectional=True), "bidirectional")),
    "nodes.onnx": lambda path: write_onnx(path, *shaped_by_nodes(nn.LSTM(INPUTS, H), 13)),
}


def one_node(lstm, direction):
    node, tensors = onnx_lstm(lstm, direction=direction)
    return [node], tensors


@pytest.fixture(scope="module", params=KINDS)
def intact(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("intact") / request.param
    KINDS[request.param](path)
    return path


def reads(path):
    """What is read from a file, None if it is refused; whatever is read can be used."""
    try:
        tensors = read_tensors(path)
        for site, names in find_matrices(tensors).items():
            assert matrix_of(names, tensors).shape == site.shape
    except SlimLSTMError:
        return None
    return tensors


@given(data=st.data())
def test_a_cut_file_is_refused(intact, data):
    whole, content, path = reads(intact), intact.read_bytes(), intact.with_stem("cut")
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    found = reads(path)
    # Protocol buffers may end after any field; what is left of the LSTM then is right.
    assert found is None or (path.suffix == ".onnx" and equal(found, {name: whole[name] for name in found}))


@settings(max_examples=2 * settings.default.max_examples)
@given(data=st.data())
def test_a_changed_byte_is_refused_or_read(intact, data):
    content, path = bytearray(intact.read_bytes()), intact.with_stem("changed")
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    reads(path)


@every_model
@every_config
def test_compress_file_does_what_compress_does(make, config, tmp_path):
    fresh, model = inside(make()), inside(make())
    model.load_state_dict(fresh.state_dict())
    compress_(model, config)
    compress_file(str(write(fresh.state_dict(), tmp_path / "w.safetensors")), config, str(tmp_path / "out"))
    assert equal(load(tmp_path / "out", fresh).state_dict(), model.state_dict())
    assert find_sites(fresh) == find_sites(model)


@every_model
@every_config
def test_compress_file_reports_what_compress_does(make, config, tmp_path):
    model = inside(make())
    path = write(model.state_dict(), tmp_path / "w.pt")
    assert compress_file(path, config, tmp_path / "out") == compress_(model, config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_compress_file_keeps_the_dtype(dtype, tmp_path):
    fresh, model = encoder().to(dtype), encoder().to(dtype)
    model.load_state_dict(fresh.state_dict())
    compress_(model, LowRank(rank=2))
    compress_file(write(fresh.state_dict(), tmp_path / "w.pt"), LowRank(rank=2), tmp_path / "out")
    assert equal(load(tmp_path / "out", fresh).state_dict(), model.state_dict())


TWICE = {
    "lower rank": (LowRank(rank=3), LowRank(rank=2)),
    "hh, then ih": (LowRank(rank=2, target="hh"), LowRank(rank=2, target="ih")),
    "prune hh, then factor ih": (Prune(rank=2, target="hh"), LowRank(rank=2, target="ih")),
    "prune, then factor": (Prune(rank=2), LowRank(rank=2)),
    "prune, then prune more": (Prune(rank=2), Prune(rank=1)),
    "quantise, then factor": (Quantize("bfloat16"), LowRank(rank=1)),
    "quantise, then prune": (Quantize("int8"), Prune(rank=2)),
    "quantise again": (Quantize("bfloat16"), Quantize("int8")),
    "factor, then quantise": (LowRank(rank=2, target="hh"), Quantize("int8")),
    "prune, then quantise": (Prune(rank=2, target="hh"), Quantize("int8")),
    "quantise hh, then factor ih": (Quantize("int8", "hh"), LowRank(rank=2, target="ih")),
}


@pytest.mark.parametrize(("first", "second"), TWICE.values(), ids=TWICE)
def test_compress_file_goes_on_from_a_saved_folder(first, second, tmp_path):
    fresh, model = encoder(), encoder()
    model.load_state_dict(fresh.state_dict())
    compress_(model, first)
    save(model, tmp_path / "first")
    compress_(model, second)
    compress_file(tmp_path / "first", second, tmp_path / "second")
    assert equal(load(tmp_path / "second", fresh).state_dict(), model.state_dict())
    assert find_sites(fresh) == find_sites(model)
    # Compressed as a model or as a file, it is the same folder.
    save(model, tmp_path / "third")
    second, third = (read_config(tmp_path / name) for name in ("second", "third"))
    assert second["sites"] == third["sites"]
    assert second["weights"] == third["weights"]


@pytest.mark.parametrize("storage", ["int8", "bfloat16"])
@every_model
def test_compress_file_with_a_storage(make, storage, tmp_path):
    fresh, model = inside(make()), inside(make())
    model.load_state_dict(fresh.state_dict())
    path = write(fresh.state_dict(), tmp_path / "w.pt")
    report = compress_file(path, LowRank(rank=1), tmp_path / "out", storage=storage)
    assert report == compress_(model, report.plan)
    assert equal(load(tmp_path / "out", fresh).state_dict(), model.state_dict())
    assert {site.storage for site in find_sites(model)} == {storage}
    assert report == compress_file(path, report.plan, tmp_path / "again")


def test_compress_file_keeps_tied_tensors_tied(tmp_path):
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(7, H), "lstm": nn.LSTM(H, H), "out": nn.Linear(H, 7)})
        model["out"].weight = model["embed"].weight
        return model

    fresh = tied()
    report = compress_file(write(fresh.state_dict(), tmp_path / "w.pt"), LowRank(rank=2), tmp_path / "out")
    again = load(tmp_path / "out", tied())
    assert again["out"].weight is again["embed"].weight
    assert torch.equal(again["out"].weight, fresh["embed"].weight)
    assert report.model.parameters_after == sum(parameter.numel() for parameter in again.parameters())


def test_compress_file_of_onnx_fits_the_lstm_it_was_made_from(tmp_path):
    model = nn.ModuleDict({"lstm": nn.LSTM(INPUTS, H)})
    node, tensors = onnx_lstm(model["lstm"])
    compress_file(write_onnx(tmp_path / "m.onnx", [node], tensors), LowRank(rank=2), tmp_path / "out")
    fresh = load(tmp_path / "out", nn.ModuleDict({"lstm": nn.LSTM(INPUTS, H)}))
    compress_(model, LowRank(rank=2))
    assert equal(fresh.state_dict(), model.state_dict())


def test_compress_file_carries_out_a_plan(tmp_path):
    plan = Plan({"encoder.weight_hh_l0": SitePlan("svd", rank=1), "encoder.weight_ih_l0": SitePlan("prune", nonzeros=9)})
    path = write(encoder().state_dict(), tmp_path / "w.pt")
    seen = []
    report = compress_file(path, plan, tmp_path / "out", lambda key, fraction: seen.append((key, fraction)))
    assert report.plan == plan
    assert [(site.rank, site.nonzeros) for site in find_sites(load(tmp_path / "out", encoder()))] == [(None, 9), (1, None)]
    assert {key for key, _ in seen} == set(plan.sites)
    assert all(0.0 <= fraction <= 1.0 for _, fraction in seen)


def with_nan():
    state = encoder().state_dict()
    state["encoder.weight_hh_l0"][3, 2] = float("nan")
    return state


def with_nan_in_projection():
    state = nn.ModuleDict({"encoder": nn.LSTM(INPUTS, H, proj_size=2)}).state_dict()
    state["encoder.weight_hr_l0"][1, 2] = float("nan")
    return state


REFUSED = {
    "rank too high": (encoder, LowRank(rank=H + 1), "rank 7 is above 6"),
    "nothing smaller": (encoder, LowRank(rank=H), "nothing would get smaller: .*break-even"),
    "a number that is none": (with_nan, LowRank(rank=1), "encoder.weight_hh_l0: .*"),
    "no such site": (encoder, Plan({"decoder.weight_hh_l0": SitePlan("svd", rank=1)}), "decoder.weight_hh_l0.*encoder"),
    "no LSTM": (lambda: nn.GRU(INPUTS, H), LowRank(rank=1), "no weights of an LSTM"),
    "filter": (encoder, LowRank(rank=1, filter=lambda _: False), "the filter selected none"),
    "float64": (lambda: encoder().double(), Quantize("int8"), "encoder.weight_ih_l0: only float32 weights"),
    "NaN in a projection": (with_nan_in_projection, Quantize("int8"), "weight_hh_l0: .*1 NaN"),
}


@pytest.mark.parametrize(("make", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_writes_nothing(make, config, message, tmp_path):
    made = make()
    path = write(made if isinstance(made, dict) else made.state_dict(), tmp_path / "w.pt")
    with pytest.raises(SlimLSTMError, match=message):
        compress_file(path, config, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "[]", "no JSON"])
def test_a_config_of_something_else_is_not_overwritten(content, tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(content)
    with pytest.raises(SlimLSTMError, match="of something else"):
        compress_file(write(encoder().state_dict(), tmp_path / "w.pt"), LowRank(rank=1), folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == content


def test_a_file_is_no_folder_to_write(tmp_path):
    path = write(encoder().state_dict(), tmp_path / "w.pt")
    before = path.read_bytes()
    with pytest.raises(SlimLSTMError, match="is a file; name a folder"):
        compress_file(path, LowRank(rank=1), path)
    assert path.read_bytes() == before
