"""Every tensor with the name of a recurrent weight is read, or refused by name; files of many kinds and endings."""

import argparse
import collections
import enum
import functools
import pathlib
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm

from slimlstm import LowRank, LowRankLSTM, Prune, SlimLSTMError, compress_, load, save
from slimlstm.cli import main
from slimlstm.weight_files import compress_file, find_matrices, matrix_of, read_tensors, read_weights

IN, H = 5, 6


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(IN, H, 2), nn.Linear(H, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def plain_state():
    return Model().state_dict()


def pruned(model):
    for name in ("weight_hh_l0", "weight_ih_l1", "bias_hh_l0"):
        prune.l1_unstructured(model.lstm, name, 0.5)


def every_matrix_pruned(model):
    for name in ("weight_hh_l0", "weight_ih_l0", "weight_hh_l1", "weight_ih_l1"):
        prune.random_unstructured(model.lstm, name, 0.5)


def normed(way, **settings):
    def change(model):
        # In training the vectors of spectral norm change; here a few rounds bring them near the singular vectors.
        way(model.lstm, "weight_hh_l0", **settings)

    return change


def masked(model):
    compress_(model, Prune(keep=0.4, target="hh"))


KNOWN = {
    "pruned": pruned,
    "pruned everywhere": every_matrix_pruned,
    "old weight norm": normed(weight_norm),
    "old weight norm of columns": normed(weight_norm, dim=1),
    "old weight norm of the whole": normed(weight_norm, dim=None),
    "weight norm": normed(parametrizations.weight_norm),
    "weight norm of columns": normed(parametrizations.weight_norm, dim=1),
    "spectral norm": normed(parametrizations.spectral_norm),
    "old spectral norm": normed(old_spectral_norm),
    "masked by slimlstm": masked,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", KNOWN.values(), ids=KNOWN)
def test_weights_in_known_parts_are_read(change, tmp_path):
    """They have the numbers that the model computes with, and the compressed folder loads into a plain model."""
    model, x = Model(), torch.randn(4, 2, IN)
    change(model)
    model.eval()
    with torch.no_grad():
        expected = model(x)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    tensors = read_tensors(tmp_path / "model.pt")
    matrices = {site.name: matrix_of(names, tensors) for site, names in find_matrices(tensors).items()}
    assert len(matrices) == 4
    for name, matrix in matrices.items():
        torch.testing.assert_close(matrix, getattr(model.lstm, name).detach())
    config, plain = LowRank(rank=1, target="ih"), Model().eval()
    compress_file(tmp_path / "model.pt", config, tmp_path / "out")
    loaded = load(tmp_path / "out", Model()).eval()
    with torch.no_grad():
        for name, parameter in plain.lstm.named_parameters():
            parameter.copy_(getattr(model.lstm, name))
        torch.testing.assert_close(plain(x), expected)
        compress_(plain, config)
        torch.testing.assert_close(loaded(x), plain(x))


class Tanh(nn.Module):
    def forward(self, weight):
        return weight.tanh()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, weight):
        return self.scale * weight


def parametrized(part):
    def change(state):
        model = Model()
        parametrize.register_parametrization(model.lstm, "weight_hh_l0", part)
        return model.state_dict()

    return change


def changed(**changes):
    """The state with tensors added or, for None, removed; underscores after ``lstm`` begin the tensor's name."""

    def change(state):
        state = {**state, **{f"lstm.{name}": value for name, value in changes.items()}}
        return {name: value for name, value in state.items() if value is not None}

    return change


ROWS = 4 * H
HH = torch.ones(ROWS, H)
UNKNOWN = {
    "a parametrization without tensors": (parametrized(Tanh()), r"lstm\.parametrizations\.weight_hh_l0\.original"),
    "a parametrization with a parameter": (parametrized(Scaled()), r"lstm\.parametrizations\.weight_hh_l0\.0\.scale"),
    "a scale": (changed(weight_hh_l0_scale=torch.ones(ROWS, 1)), r"lstm\.weight_hh_l0_scale"),
    "a zero point": (changed(weight_ih_l1_zero_point=torch.ones(1)), r"lstm\.weight_ih_l1_zero_point"),
    "a running average": (changed(weight_hh_l0_ema=HH), r"lstm\.weight_hh_l0_ema"),
    "a copy with its dots removed": (lambda state: {**state, "ema.lstmweight_hh_l0": HH}, r"ema\.lstmweight_hh_l0"),
    "a scale behind a dot": (lambda state: {**state, "lstm.weight_hh_l0.scale": torch.ones(ROWS)}, r"weight_hh_l0\.scale"),
    "a mask without its weight": (changed(weight_hh_l0_mask=HH), r"lstm\.weight_hh_l0_mask"),
    "a mask of halves": (
        changed(weight_hh_l0=None, weight_hh_l0_orig=HH, weight_hh_l0_mask=HH / 2),
        "the mask of lstm.weight_hh_l0",
    ),
    "a mask of another shape": (
        changed(weight_hh_l0=None, weight_hh_l0_orig=HH, weight_hh_l0_mask=HH[1:]),
        "the mask of lstm.weight_hh_l0",
    ),
    "a pruned factor": (
        changed(weight_hh_l0=None, weight_hh_l0_u_orig=HH, weight_hh_l0_u_mask=HH, weight_hh_l0_v=torch.ones(H, H)),
        r"lstm\.weight_hh_l0_u_mask",
    ),
    "no weight norm": (
        changed(weight_hh_l0=None, weight_hh_l0_g=torch.ones(3), weight_hh_l0_v=HH),
        r"lstm\.weight_hh_l0 is computed from tensors of \[3\]",
    ),
    "no spectral norm": (
        changed(weight_hh_l0=None, weight_hh_l0_orig=HH, weight_hh_l0_u=torch.ones(3), weight_hh_l0_v=torch.ones(H)),
        "spectral norm of lstm.weight_hh_l0 do not fit",
    ),
    "factors that do not fit": (
        changed(weight_hh_l0=None, weight_hh_l0_u=torch.ones(ROWS, 2), weight_hh_l0_v=torch.ones(3, H)),
        r"lstm\.weight_hh_l0_u \[24, 2\] and lstm\.weight_hh_l0_v \[3, 6\] do not fit",
    ),
    "factors that are vectors": (
        changed(weight_hh_l0=None, weight_hh_l0_u=torch.ones(ROWS), weight_hh_l0_v=torch.ones(H)),
        r"lstm\.weight_ih_l0 \[24, 5\] is in no LSTM",
    ),
    "one bias of two": (changed(bias_hh_l0=None), r"lstm\.weight_ih_l0 has one bias beside it"),
    "a bias of another size": (changed(bias_hh_l0=torch.ones(3)), r"bias_hh \[3\] of lstm\.weight_ih_l0 does not fit"),
    "a matrix alone": (changed(weight_ih_l0=None), r"lstm\.weight_hh_l0 \[24, 6\] is in no LSTM"),
    "another number of rows": (changed(weight_hh_l0=torch.ones(5 * H, H)), r"lstm\.weight_hh_l0 \[30, 6\] is in no LSTM"),
    "integers": (changed(weight_hh_l0=HH.to(torch.int8)), "lstm.weight_hh_l0 holds torch.int8 without a scale"),
    "a projection that does not fit": (changed(weight_hr_l0=torch.ones(3, H)), "is in no LSTM|weight_hr"),
    "an unprintable name": (lambda state: {**state, "\x1b[31mred": HH}, r"'\\x1b\[31mred' is no name"),
}


@pytest.mark.parametrize(("change", "message"), UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_what_cannot_be_read_is_named_and_nothing_is_written(change, message, ending, tmp_path, capsys):
    path, state = tmp_path / f"model.{ending}", change(plain_state())
    torch.save(state, path) if ending == "pt" else save_file({name: value.clone() for name, value in state.items()}, path)
    with pytest.raises(SlimLSTMError, match=message):
        read_tensors(path)
    for arguments in (["inspect", str(path)], ["compress", str(path), "-o", str(tmp_path / "out"), "--rank", "1"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("slimlstm: ")
        assert error.count("\n") == 1
        assert "\x1b" not in error
    assert not (tmp_path / "out").exists()


def test_a_gru_beside_an_lstm_stays_and_is_named(tmp_path):
    model = nn.ModuleDict({"a": nn.LSTM(IN, H), "b": nn.GRU(IN, H), "c": nn.RNN(H, H)})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    tensors, notes = read_weights(tmp_path / "model.pt")
    assert tensors.keys() == model.state_dict().keys()
    assert notes == [f"{name} is a GRU or plain RNN and stays as it is" for name in "bc"]
    report = compress_file(tmp_path / "model.pt", LowRank(rank=1), tmp_path / "out")
    assert report.notes[:2] == notes


# Files.


class Weights(dict):
    pass


class Settings:
    def __init__(self):
        self.hidden = H


class Slots:
    __slots__ = ("rate",)

    def __init__(self):
        self.rate = 0.1


class Colour(enum.Enum):
    RED = 1


def adam(model):
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 1, IN)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def lightning(state, **more):
    return {
        "epoch": 1,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": state,
        "optimizer_states": [adam(Model())],
        **more,
    }


CHECKPOINTS = {
    "Lightning": lightning,
    "a namespace of settings": lambda state: lightning(state, hyper_parameters=argparse.Namespace(lr=0.1)),
    "settings of a class": lambda state: lightning(state, hyper_parameters={"settings": Settings()}),
    "a path": lambda state: lightning(state, callbacks={"best": pathlib.PurePosixPath("/x"), "score": torch.tensor(1.0)}),
    "functions and classes": lambda state: lightning(state, hyper_parameters={"act": torch.relu, "loss": nn.MSELoss}),
    "a module among settings": lambda state: lightning(state, hyper_parameters={"loss": nn.MSELoss()}),
    "a NumPy number": lambda state: lightning(state, best=np.float64(3.0)),
    "a NumPy array": lambda state: lightning(state, best=np.zeros(3)),
    "an enumeration": lambda state: lightning(state, colour=Colour.RED),
    "in a subclass of dict": lambda state: {"model": Weights(state)},
    "in a list": lambda state: {"models": [state], "names": ["a"]},
    "in a tuple": lambda state: (state, {"epoch": 3}),
    "an empty average beside": lambda state: lightning(state, ema={}),
    "the same average beside": lambda state: lightning(state, ema_state_dict=state),
    "a partial function": lambda state: lightning(state, optimizer=functools.partial(torch.optim.Adam, lr=0.1)),
    "a deque": lambda state: lightning(state, losses=collections.deque([0.1, 0.2], maxlen=9)),
    "an object with slots": lambda state: lightning(state, hyper_parameters={"slots": Slots()}),
    "a generator of random numbers": lambda state: lightning(state, hyper_parameters={"random": random.Random(0)}),  # noqa: S311
    "the model in a deque": lambda state: {"models": collections.deque([state])},
    "a sub-dictionary beside tensors": lambda state: {"model": state, "scale": torch.ones(())},
}
ENDINGS = ["ckpt", "bin", "pkl", "pth.tar", "pt", "model", ""]


@pytest.mark.parametrize("wrap", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_state_dict_is_found_in_a_checkpoint(wrap, tmp_path):
    torch.save(wrap(plain_state()), tmp_path / "model.ckpt")
    found = read_tensors(tmp_path / "model.ckpt")
    assert found.keys() == plain_state().keys()
    assert all(torch.equal(found[name], value) for name, value in plain_state().items())


FOREIGN = {
    "nothing": (lambda path: path.touch(), "is empty"),
    "a pointer of Git LFS": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "git lfs pull",
    ),
    "a web page": (lambda path: path.write_text("\n<!DOCTYPE html><title>404</title>"), "is a web page"),
    "TorchScript": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), "is a TorchScript archive"),
    "an exported program": (
        lambda path: torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(2),)), path),
        "is a program of torch.export",
    ),
    "NumPy arrays": (lambda path: np.savez(path.open("wb"), weight_hh_l0=np.zeros((8, 2))), "holds NumPy arrays"),
}


@pytest.mark.parametrize("ending", ["pt", "pt2", "safetensors", "onnx"])
@pytest.mark.parametrize(("write", "message"), FOREIGN.values(), ids=FOREIGN)
def test_files_of_other_kinds_are_named(write, message, ending, tmp_path):
    path = tmp_path / f"model.{ending}"
    if ending == "pt2" or "program" not in message:
        write(path)
    else:
        write(path.with_suffix(".pt2"))
        path.with_suffix(".pt2").rename(path)
    if ending == "onnx" and path.read_bytes()[:2] == b"PK":
        message = "is no intact ONNX file"
    with pytest.raises(SlimLSTMError, match=message):
        read_tensors(path)


@pytest.mark.parametrize("writer", [torch.save, save_file], ids=["pickled", "safetensors"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_ending_of_a_file_does_not_matter(ending, writer, tmp_path):
    path = tmp_path / ("model" + ("." if ending else "") + ending)
    writer(plain_state(), path)
    assert read_tensors(path).keys() == plain_state().keys()


SEVERAL = {
    "an average": lambda state, other: lightning(state, ema_state_dict=other),
    "a list": lambda state, other: {"models": [state, other]},
    "two models": lambda state, other: {"teacher": state, "student": {"net": other}},
}


@pytest.mark.parametrize("wrap", SEVERAL.values(), ids=SEVERAL)
def test_a_choice_is_offered_where_there_are_several(wrap, tmp_path, capsys):
    other = {name: value + 1 for name, value in plain_state().items()}
    torch.save(wrap(plain_state(), other), tmp_path / "model.ckpt")
    with pytest.raises(SlimLSTMError, match="several sets of recurrent weights") as raised:
        read_tensors(tmp_path / "model.ckpt")
    for part in ("state_dict", "ema_state_dict", "models.0", "models.1", "teacher", "student.net"):
        if f"'{part}'" in str(raised.value):
            found = read_tensors(tmp_path / "model.ckpt", part)
            assert found["lstm.weight_hh_l0"].mean() > 0.5 or part in ("state_dict", "models.0", "teacher")
            with pytest.raises(SystemExit) as ended:
                main(["inspect", str(tmp_path / "model.ckpt"), "--part", part])
            assert ended.value.code == 0
            assert "lstm.weight_hh_l0" in capsys.readouterr().out


HIDDEN = {
    "a NumPy array": (
        lambda state: {"model": {**state, "lstm.weight_hh_l0": np.ones((ROWS, H))}},
        "lstm.weight_hh_l0 is no",
    ),
    "a meta tensor": (lambda state: {**state, "z": torch.ones(2, device="meta")}, "z is a meta tensor"),
    "a quantised tensor": (
        lambda state: {**state, "z": torch.quantize_per_tensor(HH, 0.1, 0, torch.qint8)},
        "z is a quant",
    ),
    "a sparse tensor": (lambda state: {**state, "z": HH.to_sparse()}, "z is a sparse"),
    "tensors far larger than the file": (
        lambda state: {**state, "z": torch.ones(1).expand(1 << 14, 1 << 14)},
        "allows for",
    ),
    "no tensors": (lambda state: {"epoch": 3}, "holds no dictionary of tensors"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("wrap", "message"), HIDDEN.values(), ids=HIDDEN)
def test_what_a_checkpoint_hides_is_refused(wrap, message, tmp_path):
    torch.save(wrap(plain_state()), tmp_path / "model.pt")
    with pytest.raises(SlimLSTMError, match=message):
        read_tensors(tmp_path / "model.pt")


def test_factors_of_a_huge_product_are_refused(tmp_path):
    rows = 1 << 17
    state = {
        "weight_ih_l0": torch.ones(4 * rows, 1),
        "bias_ih_l0": torch.ones(4 * rows),
        "bias_hh_l0": torch.ones(4 * rows),
    }
    save_file({**state, "weight_hh_l0_u": torch.ones(4 * rows, 1), "weight_hh_l0_v": torch.ones(1, rows)}, tmp_path / "w")
    with pytest.raises(SlimLSTMError, match="the recurrent matrices would take"):
        read_tensors(tmp_path / "w")


# Prefixes of wrappers.


def under(prefix, part="lstm"):
    return lambda state: {prefix + name: value for name, value in state.items()}


PREFIXES = {
    "DistributedDataParallel": under("module."),
    "torch.compile": under("_orig_mod."),
    "both": under("module._orig_mod."),
    "Lightning": under("model."),
    "a compiled part": lambda state: {name.replace("lstm.", "lstm._orig_mod."): value for name, value in state.items()},
}


@pytest.mark.parametrize("config", [LowRank(rank=1), Prune(keep=0.5)], ids=["factors", "masks"])
@pytest.mark.parametrize("change", PREFIXES.values(), ids=PREFIXES)
def test_a_folder_with_the_prefix_of_a_wrapper_loads(change, config, tmp_path):
    model = Model()
    compress_(model, config)
    torch.save(change(plain_state()), tmp_path / "model.pt")
    compress_file(tmp_path / "model.pt", config, tmp_path / "out")
    found = load(tmp_path / "out", Model()).state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model


@pytest.mark.parametrize("wrap", [Wrapper, lambda model: torch.compile(model, backend="eager")], ids=["module", "compiled"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_wrapped_model_saves_and_loads(wrap, inside, tmp_path):
    """A folder of a wrapped model loads into a plain one, and the other way round."""
    model = Model()
    compress_(model, LowRank(rank=1))
    save(wrap(model) if inside else model, tmp_path)
    loaded = load(tmp_path, Model() if inside else wrap(Model()))
    assert any(isinstance(module, LowRankLSTM) for module in loaded.modules())
    values = list(loaded.state_dict().values())
    assert all(torch.equal(value, other) for value, other in zip(values, model.state_dict().values(), strict=True))


def test_another_prefix_than_one_at_the_front_is_refused(tmp_path):
    model = nn.ModuleDict({"a": Model(), "b": Model()})
    compress_(model, LowRank(rank=1))
    save(model, tmp_path)
    with pytest.raises(SlimLSTMError, match=r"is not in the model|saved from another model"):
        load(tmp_path, Model())
