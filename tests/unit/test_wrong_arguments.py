"""Arguments of a wrong kind are refused in words, before anything changes."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence

import slimlstm as sl
from slimlstm import SlimLSTMError
from slimlstm.evaluate import perplexity
from slimlstm.search import find_best, find_smallest, shrink_onnx

IN, H = 6, 8


def x():
    return torch.randn(5, 2, IN, generator=torch.Generator().manual_seed(0))


def squares(model, batch):
    return model(batch)[0].square()


def finetuned(model, batches=None, loss=squares, **options):
    return sl.finetune(model, [x()] if batches is None else batches, loss, steps=1, **options)


def norm(model):
    return float(model(x())[0].norm())


INT8, FISHER = sl.Quantize("int8"), sl.LowRank("fisher", keep=0.5)

TAKE_MODELS = {
    "compress_": lambda model: sl.compress_(model, INT8),
    "find_sites": sl.find_sites,
    "find_smallest": lambda model: find_smallest(model, norm, better="lower"),
    "find_best": lambda model: find_best(model, norm, better="lower", bytes=100),
    "calibrate": lambda model: sl.calibrate(model, [x()]),
    "measure_sensitivity": lambda model: sl.measure_sensitivity(model, [x()], squares),
    "finetune": finetuned,
    "save": lambda model: sl.save(model, "folder"),
    "load": lambda model: sl.load("folder", model),
    "export_onnx": lambda model: sl.export_onnx(model, x(), "model.onnx"),
    "perplexity": lambda model: perplexity(model, torch.arange(50)),
}
NO_MODELS = {
    "text": ("model.pt", "the model is the text 'model.pt', not an nn.Module; build the model, load its weights"),
    "path": (Path("model.pt"), "the model is the path 'model.pt', not an nn.Module; build the model, load its weights"),
    "state dict": (nn.LSTM(IN, H).state_dict(), r"a mapping \(OrderedDict\), .* if it is a state dict, build the model"),
    "class": (nn.LSTM, r"the class LSTM, not an nn.Module; make an instance, such as LSTM\(...\)"),
    "None": (None, "the model is None, not an nn.Module"),
    "list": ([nn.LSTM(IN, H)], "the model is an object of the class list, not an nn.Module"),
    "configuration": (INT8, "the model is an object of the class Quantize"),
}


@pytest.mark.parametrize(("model", "words"), NO_MODELS.values(), ids=NO_MODELS)
@pytest.mark.parametrize("call", TAKE_MODELS.values(), ids=TAKE_MODELS)
def test_models_are_modules(call, model, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SlimLSTMError, match=words):
        call(model)
    assert not list(tmp_path.iterdir())


TAKE_BATCHES = {
    "compress_": lambda batches: sl.compress_(nn.LSTM(IN, H), sl.LowRank("activation", keep=0.5), batches=batches),
    "find_smallest": lambda batches: find_smallest(nn.LSTM(IN, H), norm, better="lower", batches=batches),
    "calibrate": lambda batches: sl.calibrate(nn.LSTM(IN, H), batches),
    "measure_sensitivity": lambda batches: sl.measure_sensitivity(nn.LSTM(IN, H), batches, squares),
    "finetune": lambda batches: finetuned(nn.LSTM(IN, H), batches),
    "compress_onnx": lambda batches: sl.compress_onnx("model.onnx", INT8, "small.onnx", batches=batches),
    "shrink_onnx": lambda batches: shrink_onnx("model.onnx", "small.onnx", batches),
}
NO_BATCHES = {
    "mapping": ({"input": x()}, r"a mapping \(dict\), which would be read key by key; if it is one batch, give \[batch\]"),
    "text": ("runs.npz", "the text 'runs.npz', not batches; read the file, and give a list"),
    "path": (Path("runs.npz"), "the path 'runs.npz', not batches; read the file"),
    "tensor": (x(), r"a Tensor of shape \[5, 2, 6\], which would be read row by row; .* give \[batch\]"),
    "array": (x().numpy(), r"a ndarray of shape \[5, 2, 6\], which would be read row by row"),
    "packed": (pack_sequence([torch.ones(3, IN)]), "class PackedSequence, which would be read field by field"),
    "model": (nn.Sequential(nn.LSTM(IN, H)), "a model and no batches; check the order of the arguments"),
    "number": (3, "batches is 3, which cannot be iterated over|runs is 3, which"),
}


@pytest.mark.parametrize(("batches", "words"), NO_BATCHES.values(), ids=NO_BATCHES)
@pytest.mark.parametrize("call", TAKE_BATCHES.values(), ids=TAKE_BATCHES)
def test_batches_are_iterables_of_batches(call, batches, words):
    with pytest.raises(SlimLSTMError, match=words):
        call(batches)


@pytest.mark.parametrize("name", [name for name in TAKE_BATCHES if name != "finetune"])
def test_functions_are_no_batches(name):
    with pytest.raises(SlimLSTMError, match="is the function <lambda>, which is not called here; call it"):
        TAKE_BATCHES[name](lambda: [x()])


def test_functions_from_the_epoch_to_batches_can_take_it():
    with pytest.raises(SlimLSTMError, match=r"batches is called with \(epoch\), which it does not take"):
        finetuned(nn.LSTM(IN, H), lambda: [x()])
    finetuned(nn.LSTM(IN, H), lambda epoch: [x()])


@pytest.mark.parametrize(
    "call", [lambda: sl.calibrate(nn.LSTM(IN, H), None), lambda: sl.finetune(nn.LSTM(IN, H), None, squares, steps=1)]
)
def test_batches_that_are_needed_are_not_none(call):
    with pytest.raises(SlimLSTMError, match="batches is None, and nothing can be run; give a list"):
        call()


TAKE_LOSSES = {
    "compress_": lambda loss: sl.compress_(nn.LSTM(IN, H), FISHER, batches=[x()], loss=loss),
    "find_smallest": lambda loss: find_smallest(nn.LSTM(IN, H), norm, better="lower", batches=[x()], loss=loss),
    "calibrate": lambda loss: sl.calibrate(nn.LSTM(IN, H), [x()], loss),
    "measure_sensitivity": lambda loss: sl.measure_sensitivity(nn.LSTM(IN, H), [x(), x()], loss),
    "finetune": lambda loss: sl.finetune(nn.LSTM(IN, H), [x()], loss, steps=1),
}
OF_PYTORCH = r"which compares outputs with targets; give a function of \(model, batch\), such as lambda model, batch:"
NO_LOSSES = {
    "number": (3, r"loss is 3, not a function; give a function of \(model, batch\)"),
    "name": ("mse", "loss is the text 'mse', not a function"),
    "module of PyTorch": (nn.MSELoss(), f"loss is an object of the class MSELoss, {OF_PYTORCH}"),
    "its method": (nn.MSELoss().forward, OF_PYTORCH),
    "function of PyTorch": (cross_entropy, f"loss is the function cross_entropy, {OF_PYTORCH}"),
    "partial function of PyTorch": (functools.partial(cross_entropy, reduction="none"), OF_PYTORCH),
    "class": (nn.MSELoss, "loss is the class MSELoss, whose instances compute nothing from it"),
    "one argument": (lambda batch: batch, r"loss is called with \(model, batch\), which it does not take"),
    "three arguments": (lambda model, x, y: x, "missing a required argument: 'y'"),
    "module of three": (nn.TripletMarginLoss(), OF_PYTORCH),
}


@pytest.mark.parametrize(("loss", "words"), NO_LOSSES.values(), ids=NO_LOSSES)
@pytest.mark.parametrize("call", TAKE_LOSSES.values(), ids=TAKE_LOSSES)
def test_losses_take_a_model_and_a_batch(call, loss, words):
    with pytest.raises(SlimLSTMError, match=words):
        call(loss)


@pytest.mark.parametrize("name", ["measure_sensitivity", "finetune"])
def test_losses_that_are_needed_are_not_none(name):
    with pytest.raises(SlimLSTMError, match="loss is None, not a function"):
        TAKE_LOSSES[name](None)


class Squares(nn.Module):
    def forward(self, model, batch):
        return squares(model, batch)


class OwnMean(nn.MSELoss):
    def forward(self, model, batch):
        return squares(model, batch)


class Object:
    def __call__(self, model, batch, weight=1.0):
        return weight * squares(model, batch)


LOSSES = {
    "module": Squares(),
    "subclass of a loss of PyTorch": OwnMean(),
    "object": Object(),
    "partial": functools.partial(lambda weight, model, batch: weight * squares(model, batch), 2.0),
    "any arguments": lambda *arguments: squares(arguments[0], arguments[1]),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("name", [name for name in TAKE_LOSSES if name != "find_smallest"])
def test_callables_of_every_kind_are_losses(name, loss):
    TAKE_LOSSES[name](loss)


FUNCTIONS = {
    "metric": lambda: find_smallest(nn.LSTM(IN, H), 0.5, better="lower"),
    "metric of a file": lambda: shrink_onnx("model.onnx", "small.onnx", [{}], metric=0.5, better="lower"),
    "validate": lambda: finetuned(nn.LSTM(IN, H), validate=0.5),
}


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
def test_other_functions_are_functions(call):
    with pytest.raises(SlimLSTMError, match=r"is 0\.5, not a function; give a function of \((model|path)\)"):
        call()


NO_PATHS = {
    "load(model, folder)": (
        lambda: sl.load(nn.LSTM(IN, H), "folder"),
        r"class LSTM, not a path; call load\(folder, model\)",
    ),
    "load(None)": (lambda: sl.load(None, nn.LSTM(IN, H)), r"folder is None, not a path; call load\(folder, model\)"),
    "save(model, None)": (lambda: sl.save(nn.LSTM(IN, H), None), r"folder is None, not a path; call save\(model, folder\)"),
    "save(folder, model)": (lambda: sl.save("a", nn.LSTM(IN, H)), r"class LSTM, not a path; call save\(model, folder\)"),
    "export_onnx(path=None)": (
        lambda: sl.export_onnx(nn.LSTM(IN, H), x(), None),
        "path is None, not a path; name the file",
    ),
    "export_onnx(path=x)": (lambda: sl.export_onnx(nn.LSTM(IN, H), "a.onnx", x()), r"call export_onnx\(model, example"),
    "compress_onnx(model)": (lambda: sl.compress_onnx(nn.LSTM(IN, H), INT8, "a.onnx"), "compress_ takes models"),
    "compress_onnx(output=None)": (lambda: sl.compress_onnx("a.onnx", INT8, None), "output is None, not a path"),
    "compress_file(model)": (lambda: sl.compress_file(nn.LSTM(IN, H), INT8, "a"), "compress_ takes models"),
    "compress_file(state dict)": (lambda: sl.compress_file({}, INT8, "a"), r"path is a mapping \(dict\), not a path"),
    "shrink_onnx(model)": (lambda: shrink_onnx(nn.LSTM(IN, H), "a.onnx", [{}]), "find_smallest takes models"),
    "finetune(checkpoint=1)": (lambda: finetuned(nn.LSTM(IN, H), checkpoint=1), "checkpoint is 1, not a path"),
}


@pytest.mark.parametrize(("call", "words"), NO_PATHS.values(), ids=NO_PATHS)
def test_paths_are_paths(call, words):
    with pytest.raises(SlimLSTMError, match=words):
        call()


H0 = torch.zeros(1, 2, H)
NO_INPUTS = {
    "h without c": ((x(), H0), r"the state is a Tensor of shape \[1, 2, 8\], not \(h, c\); give a tuple of two tensors"),
    "h alone in a tuple": ((x(), (H0,)), r"the state is a tuple of a Tensor of shape \[1, 2, 8\], not \(h, c\)"),
    "h without None": ((x(), (H0, None)), r"the state is a tuple of a Tensor of shape .*, None, not \(h, c\)"),
    "states of NumPy": ((x(), (np.zeros((1, 2, H)), np.zeros((1, 2, H)))), "the state is a tuple of a ndarray"),
    "number": ((x(), 0), r"the state is 0, not \(h, c\)"),
    "input of NumPy": ((x().numpy(),), r"the input is a ndarray of shape \[5, 2, 6\], not a tensor; convert it"),
    "list": ((x().tolist(),), "the input is an object of the class list, not a tensor"),
    "None": ((None,), "the input is None, not a tensor"),
}


@pytest.mark.parametrize(("arguments", "words"), NO_INPUTS.values(), ids=NO_INPUTS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.LSTMCell])
def test_compressed_layers_take_tensors(kind, arguments, words):
    model = nn.ModuleList([kind(IN, H)])
    sl.compress_(model, INT8)
    if kind is nn.LSTMCell:
        arguments = [one[0] if isinstance(one, torch.Tensor) and one is not H0 else one for one in arguments]
    with pytest.raises(SlimLSTMError, match=words):
        model[0](*arguments)
