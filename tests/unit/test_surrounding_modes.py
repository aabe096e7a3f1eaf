"""Every public verb gives the same result in every mode that surrounds it."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from one_lstm import Model, normed_factor, pruned_factor, snapshot, squares, x
from safetensors.torch import save_file
from torch import nn

import slimlstm
from slimlstm import LowRank, LowRankLSTM, Prune, Quantize, SlimLSTMError, calibrate, compress_, find_sites, load, save
from slimlstm.bench import bench_layers
from slimlstm.folders import read_folder
from slimlstm.methods import low_bit
from slimlstm.modules.modes import ambient_defaults, plain_defaults, uncompiled
from slimlstm.search import find_best, find_smallest
from slimlstm.weight_files import read_tensors


def default_dtype():
    return Setting(torch.set_default_dtype, torch.get_default_dtype(), torch.float64)


def deterministic():
    return Setting(torch.use_deterministic_algorithms, False, True)


class Setting:
    """A context manager that calls a setter before and after."""

    def __init__(self, setter, before, within):
        self.setter, self.before, self.within = setter, before, within

    def __enter__(self):
        self.setter(self.within)

    def __exit__(self, *error):
        self.setter(self.before)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


def compressed(config, **data):
    def verb(model, folder):
        report = compress_(model, config, **data)
        return tensors_of(model), [site.relative_error for site in report.sites]

    return verb


def tensors_of(model):
    return [value.detach() for value in model.state_dict().values()]


def calibrated(model, folder):
    found = calibrate(model, [BATCH, 2 * BATCH], squares)
    return [value for one in found.sites.values() for value in (one.inputs, one.gradients)], [found.loss]


def searched(find, **limit):
    def changes(model):
        return float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))

    def verb(model, folder):
        found = find(model, changes, better="lower", evaluations=4, **limit)
        return tensors_of(found.model), [trial.metric for trial in found.trials]

    return verb


def layers_timed(model, folder):
    layers = {"lstm": LowRankLSTM.from_dense(model.lstm)}
    found = bench_layers(layers, layers, steps=2, seconds=0.001)
    return tensors_of(model), sorted(found.totals())


def loaded(model, folder):
    other = COPIES.pop()
    compress_(model, LowRank(rank=2, storage="int8"))
    save(model, folder)
    return tensors_of(load(folder, other)), []


def densified(model, folder):
    compress_(model, LowRank(rank=2))
    return tensors_of(model.lstm.to_dense()), []


def finetuned(model, folder):
    history = slimlstm.finetune(model, BATCHES, squares, steps=3)
    return tensors_of(model), history.losses


@torch.inference_mode(False)
def by_name(tensors):
    """The tensors in the order of their names, as they would be if the file had been read outside of the mode."""
    return [tensors[name].clone() for name in sorted(tensors)]


def file_compressed(model, folder):
    folder.mkdir()
    save_file(dict(zip(model.state_dict(), tensors_of(model), strict=True)), folder / "in.safetensors")
    report = slimlstm.compress_file(folder / "in.safetensors", LowRank(rank=2, storage="int8"), folder / "out")
    return by_name(read_folder(folder / "out")[1]), [site.relative_error for site in report.sites]


def onnx_compressed(config, **data):
    def verb(model, folder):
        onnx_files = pytest.importorskip("onnx_files")
        folder.mkdir()
        node, weights = onnx_files.lstm_parts(np.random.default_rng(0))
        onnx_files.save(folder / "in.onnx", [node], weights, ["lstm_y"])
        report = slimlstm.compress_onnx(folder / "in.onnx", config, folder / "out.onnx", **data)
        return by_name(read_tensors(folder / "out.onnx")), [site.relative_error for site in report.sites]

    return verb


def exported(model, folder):
    pytest.importorskip("onnxscript")
    folder.mkdir()
    compress_(model, LowRank(rank=2))
    found = slimlstm.export_onnx(model, BATCH, folder / "model.onnx")
    sizes = [list(found.inputs.values()), list(found.outputs.values())]
    return by_name(read_tensors(folder / "model.onnx")), [*sizes, found.opset]


def sensitivity_measured(model, folder):
    found = slimlstm.measure_sensitivity(model, BATCHES, squares)
    return tensors_of(model), [str(found), str(found.plan(2000))]


def calibration_kept(model, folder):
    calibrate(model, BATCHES, squares).save(folder)
    found = slimlstm.Calibration.load(folder)
    return [value for one in found.sites.values() for value in (one.inputs, one.gradients)], [found.loss]


def from_dense(model, folder):
    return tensors_of(LowRankLSTM.from_dense(model.lstm)), [model.lstm.weight_hh_l0.requires_grad]


def sites_found(model, folder):
    return tensors_of(model), [(site.name, site.shape, site.problem) for site in find_sites(model)]


COPIES = []
"""Models for verbs that take two."""
BATCH = x()
BATCHES = [BATCH, 2 * BATCH]
VERBS = {
    "svd": compressed(LowRank(rank=2)),
    "semi-nmf": compressed(LowRank("semi-nmf", rank=2)),
    "prune": compressed(Prune(keep=0.2)),
    "int8": compressed(Quantize("int8")),
    "fisher": compressed(LowRank("fisher", keep=0.3), batches=[BATCH, 2 * BATCH], loss=squares),
    "activation": compressed(LowRank("activation", rank=2), batches=[(BATCH,)]),
    "calibrate": calibrated,
    "find_smallest": searched(find_smallest, at_most="50%"),
    "find_best": searched(find_best, bytes=3000),
    "bench_layers": layers_timed,
    "save and load": loaded,
    "to_dense": densified,
    "finetune": finetuned,
    "compress_file": file_compressed,
    "compress_onnx": onnx_compressed(LowRank(rank=2)),
    "compress_onnx activation": onnx_compressed(
        LowRank("activation", rank=2), batches=[{"x": np.ones((5, 3, 10), np.float32)}]
    ),
    "measure_sensitivity": sensitivity_measured,
    "calibration file": calibration_kept,
    "from_dense": from_dense,
    "find_sites": sites_found,
    "export_onnx": pytest.param(exported, marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")]),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_verbs_give_the_same_result_in_every_mode(verb, mode, tmp_path):
    # Models and inputs are made outside of the mode; only the verb runs inside.
    models, COPIES[:] = [Model(), Model()], [Model(), Model()]
    expected = verb(models[0], tmp_path / "plain")
    with mode():
        tensors, numbers = verb(models[1], tmp_path / "mode")
    assert len(tensors) == len(expected[0])
    for ours, theirs in zip(tensors, expected[0], strict=True):
        assert not ours.is_inference()
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert numbers == expected[1]


def take_turns(block):
    """Let three threads enter and leave a block in turns, each before the one before has left; return what each saw."""
    gates, seen = [threading.Barrier(2) for _ in range(3)], []

    def run(index):
        with block():
            seen.append(torch.get_default_dtype())
            with ambient_defaults():
                gates[index].wait()  # the next thread may enter
                gates[index].wait()  # the next thread has entered
            seen.append(torch.get_default_dtype())

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for index, thread in enumerate(threads):
        thread.start()
        gates[index].wait()
        if index:
            gates[index - 1].wait()
            threads[index - 1].join()
    gates[-1].wait()
    threads[-1].join()
    return seen


def test_threads_restore_the_default_dtype_together():
    with default_dtype():
        assert take_turns(plain_defaults) == 6 * [torch.float32]
        assert torch.get_default_dtype() == torch.float64
        with plain_defaults(), ambient_defaults():
            assert torch.get_default_dtype() == torch.float64
            with plain_defaults():
                assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_dtype() == torch.float64


def test_threads_restore_the_compiler_together():
    calls = []
    model = torch.compile(nn.Linear(2, 2), backend=lambda graph, inputs: calls.append(1) or graph.forward)
    take_turns(uncompiled)
    with uncompiled():
        model(torch.ones(2))
    assert calls == []
    model(torch.ones(2))
    assert calls == [1]


IMPORTS = """
import importlib, pkgutil, torch
torch.set_default_device("meta")
torch.set_default_dtype(torch.float64)
import slimlstm
for found in pkgutil.walk_packages(slimlstm.__path__, "slimlstm."):
    if "__main__" not in found.name and "_kernel" not in found.name:
        try:
            module = importlib.import_module(found.name)
        except ImportError:  # an extra that is not installed
            continue
        made = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not made, (found.name, made)
"""


@pytest.mark.slow
def test_no_tensor_is_made_at_import():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


def test_grids_do_not_depend_on_the_defaults_at_the_first_import():
    assert torch.equal(torch.tensor(low_bit._CLIPS), torch.linspace(1.0, 0.6, 9))


@pytest.mark.parametrize("make", [pruned_factor, normed_factor])
def test_factors_that_are_computed_are_not_saved(make, tmp_path):
    with pytest.raises(SlimLSTMError, match=r"the model cannot be saved: weight_hh_l0_[uv] of 'lstm'"):
        save(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_on_tensors_of_inference_mode_is_refused_in_words():
    with torch.inference_mode():
        batch, built = x(), Model()
    model = Model()
    before = snapshot(model)
    for one in (batch, (batch, batch), {"x": batch}):
        with pytest.raises(SlimLSTMError, match=r"a batch holds tensors from torch\.inference_mode"):
            slimlstm.finetune(model, [one], squares, steps=1)
    assert snapshot(model) == before
    with pytest.raises(SlimLSTMError, match=r"the model has parameters from torch\.inference_mode"):
        slimlstm.finetune(built, [x()], squares, steps=1)


def test_models_that_were_built_in_inference_mode():
    """Their parameters can never have gradients: calibration works or refuses in words, and changes nothing."""
    with torch.inference_mode():
        model = Model()
    for verb in (calibrate, lambda model, batches: calibrate(model, batches, squares)):
        before = snapshot_of_inference(model)
        try:
            verb(model, [BATCH])
        except SlimLSTMError as error:
            assert "inference" in str(error)
        assert snapshot_of_inference(model) == before


def snapshot_of_inference(model):
    return [(id(value), value.tolist()) for value in model.parameters()], model.training
