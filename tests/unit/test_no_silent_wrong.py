"""Strangers' models in unusual states: compression does the right thing, or refuses in words before anything changes.

Every table is one law. A new case is a new row.
"""

import copy
import functools
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import slimlstm
from slimlstm import LowRank, LowRankLSTM, Prune, Quantize, SlimLSTMError, calibrate, compress_, find_sites, load, save
from slimlstm.bench import bench_layers
from slimlstm.folders import read_folder
from slimlstm.modules.graphs import copy_model
from slimlstm.search import find_best, find_smallest
from slimlstm.weight_files import read_tensors

IN, H, T, B = 6, 16, 5, 2

CONFIGS = {
    "low rank": lambda: LowRank(rank=2),
    "int8": lambda: Quantize("int8"),
    "pruned": lambda: Prune(keep=0.2),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def x(size=IN):
    torch.manual_seed(1)
    return torch.randn(T, B, size)


class Model(nn.Module):
    """One LSTM, called by the name ``lstm``."""

    def __init__(self, lstm=None):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(IN, H) if lstm is None else lstm(IN, H)

    def forward(self, x):
        return self.lstm(x)[0]


def snapshot(model):
    """Everything that a verb could change: objects, classes, modes, hooks, numbers, random state and modes of PyTorch."""
    modules = {
        name: (id(module), type(module), module.training, *hooks_of(module)) for name, module in model.named_modules()
    }
    tensors = {
        name: (id(value), value.dtype, value.detach().clone().nan_to_num(0).tolist(), value.grad)
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    return modules, tensors, modes, torch.get_rng_state().tolist()


def hooks_of(module):
    return [len(value) for name, value in sorted(vars(module).items()) if name.endswith("_hooks")], vars(module).get(
        "forward"
    )


# A. The new module is what runs.


class InList(Model):
    def __init__(self):
        super().__init__()
        self.rnns = [self.lstm]

    def forward(self, x):
        for rnn in self.rnns:
            x = rnn(x)[0]
        return x


class InDict(Model):
    def __init__(self):
        super().__init__()
        self.by_name = {"rnn": {"deeper": self.lstm}}

    def forward(self, x):
        return self.by_name["rnn"]["deeper"](x)[0]


class InTuple(Model):
    def __init__(self):
        super().__init__()
        self.pair = (self.lstm, None)

    def forward(self, x):
        return self.pair[0](x)[0]


class InClosure(Model):
    def __init__(self):
        super().__init__()
        lstm = self.lstm
        self.step = lambda x: lstm(x)[0]

    def forward(self, x):
        return self.step(x)


class InPartial(Model):
    def __init__(self):
        super().__init__()
        self.step = functools.partial(self.lstm)

    def forward(self, x):
        return self.step(x)[0]


class InObject(Model):
    def __init__(self):
        super().__init__()
        self.other = type("Other", (), {})()
        self.other.lstm = self.lstm

    def forward(self, x):
        return self.other.lstm(x)[0]


def compiled_inside():
    model = Model()
    model.lstm.compile(backend="eager")
    return model


def compiled_whole():
    return torch.compile(Model(), backend="eager")


def compiled_and_run():
    model = compiled_whole().eval()
    with torch.no_grad():
        model(x())
    return model


def own_forward_stored():
    model = Model()
    model.lstm.forward = model.lstm.forward
    return model


def with_hook():
    model = Model()
    model.lstm.register_forward_hook(lambda module, inputs, outputs: (2 * outputs[0], outputs[1]))
    return model


def doubled(model):
    """A plain model's outputs where a hook doubles them."""
    return lambda x: 2 * model(x)


RUNS = {
    "plain": (Model, None),
    "in a list": (InList, None),
    "in nested dictionaries": (InDict, None),
    "in a tuple": (InTuple, None),
    "in a closure": (InClosure, None),
    "in a partial": (InPartial, None),
    "in an object": (InObject, None),
    "compiled in place": (compiled_inside, None),
    "whole model compiled": (compiled_whole, None),
    "whole model compiled and run": (compiled_and_run, None),
    "its own forward stored on it": (own_forward_stored, None),
    "hooked": (with_hook, doubled),
}


@every_config
@pytest.mark.parametrize(("make", "change"), RUNS.values(), ids=RUNS)
def test_the_compressed_module_is_what_runs(make, change, config):
    model, plain = make().eval(), Model().eval()
    with torch.no_grad():
        dense = model(x())
        compress_(model, config())
        compress_(plain, config())
        expected = (change or (lambda model: model))(plain)(x())
        after = model(x())
    assert not torch.equal(after, dense)
    torch.testing.assert_close(after, expected)


@every_config
def test_a_model_that_is_an_lstm_is_compressed_in_place(config):
    torch.manual_seed(0)
    model, plain = nn.LSTM(IN, H).eval(), Model().eval()
    compress_(model, config())
    compress_(plain, config())
    with torch.no_grad():
        torch.testing.assert_close(model(x())[0], plain(x()))


class Tied(Model):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(IN, 4 * H)
        self.head.weight = self.lstm.weight_ih_l0


def test_a_matrix_tied_to_another_layer_is_named_in_the_report():
    report = compress_(Tied(), LowRank(rank=2, target="both"))
    assert any("lstm.weight_ih_l0 was one parameter with head.weight" in note for note in report.notes)
    assert not compress_(Model(), LowRank(rank=2, target="both")).notes


def test_an_optimizer_that_holds_replaced_weights_is_named_in_the_report():
    model, other = Model(), Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert not compress_(other, LowRank(rank=2)).notes
    assert any(
        "an optimizer (SGD) holds weights that were replaced" in note for note in compress_(model, LowRank(rank=2)).notes
    )
    del optimizer


# B. What an LSTM carries beside its weights.


class Carrying(nn.LSTM):
    """An LSTM with an attribute, a class constant, a buffer, a parameter and a submodule, but no code."""

    family = "recurrent"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.tag = "encoder"
        self.register_buffer("h_init", torch.full((1, 1, H), 0.1))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.scale = nn.Parameter(torch.ones(3))
        self.norm = nn.LayerNorm(H)


@every_config
def test_attributes_buffers_parameters_and_submodules_are_carried_over(config):
    model = Model(Carrying)
    before = dict(model.lstm.named_parameters())
    keys = {key for key in model.state_dict() if "weight_" not in key and "bias_" not in key}
    compress_(model, config())
    lstm = model.lstm
    assert (lstm.tag, lstm.family, lstm.h_init.shape, lstm.scratch.shape) == ("encoder", "recurrent", (1, 1, H), (2,))
    assert lstm.scale is before["scale"]
    assert isinstance(lstm.norm, nn.LayerNorm)
    assert keys <= model.state_dict().keys()
    assert "lstm.scratch" not in model.state_dict()


@every_config
def test_backward_hooks_are_carried_over(config):
    model, seen = Model(), []
    handle = model.lstm.register_full_backward_hook(lambda module, inputs, outputs: seen.append(1))
    compress_(model, config())
    model(x().requires_grad_()).sum().backward()
    assert seen == [1]
    handle.remove()
    model(x().requires_grad_()).sum().backward()
    assert seen == [1]


def test_masks_on_biases_are_carried_over():
    model = Model()
    slimlstm.modules.masks.apply_mask(model.lstm, "bias_hh_l0", torch.zeros(4 * H, dtype=torch.bool))
    compress_(model, LowRank(rank=2))
    assert not model.lstm.bias_hh_l0.any()


READ = {
    "weight_hh_l0": lambda lstm: [lstm.weight_hh_l0],
    "weight_ih_l0_reverse": lambda lstm: [lstm.weight_ih_l0_reverse],
    "bias_ih_l0": lambda lstm: [lstm.bias_ih_l0],
    "all_weights": lambda lstm: [weight for weights in lstm.all_weights for weight in weights],
    "_flat_weights": lambda lstm: lstm._flat_weights,
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
@pytest.mark.parametrize("projection", [0, 4])
def test_dense_weights_are_readable(read, projection):
    dense = nn.LSTM(IN, H, bidirectional=True, proj_size=projection)
    model = nn.ModuleList([copy.deepcopy(dense)])
    compress_(model, LowRank(rank=4, target="both"))
    assert isinstance(model[0], LowRankLSTM)
    found, expected = read(model[0]), read(model[0].to_dense())
    assert [value.shape for value in found] == [value.shape for value in read(dense)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model[0].mode == dense.mode
    assert model[0]._flat_weights_names == dense._flat_weights_names
    assert model[0]._all_weights == dense._all_weights


@pytest.mark.parametrize("value", [torch.zeros(4 * H, H), nn.Parameter(torch.zeros(4 * H, H)), None])
def test_factored_matrices_cannot_be_set(value):
    lstm = LowRankLSTM(IN, H, ranks={"weight_hh_l0": 2})
    with pytest.raises(SlimLSTMError, match="weight_hh_l0 is the product of weight_hh_l0_u and weight_hh_l0_v"):
        lstm.weight_hh_l0 = value


# A and B. What cannot be right is refused, and nothing changes.


class BoundMethod(Model):
    def __init__(self):
        super().__init__()
        self.step = self.lstm.forward


class Called(nn.LSTM):
    def __call__(self, *inputs):
        output, state = super().__call__(*inputs)
        return 2 * output, state


class Flat(nn.LSTM):
    @property
    def _flat_weights(self):
        return [2 * getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value):
        pass


class Permuted(nn.LSTM):
    def permute_hidden(self, hx, permutation):
        return tuple(2 * state for state in super().permute_hidden(hx, permutation))


class Helped(nn.LSTM):
    def initial(self, batch):
        return torch.zeros(1, batch, H), torch.zeros(1, batch, H)


class Helper:
    def initial(self, batch):
        return torch.zeros(1, batch, H), torch.zeros(1, batch, H)


class Mixed(nn.LSTM, Helper):
    pass


class Named(nn.LSTM):
    """Has an attribute that means something else on a LowRankLSTM."""

    ranks = (1, 2)


def tied_inside():
    model = Model(functools.partial(nn.LSTM, bidirectional=True))
    model.lstm.weight_hh_l0_reverse = model.lstm.weight_hh_l0
    return model


def compiled():
    model = Model()
    model.lstm = torch.compile(model.lstm, backend="eager")
    return model


def patched():
    model = Model()
    own = model.lstm.forward
    model.lstm.forward = lambda x: own(2 * x)
    return model


def state_dict_hook():
    model = Model()
    model.lstm.register_state_dict_pre_hook(lambda module, prefix, keep: None)
    return model


def load_hook():
    model = Model()
    model.lstm.register_load_state_dict_pre_hook(lambda *arguments: None)
    return model


class WeightDrop(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.module = nn.LSTM(*sizes)
        raw = self.module.weight_hh_l0
        del self.module.weight_hh_l0
        self.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
        self.module.register_forward_hook(lambda module, inputs, outputs: outputs)

    def forward(self, *inputs):
        self.module.weight_hh_l0 = self.weight_hh_l0_raw.clone()
        return self.module(*inputs)


def with_dropped_hook():
    model = Model(WeightDrop)
    with torch.no_grad():
        model(x())
    return model


def factored():
    model = Model()
    compress_(model, LowRank(rank=4))
    return model


def pruned_factor():
    model = factored()
    prune.l1_unstructured(model.lstm, "weight_hh_l0_u", 0.5)
    return model


def normed_factor():
    model = factored()
    parametrizations.weight_norm(model.lstm, "weight_hh_l0_v")
    return model


def distributed(kind):
    """A model inside an imitation of one of PyTorch's wrappers, which need a process group."""
    wrapper = type(
        kind, (nn.Module,), {"__module__": "torch.nn.parallel.distributed", "forward": lambda self, x: self.module(x)}
    )

    def make():
        model = wrapper()
        model.module = Model()
        return model

    return make


def sharded():
    model = Model()
    mark = type("FSDPModule", (), {"__module__": "torch.distributed.fsdp"})
    model.__class__ = type("FSDPModel", (mark, Model), {})
    return model


NO_MASK = "a mask on the product would not last"
REFUSED = {
    "bound method": (BoundMethod, "forward of 'lstm' is stored as a bound method"),
    "compiled": (compiled, r"'lstm\._orig_mod' is wrapped by torch\.compile"),
    "DistributedDataParallel": (distributed("DistributedDataParallel"), "inside DistributedDataParallel, whose reducer"),
    "FullyShardedDataParallel": (distributed("FullyShardedDataParallel"), "inside FullyShardedDataParallel"),
    "fully_shard": (sharded, "inside FSDPModule"),
    "patched forward": (patched, "forward of 'lstm' was replaced on the instance"),
    "__call__": (lambda: Model(Called), "'lstm' is a Called, whose __call__ would be lost"),
    "_flat_weights": (lambda: Model(Flat), "whose _flat_weights would be lost"),
    "permute_hidden": (lambda: Model(Permuted), "whose permute_hidden would be lost"),
    "helper method": (lambda: Model(Helped), "whose initial would be lost"),
    "mixin": (lambda: Model(Mixed), "whose initial would be lost"),
    "taken attribute": (lambda: Model(Named), "has an attribute ranks of its own"),
    "tied inside": (tied_inside, "weight_hh_l0_reverse and weight_hh_l0 of 'lstm' are one parameter"),
    "state_dict hook": (state_dict_hook, "hooks on its state_dict"),
    "load_state_dict hook": (load_hook, "hooks on its state_dict"),
    "hook below weight drop": (with_dropped_hook, "the LSTM inside 'lstm' has hooks"),
    "pruned factor": (pruned_factor, f"weight_hh_l0_u of 'lstm' is no parameter but computed by a hook|{NO_MASK}"),
    "parametrized factor": (normed_factor, f"weight_hh_l0_v of 'lstm' is parametrized|{NO_MASK}"),
}


@every_config
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_words_before_anything_changes(make, message, config):
    model = make().eval()
    assert {site.problem is None for site in find_sites(model)} == {False}
    before = snapshot(model)
    with pytest.raises(SlimLSTMError, match=message):
        compress_(model, config())
    assert snapshot(model) == before


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_distributed_tensors_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), Model()
        for name, parameter in list(model.lstm.named_parameters()):
            spread = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()]))
            setattr(model.lstm, name, spread)
        with pytest.raises(SlimLSTMError, match="parameters of 'lstm' are distributed tensors; compress the model"):
            compress_(model, LowRank(rank=2))
        assert type(model.lstm) is nn.LSTM
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("strict", [True, False])
def test_dense_weights_for_a_factored_matrix_are_refused(strict):
    model, dense = Model(), Model().state_dict()
    compress_(model, LowRank(rank=2, target="hh"))
    with pytest.raises(RuntimeError, match=r"lstm\.weight_hh_l0 is dense in the state dict but factored in the model"):
        model.load_state_dict(dense, strict=strict)
    model.load_state_dict(model.state_dict())


# D. The surrounding mode does not leak in.


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


def squares(model, batch):
    return model(batch).square().mean(-1)


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


# E. Models in use.


class Holding(nn.Module):
    """Holds the state of its last call in a tuple, a list and a dictionary."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(IN, H), nn.Linear(H, 3)
        self.hidden, self.outputs, self.cache = None, [None], {}

    def forward(self, x):
        out, self.hidden = self.lstm(x)
        self.outputs[0] = self.cache["last"] = out[-1]
        return self.head(out)


def used():
    model = Holding()
    model(x()).sum().backward()
    model.outputs.append(model.outputs)
    return model


HELD = {
    "compress_": lambda folder: compress_(used(), LowRank(rank=2)),
    "calibrate": lambda folder: calibrate(used(), [x()], squares),
    "fisher": lambda folder: compress_(used(), LowRank("fisher", keep=0.3), batches=[x(), x()], loss=squares),
    "find_smallest": lambda folder: find_smallest(used(), lambda model: 1.0, better="lower", evaluations=2),
    "copy_model": lambda folder: copy_model(used()),
    "save and load": lambda folder: (
        compress_(model := used(), LowRank(rank=2)),
        save(model, folder),
        load(folder, used()),
    ),
}


@pytest.mark.parametrize("verb", HELD.values(), ids=HELD)
def test_models_that_hold_tensors_with_a_history(verb, tmp_path):
    verb(tmp_path / "folder")


def test_calibration_leaves_no_history_behind():
    model = Holding()
    calibrate(model, [x()], squares)
    held = [*model.hidden, *model.outputs, *model.cache.values()]
    assert all(tensor.is_leaf and not tensor.requires_grad for tensor in held)
    copy.deepcopy(model)


COPIED = {
    "LSTM": lambda: nn.LSTM(IN, H),
    "LowRankLSTM": lambda: LowRankLSTM(IN, H, ranks={"weight_ih_l0": 2}),
    "LSTMCell": lambda: nn.LSTMCell(IN, H),
}


@pytest.mark.parametrize("make", COPIED.values(), ids=COPIED)
@pytest.mark.parametrize("grad", [True, False])
def test_a_pruned_module_that_has_run_can_be_copied(make, grad):
    model = nn.Sequential(make()).eval()
    inputs = x()[0] if isinstance(model[0], nn.LSTMCell) else x()
    with torch.set_grad_enabled(grad):
        model(inputs)
        compress_(model, Prune(keep=0.5, target="hh"))
        expected = model(inputs)[0]
        found = copy.deepcopy(model)(inputs)[0]
    assert torch.equal(found, expected)


def test_labels_beside_inputs_are_refused_without_a_loss():
    with pytest.raises(SlimLSTMError, match="a batch gives 2 arguments, which the model does not take"):
        calibrate(Model(), [(x(), torch.zeros(B))])
    with pytest.raises(SlimLSTMError, match="a batch gives the arguments x, labels"):
        calibrate(Model(), [{"x": x(), "labels": torch.zeros(B)}])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
@pytest.mark.parametrize("kind", ["input", "state"])
def test_other_dtypes_than_the_weights_are_refused(dtype, kind):
    lstm, cell = LowRankLSTM(IN, H).eval(), slimlstm.LowRankLSTMCell(IN, H).eval()
    inputs, state = x(), torch.zeros(1, B, H)
    inputs, state = (inputs.to(dtype), state) if kind == "input" else (inputs, state.to(dtype))
    with pytest.raises(SlimLSTMError, match=f"an input or state is {dtype}, but the weights are torch.float32"):
        lstm(inputs, (state, state))
    with pytest.raises(SlimLSTMError, match=f"an input or state is {dtype}, but the weights are torch.float32"):
        cell(inputs[0], (state[0], state[0]))


# E and H. Any exception leaves everything as it was.

SOURCE = str(Path(slimlstm.__file__).parent)


class Interrupter:
    """Raises KeyboardInterrupt at one line of slimlstm's source, counted over a run; None only counts."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def interrupted_model():
    model = nn.ModuleDict({"a": Model(), "b": Model(Carrying), "c": Tied()})
    model["a"].eval()
    model["b"].lstm.register_forward_hook(lambda module, inputs, outputs: outputs)
    return model


def interrupted_loss(model, batch):
    return sum(part(batch).square().mean(-1) for part in model.values())


def run_compression(model):
    compress_(model, LowRank("fisher", keep=0.3, storage="int8"), batches=[BATCH, 2 * BATCH], loss=interrupted_loss)


@pytest.mark.slow
def test_an_interrupt_leaves_everything_as_it_was():
    with Interrupter(None) as counted:
        run_compression(interrupted_model())
    points = random.Random(0).sample(range(1, counted.lines), settings.default.max_examples)  # noqa: S311
    for point in points:
        model = interrupted_model()
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt), Interrupter(point):
            run_compression(model)
        assert snapshot(model) == before, point


def test_a_loss_that_fails_on_the_compressed_model_leaves_everything_as_it_was():
    model = Model()
    before = snapshot(model)

    def loss(model, batch):
        if isinstance(model.lstm, LowRankLSTM):
            raise RuntimeError("out of memory")
        return squares(model, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        compress_(model, LowRank(rank=2), batches=[BATCH], loss=loss)
    assert snapshot(model) == before


def test_parametrized_matrices_are_dense_in_the_copy():
    """A parametrization other than a mask ends, and the report says so."""
    model = Model()
    parametrize.register_parametrization(model.lstm, "weight_hh_l0", nn.Tanh())
    expected = model.lstm.weight_hh_l0.detach().clone()
    report = compress_(model, LowRank(rank=2, target="ih"))
    assert torch.equal(model.lstm.weight_hh_l0, expected)
    assert any("parametrization of its weights ends here" in note for note in report.notes)
