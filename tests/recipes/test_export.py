"""Files that ``export_onnx`` writes, run by ONNX Runtime beside the models."""

import copy
import json

import pytest
import torch
from strangers import B, H, T
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from slimlstm import (
    LowRank,
    LowRankLSTM,
    LowRankLSTMCell,
    Prune,
    Quantize,
    SlimLSTMError,
    compress_,
    export_onnx,
    load,
    save,
)
from slimlstm.cli import app
from slimlstm.demo.model import embedded_model
from slimlstm.onnx.forms import FORMS
from slimlstm.onnx.layers import layer_model
from slimlstm.onnx.verify import INT8_TOLERANCE, TOLERANCE, Bound
from slimlstm.ops import cpu

onnxruntime = pytest.importorskip("onnxruntime", reason="what was written is run by ONNX Runtime")
onnx = pytest.importorskip("onnx")
IN = 12

ARGUMENTS = {
    "one direction": {},
    "bidirectional": {"bidirectional": True},
    "stacked": {"num_layers": 2, "dropout": 0.3},
    "projected": {"proj_size": 5, "num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "batch_first": True},
}
CONFIGS = {
    "dense": None,
    "low rank": LowRank(rank=3),
    "hh only": LowRank(rank=2, target="hh"),
    "masked": Prune(keep=0.5),
    "int8": LowRank(rank=3, storage="int8"),
    "bfloat16": Quantize("bfloat16"),
}


class Streaming(nn.Module):
    """States in and out."""

    def __init__(self, **arguments):
        super().__init__()
        self.lstm = nn.LSTM(IN, H, **arguments)
        self.head = nn.Linear((arguments.get("proj_size") or H) * (1 + arguments.get("bidirectional", False)), 4)

    def forward(self, x, state):
        y, state = self.lstm(x, state)
        return self.head(y), state

    def example(self, steps, batch):
        lstm = self.lstm
        count, outputs = lstm.num_layers * (1 + lstm.bidirectional), lstm.proj_size or H
        shape = (batch, steps) if lstm.batch_first else (steps, batch)
        return torch.randn(*shape, IN), (torch.randn(count, batch, outputs), torch.randn(count, batch, H))


class Steps(nn.Module):
    """A cell in a loop, and no state from outside."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(IN, H)

    def forward(self, x):
        state, outputs = None, []
        for at in x.unbind(0):
            state = self.cell(at, state)
            outputs.append(state[0])
        return {"y": torch.stack(outputs)}


def made(model, config):
    if config is not None:
        compress_(model, config)
    return model.eval()


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    return [torch.from_numpy(output) for output in outputs]


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "masked"])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_alone_is_the_layer(arguments, config, form):
    one = {name: value for name, value in arguments.items() if name not in ("num_layers", "dropout", "batch_first")}
    holder = made(nn.Sequential(nn.LSTM(IN, H, **one)), CONFIGS[config])
    lstm = holder[0] if isinstance(holder[0], LowRankLSTM) else LowRankLSTM.from_dense(holder[0])
    if form != "scan":
        lstm.backend = "reference"  # which does not round the inputs of int8 matrices
    if form == "lstm" and "proj_size" in arguments:
        with pytest.raises(
            SlimLSTMError, match="form='lstm' is not possible, because the LSTM operator has no projections"
        ):
            layer_model(lstm.layers()[0], form)
        return
    session = onnxruntime.InferenceSession(
        layer_model(lstm.layers()[0], form).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    config = "dense" if form != "scan" else config
    for steps, batch in ((1, 1), (7, 3), (200, 2)):
        x = torch.randn(steps, batch, IN)
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), lstm(x)[0], **near(CONFIGS[config])
            )


def near(config):
    # The kernel and the file round inputs alike, but for ties.
    return {"rtol": 1e-4, "atol": 2e-3 if getattr(config, "storage", None) == "int8" else 1e-4}


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ("one direction", "dense"),
        ("bidirectional", "low rank"),
        ("stacked", "masked"),
        ("stacked", "int8"),
        ("projected", "dense"),
        ("projected", "low rank"),
        ("no bias", "hh only"),
    ],
)
def test_a_streaming_model_at_any_length_and_batch(arguments, config, tmp_path):
    model, path = made(Streaming(**ARGUMENTS[arguments]), CONFIGS[config]), tmp_path / "deep" / "small.onnx"
    names = {"input_names": ["x", "h0", "c0"], "output_names": ["y", "h", "c"]}
    found = export_onnx(model, model.example(T, B), path, **names, form="scan")
    assert (list(found.inputs), list(found.outputs)) == (["x", "h0", "c0"], ["y", "h", "c"])
    assert found.bytes == path.stat().st_size
    assert len(found.checked) == 3
    assert found.engine == "ONNX Runtime"
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    for steps in (1, 7, 200):
        for batch in (1, 3):
            x, state = model.example(steps, batch)
            with torch.no_grad():
                y, (h, c) = model(x, state)
            for one, other in zip(run(path, x, *state), (y, h, c), strict=True):
                torch.testing.assert_close(one, other, **near(CONFIGS[config]))


def test_an_example_of_one_sequence_leaves_the_batch_open(tmp_path):
    model = made(Streaming(), CONFIGS["low rank"])
    export_onnx(model, model.example(1, 1), tmp_path / "small.onnx", form="scan")
    x, state = model.example(6, 4)
    with torch.no_grad():
        expected = model(x, state)[0]
    torch.testing.assert_close(run(tmp_path / "small.onnx", x, *state)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "form"), [("dense", "lstm"), ("low rank", "lstm"), ("low rank", "scan"), ("int8", "scan")]
)
def test_a_cell_in_a_loop_keeps_its_weights_once(config, form, tmp_path):
    model = made(Steps(), CONFIGS[config])
    assert config == "dense" or isinstance(model.cell, LowRankLSTMCell)
    few, many = (export_onnx(model, torch.randn(steps, B, IN), tmp_path / f"{steps}.onnx", form=form) for steps in (2, 6))
    x = torch.randn(6, B, IN)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "6.onnx", x)[0], model(x)["y"], **near(CONFIGS[config]))
    sizes = [sum(len(one.raw_data) for one in onnx.load(tmp_path / f"{n}.onnx").graph.initializer) for n in (2, 6)]
    assert sizes[1] - sizes[0] < 4 * 4 * H * IN
    assert few.bytes < many.bytes


def test_a_compressed_language_model_is_smaller_and_the_same(tmp_path):
    model, sizes = embedded_model(), []
    for config in (None, LowRank(rank=32, storage="int8")):
        made(model, config)
        sizes.append(export_onnx(model, torch.randint(4096, (5, 2)), tmp_path / "model.onnx").bytes)
    lstm = sum(site.shape[0] * site.shape[1] for site in compress_(copy.deepcopy(model), Quantize("int8")).sites)
    assert sizes[0] - sizes[1] > 0.9 * 4 * lstm
    tokens = torch.randint(4096, (30, 3))
    with torch.no_grad():
        expected = model(tokens)[0]
    found = run(tmp_path / "model.onnx", tokens)[0]
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_the_model_stays_as_it_was(tmp_path):
    model = made(Streaming(), CONFIGS["low rank"]).train()
    before, forwards = copy.deepcopy(model.state_dict()), [vars(module).get("forward") for module in model.modules()]
    example, random = model.example(T, B), torch.get_rng_state()
    export_onnx(model, example, tmp_path / "small.onnx")
    assert torch.get_rng_state().equal(random)
    with pytest.raises(SlimLSTMError, match="PyTorch cannot trace the model"):
        export_onnx(model, (torch.randn(T, B, IN), None, "too many"), tmp_path / "none.onnx")
    assert model.training
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


def test_a_file_that_does_not_compute_the_same_is_not_written(tmp_path, monkeypatch):
    path, model = tmp_path / "small.onnx", made(Streaming(), None)
    path.write_text("precious")
    monkeypatch.setattr(
        "slimlstm.onnx.export.add_layer", lambda graph, layers, ports, form: graph.add_many("LSTM", [], [ports.y])
    )
    with pytest.raises(Exception, match="LSTM"):
        export_onnx(model, model.example(T, B), path)
    monkeypatch.undo()
    monkeypatch.setattr("slimlstm.onnx.export.start", lambda content: (lambda inputs: [0 * y for y in expected], "none"))
    x, state = model.example(T, B)
    with torch.no_grad():
        y, (h, c) = model(x, state)
    expected = [y, h, c]
    with pytest.raises(
        SlimLSTMError, match=r"output 0 differs from the model's by 1 of its norm at .* = 4.*nothing was written"
    ):
        export_onnx(model, (x, state), path)
    assert path.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(IN, H)

    def forward(self, x):
        return self.lstm(pack_padded_sequence(x, torch.tensor([T, 2, 1])))[1]


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(IN, H).half()

    def forward(self, x):
        return self.lstm(x.half())[0]


class Keeping(nn.Module):
    """Keeps states from call to call."""

    def __init__(self, place):
        super().__init__()
        self.lstm, self.place, self.hidden, self.seen = nn.LSTM(IN, H), place, None, []
        for name in "hc":
            self.register_buffer(name, torch.zeros(1, 3, H))

    def forward(self, x):
        if self.place == "list":
            y, hidden = self.lstm(x)
            self.seen.append(hidden)
            return y
        if self.place == "shown":
            y, self.hidden = self.lstm(x)
            return y
        y, hidden = self.lstm(x, self.hidden or (self.h, self.c))
        if self.place == "attribute":
            self.hidden = hidden
        elif self.place == "new buffers":
            self.h, self.c = hidden
        else:
            self.h.copy_(hidden[0])
        return y


@pytest.mark.parametrize(("place", "name"), [("attribute", "hidden"), ("new buffers", "h"), ("buffers in place", "h")])
@pytest.mark.parametrize("shapes", [None, ({},)], ids=["open", "closed"])
def test_a_state_kept_in_the_model_is_refused_and_restored(place, name, shapes, tmp_path):
    model = Keeping(place).eval()
    buffers = model.h, model.c
    with pytest.raises(SlimLSTMError, match=f"keeps {name} from call to call.* take it as an argument"):
        export_onnx(model, torch.randn(T, 3, IN), tmp_path / "none.onnx", dynamic_shapes=shapes)
    assert model.hidden is None
    assert (model.h, model.c) == buffers
    assert not any(buffer.any() for buffer in buffers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["shown", "list"])
def test_a_state_that_is_kept_but_not_read_is_exported_and_restored(place, tmp_path):
    model = Keeping(place).eval()
    export_onnx(model, torch.randn(T, 3, IN), tmp_path / "some.onnx")
    assert model.hidden is None
    assert model.seen == []


class Branching(nn.Module):
    """Takes one branch for some numbers of steps."""

    def __init__(self, takes):
        super().__init__()
        self.lstm, self.takes = nn.LSTM(IN, H), takes

    def forward(self, x):
        y = self.lstm(x)[0]
        return y * 2 if self.takes(x.shape[0]) else y


def test_a_branch_on_a_size_is_told(tmp_path):
    x = torch.randn(T, 3, IN)
    found = export_onnx(Branching(lambda steps: steps > T - 1), x, tmp_path / "some.onnx")
    assert [note for note in found.notes if f"below {T}" in note], found
    with pytest.raises(SlimLSTMError, match="the outputs agree; if the model's code branches on a size"):
        export_onnx(Branching(lambda steps: steps % 2 == T % 2), x, tmp_path / "none.onnx")
    assert not (tmp_path / "none.onnx").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [(Packed, "packed sequences cannot be written to ONNX"), (Half, "float32 or float64, not torch.float16")],
)
def test_what_cannot_be_written_is_told(model, message, tmp_path):
    with pytest.raises(SlimLSTMError, match=message):
        export_onnx(model(), torch.randn(T, 3, IN), tmp_path / "none.onnx")
    assert not list(tmp_path.iterdir())


class Picky(Streaming):
    """Tells of a length that it does not like where it is not compiled."""

    def forward(self, x, state):
        if not torch.compiler.is_compiling() and x.shape[:2] != (T, B):
            raise ValueError(x.shape)
        return super().forward(x, state)


def test_a_file_that_cannot_be_checked_at_other_sizes_is_not_written(tmp_path):
    model = made(Picky(), None)
    with pytest.raises(SlimLSTMError, match="neither at larger ones nor at the least"):
        export_onnx(model, model.example(T, B), tmp_path / "none.onnx")
    assert not list(tmp_path.iterdir())


class Fixed(nn.Module):
    """For T steps only."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(IN, H), nn.Linear(T * H, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0].transpose(0, 1).reshape(x.shape[1], T * H))


def test_an_axis_that_the_model_closes_is_told(tmp_path):
    model, x = made(Fixed(), CONFIGS["low rank"]), torch.randn(T, 3, IN)
    found = export_onnx(model, x, tmp_path / "fixed.onnx")
    assert found.inputs["x"][0] == T
    assert isinstance(found.inputs["x"][1], str)
    with pytest.raises(SlimLSTMError, match="the axis steps cannot stay open"):
        export_onnx(model, x, tmp_path / "open.onnx", dynamic_shapes=({0: torch.export.Dim("steps")},))
    found = export_onnx(model, x, tmp_path / "named.onnx", dynamic_shapes=({1: torch.export.Dim("batch")},))
    assert found.inputs == {"x": [T, "batch", IN]}


def test_an_axis_may_be_a_multiple_of_a_size(tmp_path):
    model, x = nn.LSTM(IN, H).eval(), torch.randn(10, 3, IN)
    found = export_onnx(model, x, tmp_path / "even.onnx", dynamic_shapes=({0: 2 * torch.export.Dim("half", min=2)},))
    assert found.inputs["input"][0] == "2*half"
    assert [list(sizes.values()) for sizes in found.checked] == [[5], [8], [2]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"input_names": ["x"]}, r"input_names are \['x'\], but the model has 3 input tensors"),
        ({"input_names": ["x", "h", "h"]}, "need one distinct name each"),
        ({"output_names": ["y", "h"]}, "the model has 3 output tensors"),
        ({"input_names": ["x", "h", "c"], "output_names": ["y", "h", "c"]}, "'h' names an input and an output"),
    ],
    ids=["few", "twice", "few outputs", "in and out"],
)
def test_names_that_do_not_fit_are_told(names, message, tmp_path):
    model = made(Streaming(), None)
    with pytest.raises(SlimLSTMError, match=message):
        export_onnx(model, model.example(T, B), tmp_path / "none.onnx", **names)
    assert not list(tmp_path.iterdir())


def test_an_example_that_holds_nothing_is_told(tmp_path):
    model = made(Streaming(), None)
    with pytest.raises(SlimLSTMError, match=r"an example input has the shape \[0, 3, 12\], which holds no"):
        export_onnx(model, model.example(0, 3), tmp_path / "none.onnx")


def test_names_may_look_like_those_of_our_nodes(tmp_path):
    model = made(Streaming(), CONFIGS["low rank"])
    export_onnx(model, model.example(T, B), tmp_path / "small.onnx", input_names=["lstm_1", "lstm_2", "lstm_3"])
    x, state = model.example(7, 2)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "small.onnx", x, *state)[0], model(x, state)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", ["dense", "low rank"])
def test_double_precision(config, tmp_path):
    model = made(nn.Sequential(nn.LSTM(IN, H, 2)), CONFIGS[config]).double()
    export_onnx(model, torch.randn(T, B, IN, dtype=torch.float64), tmp_path / "double.onnx")
    x = torch.randn(7, 2, IN, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "double.onnx", x)[0], model(x)[0], rtol=1e-10, atol=1e-10)


def test_a_model_that_is_an_lstm_itself(tmp_path):
    lstm = nn.LSTM(IN, H, 2, proj_size=5)
    forward = vars(lstm).get("forward")
    export_onnx(lstm, torch.randn(T, B, IN), tmp_path / "lstm.onnx")
    assert vars(lstm).get("forward") is forward
    x = torch.randn(7, 2, IN)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "lstm.onnx", x)[0], lstm(x)[0], rtol=1e-4, atol=1e-4)


class Translator(nn.Module):
    """A bidirectional encoder whose last states start a decoder that attends to its outputs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, IN)
        self.encoder = nn.LSTM(IN, H, bidirectional=True, batch_first=True)
        self.decoder = nn.LSTM(IN, 2 * H, batch_first=True)

    def forward(self, source, target):
        memory, state = self.encoder(self.embedding(source))
        first = tuple(torch.cat([*one], -1)[None] for one in state)
        y, state = self.decoder(self.embedding(target), first)
        return {"y": y + (y @ memory.transpose(1, 2)).softmax(-1) @ memory, "state": {"h": state[0], "c": [state[1]]}}


@pytest.mark.parametrize("config", ["low rank", "masked"])
def test_a_translator_with_named_inputs_and_nested_outputs(config, tmp_path):
    model = made(Translator(), CONFIGS[config])
    # Sizes that are equal by chance stay apart.
    example = {"target": torch.randint(20, (B, B)), "source": torch.randint(20, (B, B))}
    found = export_onnx(model, example, tmp_path / "small.onnx")
    assert list(found.inputs) == ["target", "source"]
    inputs = {"target": torch.randint(20, (2, 9)), "source": torch.randint(20, (2, 5))}
    with torch.no_grad():
        expected = model(**inputs)
    wanted = expected["y"], expected["state"]["h"], expected["state"]["c"][0]
    for one, other in zip(run(tmp_path / "small.onnx", *inputs.values()), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_where_there_is_no_onnx_runtime_the_reference_runs_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    model = made(Streaming(), CONFIGS["low rank"])
    assert export_onnx(model, model.example(T, B), tmp_path / "small.onnx").engine == "onnx reference"


class Whole(nn.Module):
    """A stack of layers with states, and a cell."""

    def __init__(self):
        super().__init__()
        self.lstm = LowRankLSTM(IN, H, 2, bidirectional=True)
        self.cell = LowRankLSTMCell(2 * H, H)

    def forward(self, x, state):
        y, state = self.lstm(x, state)
        return y, state, self.cell(y[-1])

    def example(self, steps, batch):
        return torch.randn(steps, batch, IN), (torch.randn(4, batch, H), torch.randn(4, batch, H))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("gradients", [False, True])
def test_exported_programs_run_the_kernel_at_any_size(config, gradients, monkeypatch):
    model = made(Whole(), CONFIGS[config])
    steps, batch = torch.export.Dim("steps", min=1, max=999), torch.export.Dim("batch", min=1, max=99)
    sizes = {"x": {0: steps, 1: batch}, "state": ({1: batch}, {1: batch})}
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, model.example(T, B), dynamic_shapes=sizes)
    assert [str(node.target) for node in program.graph.nodes].count("slimlstm.layer.default") == 3
    calls, run_kernel = [], cpu.run
    monkeypatch.setattr(cpu, "run", lambda *inputs: calls.append(inputs) or run_kernel(*inputs))
    with torch.no_grad():
        for one in ((1, 1), (7, 3), (200, 2)):
            example = model.example(*one)
            expected = model(*example)
            calls.clear()
            found = program.module()(*example)
            assert len(calls) == 3
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("config", ["dense", "low rank", "int8"])
def test_torch_export_and_compile_see_one_node_a_recurrence(config):
    model = nn.Sequential(nn.Linear(IN, IN), LowRankLSTM(IN, H, num_layers=2, bidirectional=True)).eval()
    made(model, CONFIGS[config])
    open_ends = ({0: torch.export.Dim("steps", min=2), 1: torch.export.Dim("batch", min=2)},)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(T, B, IN),), dynamic_shapes=open_ends)
        ours = [node for node in program.graph.nodes if str(node.target).startswith("slimlstm.layer")]
        assert len(ours) == 2
        assert len([node for node in program.graph.nodes if node.op == "call_function"]) < 40
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        for steps, batch in ((7, 3), (40, 2)):
            x = torch.randn(steps, batch, IN)
            for found in (program.module()(x), compiled(x)):
                torch.testing.assert_close(found[0], model(x)[0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(found[1], model(x)[1], rtol=1e-5, atol=1e-5)


class Deployed(nn.Module):
    """Operators whose forms changed between opsets, around an LSTM."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(20, IN), nn.LayerNorm(IN)
        self.lstm, self.head = nn.LSTM(IN, H, bidirectional=True), nn.Linear(H, 5)

    def forward(self, tokens):
        y = self.lstm(self.norm(self.embedding(tokens)))[0]
        forward, backward = y.chunk(2, -1)
        return self.head((forward + backward).relu()).log_softmax(-1), y.amax(0), y.split(3, -1)[-1].sum(-1)


@pytest.mark.parametrize(
    ("opset", "config"),
    [(13, "dense"), (13, "int8"), (15, "bfloat16"), (17, "low rank"), (onnx.defs.onnx_opset_version(), "int8")],
)
def test_older_opsets(opset, config, tmp_path):
    model, path = made(Deployed(), CONFIGS[config]), tmp_path / "small.onnx"
    found = export_onnx(model, torch.randint(20, (T, B)), path, opset=opset, form="scan")
    written = onnx.load(path)
    assert found.opset == opset == written.opset_import[0].version
    assert len(written.opset_import) == 1
    assert written.ir_version <= onnx.helper.find_min_ir_version_for(written.opset_import)
    assert b"test_export" not in path.read_bytes()
    tokens = torch.randint(20, (9, 4))
    with torch.no_grad():
        for one, other in zip(run(path, tokens), model(tokens), strict=True):
            torch.testing.assert_close(one, other, **near(CONFIGS[config]))


@pytest.mark.parametrize("opset", [12, 99, "17"])
def test_opsets_that_cannot_be_written_are_refused(opset, tmp_path):
    with pytest.raises(SlimLSTMError, match=r"opset=.* cannot be written; give one from 13 to"):
        export_onnx(nn.LSTM(IN, H), torch.randn(T, B, IN), tmp_path / "none.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


BOUNDS = {
    "scaled": (torch.tensor([29.0, 0.001]), torch.tensor([29.0, 0.0025]), {}, None),
    "small outputs": (torch.tensor([0.1]), torch.tensor([0.1005]), {}, "output 0 differs .* one number by 0.0005"),
    "a wider bound": (torch.tensor([0.1]), torch.tensor([0.1005]), {"tolerance": 1e-3}, None),
    "int8": (
        torch.tensor([3.0, 4.0]),
        torch.tensor([3.0, 3.5]),
        {"is_int8": True},
        "rounding of the inputs of int8 .* give tolerance=0.2",
    ),
    "int8 with a bound": (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]), {"is_int8": True, "tolerance": 0.1001}, None),
    "integers": (torch.tensor([3]), torch.tensor([4]), {}, "output 0, of integers, differs"),
    "NaN on one side": (torch.tensor([1.0]), torch.tensor([torch.nan]), {}, "output 0 differs"),
    "NaN and infinity on both": (torch.tensor([torch.nan, torch.inf]), torch.tensor([torch.nan, torch.inf]), {}, None),
}


@pytest.mark.parametrize(("expected", "found", "arguments", "message"), BOUNDS.values(), ids=BOUNDS)
def test_bounds_scale_with_the_outputs(expected, found, arguments, message):
    is_int8 = arguments.get("is_int8", False)
    bound = Bound(arguments.get("tolerance", INT8_TOLERANCE if is_int8 else TOLERANCE), is_int8)
    if message is None:
        assert bound.check(0, expected, found, "T = 3") < 1
        return
    with pytest.raises(SlimLSTMError, match=message):
        bound.check(0, expected, found, "T = 3")


def test_checks_are_repeatable(tmp_path):
    model, example = made(Streaming(), CONFIGS["int8"]), made(Streaming(), None).example(T, B)
    differences = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        differences.add(export_onnx(model, example, tmp_path / "small.onnx", form="scan").difference)
    assert len(differences) == 1
    with pytest.raises(SlimLSTMError, match="rounding of the inputs of int8 matrices"):
        export_onnx(model, example, tmp_path / "none.onnx", tolerance=1e-9)


def test_the_command_writes_a_language_model(tmp_path, capsys):
    save(made(embedded_model(), LowRank(rank=16)), tmp_path / "small")
    app(["export", str(tmp_path / "small"), "-o", str(tmp_path / "small.onnx"), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert list(found["inputs"]) == ["tokens", "h0", "c0", "h1", "c1", "h2", "c2"]
    assert found["bytes"] == (tmp_path / "small.onnx").stat().st_size
    tokens = torch.randint(4096, (9, 1))
    states = [torch.zeros(1, 1, size) for size in (448, 448, 448, 448, 256, 256)]
    with torch.no_grad():
        expected = load(tmp_path / "small", embedded_model())(tokens)[0]
    # In two calls, with what came out of the first.
    first, *states = run(tmp_path / "small.onnx", tokens[:4], *states)
    second = run(tmp_path / "small.onnx", tokens[4:], *states)[0]
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=1e-4, atol=1e-4)
