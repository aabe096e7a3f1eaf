"""Rank and bits together: options, sensitivities, plans for any budget, and the choice by held-out batches."""

import copy
import itertools
import random
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributions import Categorical, kl_divergence

import slimlstm as sl
from slimlstm.calibration.collect import MomentSums, mean_loss
from slimlstm.calibration.judge import ModuleJudge
from slimlstm.calibration.module_observer import ModuleObserver
from slimlstm.calibration.recorder import Rows
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig
from slimlstm.evaluate import NextTokens, pieces
from slimlstm.methods import Option, choose_options, efficient, matrix_bytes
from slimlstm.modules.hosts import find_hosts
from slimlstm.pipeline.selection import TOGETHER
from slimlstm.weight_files import compress_file

IN, H, CLASSES = 12, 24, 5


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(IN, H, num_layers=2)
        self.out = nn.Linear(H, CLASSES)
        with torch.no_grad():
            self.out.weight.mul_(5)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


def batches(count=10):
    torch.manual_seed(1)
    return [torch.randn(7, 4, IN) for _ in range(count)]


def classes(model, x):
    return Categorical(logits=model(x))


def losses(model, x):
    return (model(x) - 1.0).square().mean(-1)


@pytest.fixture(scope="module")
def measured():
    return sl.measure_sensitivity(Tagger(), batches(), losses)


def random_options(seed, count=4):
    draw = random.Random(seed)  # noqa: S311 (no secret)
    return [Option(rank, "int4", draw.randint(1, 30), draw.random()) for rank in range(1, count + 1)]


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_fits_and_is_best_up_to_one_step(seed):
    matrices = {name: random_options(100 * seed + index) for index, name in enumerate("abc")}
    budget = 60
    chosen = choose_options(matrices, budget)
    spent = sum(option.bytes for option in chosen.values())
    assert spent <= budget
    fitting = [c for c in itertools.product(*matrices.values()) if sum(option.bytes for option in c) <= budget]
    best = min(sum(option.loss for option in c) for c in fitting)
    # The greedy choice can miss the optimum by at most its largest single step.
    step = max(max(o.loss for o in options) - min(o.loss for o in options) for options in matrices.values())
    found = sum(option.loss for option in chosen.values())
    assert best <= found <= best + step
    for key, options in matrices.items():
        for option in efficient(options):
            assert option.loss >= chosen[key].loss or spent - chosen[key].bytes + option.bytes > budget


def test_a_plan_fits_its_budget_and_more_bytes_lose_no_more(measured):
    smallest = measured.smallest_bytes
    rises = []
    for budget in (smallest, 2 * smallest, 4 * smallest, 8 * smallest):
        plan = measured.plan(budget)
        model = Tagger()
        report = sl.compress_(model, plan, batches=batches(), loss=losses, refit=0)
        assert sum(site.bytes_after for site in report.sites) <= budget
        rises.append(measured.predicted_rise(plan))
    assert rises == sorted(rises, reverse=True)
    with pytest.raises(sl.SlimLSTMError, match="too small"):
        measured.plan(smallest - 1)


def test_every_option_has_its_bytes_and_a_positive_loss(measured):
    assert measured.is_measured
    assert any(option.rank is None for site in measured.sites for option in site.options)
    for site in measured.sites:
        assert len(site.probes) == 3
        for option in site.options:
            assert option.bytes == matrix_bytes(site.shape, option.rank, option.storage, 4)
            assert option.loss > 0


def test_a_sensitivity_is_saved_and_loaded(measured, tmp_path):
    measured.save(tmp_path / "sensitivity.json")
    loaded = sl.Sensitivity.load(tmp_path / "sensitivity.json")
    assert loaded == measured
    assert loaded.plan(4000) == measured.plan(4000)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "slimlstm sensitivity 1"}', '{"format": "other"}'])
def test_a_damaged_sensitivity_is_refused(text, tmp_path):
    path = tmp_path / "sensitivity.json"
    path.write_text(text)
    with pytest.raises(sl.SlimLSTMError, match="measure it again"):
        sl.Sensitivity.load(path)


@pytest.mark.parametrize("loss", [classes, losses])
@pytest.mark.parametrize("budget", [2200, 4000])
@pytest.mark.slow
def test_compression_keeps_the_budget_and_names_the_rivals(budget, loss):
    model = Tagger()
    config = sl.LowRank("fisher", bytes=budget, storage="auto")
    report = sl.compress_(model, config, batches=batches(), loss=loss, refit=0)
    assert sum(site.bytes_after for site in report.sites) <= budget
    (note,) = [note for note in report.notes if TOGETHER in note]
    assert "fisher in int5" in note
    assert ("dense in int3" in note) == (budget == 4000)
    assert sl.compress_(Tagger(), report.plan, batches=batches(), loss=loss, refit=0).plan == report.plan


@pytest.mark.parametrize("budget", [2200, 4000])
def test_what_is_chosen_loses_least_of_all_on_the_batches_held_out(budget, measured):
    model, config = Tagger(), sl.LowRank("fisher", bytes=budget, storage="auto")
    calibration = sl.calibrate(model, batches()[:8], losses)
    given = {"calibration": calibration, "refit": 0}

    def lost(config, **more):
        compressed = Tagger()
        sl.compress_(compressed, config, **given, **more)
        return mean_loss(compressed, batches()[8:], losses)

    ours = lost(config, batches=batches(), loss=losses, sensitivity=measured)
    for method, storage in itertools.product(("svd", "fisher"), ("int8", "int5")):
        if (method, storage) != ("svd", "int5"):
            # The kernel rounds inputs, the judge does not.
            assert ours <= lost(sl.LowRank(method, bytes=budget, storage=storage)) * 1.005


def factored():
    model = Tagger()
    sl.compress_(model, sl.LowRank(rank=2))
    return model


def file_without_batches():
    with tempfile.TemporaryDirectory() as folder:
        torch.save(Tagger().state_dict(), Path(folder) / "in.pt")
        config = sl.LowRank("fisher", bytes=2000, storage="auto")
        try:
            compress_file(Path(folder) / "in.pt", config, Path(folder) / "out")
        finally:
            assert not (Path(folder) / "out").exists()


REFUSED = {
    "a rank": (lambda: sl.LowRank("fisher", rank=4, storage="auto"), "one budget"),
    "a fraction": (lambda: sl.LowRank("fisher", keep=0.1, storage="auto"), "one budget"),
    "svd": (lambda: sl.LowRank("svd", bytes=999, storage="auto"), "fisher"),
    "activation": (lambda: sl.LowRank("activation", bytes=999, storage="auto"), "fisher"),
    "an iterator": (lambda: run(batches=iter(batches())), "more than once"),
    "no loss": (lambda: run(loss=None), "loss"),
    "no batches": (lambda: run(batches=None, loss=None), "has to see data; give batches= and loss="),
    "no batches for a file": (file_without_batches, "has to see data"),
    "moments without gradients": (
        lambda: run(batches=None, loss=None, calibration=sl.calibrate(Tagger(), batches())),
        "needs gradients",
    ),
    "too few bytes": (lambda: run(budget=10), "too small"),
    "another model's sensitivity": (lambda: run(sensitivity=sl.Sensitivity("fisher", [], True)), "does not know"),
    "a compressed model": (lambda: run(model=factored()), "compressed already"),
    "an iterator to measure": (lambda: sl.measure_sensitivity(Tagger(), iter(batches()), losses), "more than once"),
    "nothing to measure": (lambda: sl.measure_sensitivity(Tagger(), [], losses), "no batch"),
}


def run(model=None, budget=2000, **given):
    model = model or Tagger()
    before = copy.deepcopy(model.state_dict())
    try:
        config = sl.LowRank("fisher", bytes=budget, storage="auto")
        sl.compress_(model, config, **{"batches": batches(), "loss": losses, **given})
    finally:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_changes(call, message):
    with pytest.raises(sl.SlimLSTMError, match=message):
        call()


def test_a_weight_file_is_planned_by_predictions(tmp_path):
    model = Tagger()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    calibration = sl.calibrate(model, batches(), losses)
    config = sl.LowRank("fisher", bytes=2500, storage="auto")
    report = sl.compress_file(tmp_path / "model.safetensors", config, tmp_path / "small", calibration=calibration)
    assert sum(site.bytes_after for site in report.sites) <= 2500
    assert any("predicted" in note for note in report.notes)


def judge_of(model, given, loss, held_out):
    return ModuleJudge(model, find_hosts(model), given, loss, held_out)


def test_a_judge_measures_what_a_changed_model_would_lose():
    model, changed, given = Tagger(), Tagger(), batches()
    weight = torch.randn(4 * H, H)
    with torch.no_grad():
        changed.lstm.weight_hh_l1.copy_(weight)
    judge = judge_of(model, given, losses, range(8, 10))
    before = copy.deepcopy(model.state_dict())
    assert judge.cost({}) == pytest.approx(mean_loss(model, given[8:], losses), rel=1e-5)
    assert judge.cost({"lstm.weight_hh_l1": weight}) == pytest.approx(mean_loss(changed, given[8:], losses), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    divergence = judge_of(model, given, classes, range(8, 10))
    assert divergence.cost({}) == pytest.approx(0.0, abs=1e-9)
    with torch.no_grad():
        wanted = torch.cat([kl_divergence(classes(model, x), classes(changed, x)) for x in given[8:]]).mean()
    assert divergence.cost({"lstm.weight_hh_l1": weight}) == pytest.approx(float(wanted), rel=1e-4)


def test_a_judge_carries_the_state_of_a_loss_into_the_batches_held_out():
    model = AWDLSTM(AWDLSTMConfig(vocab_size=11, embedding_size=4, hidden_size=6, num_layers=1)).eval()
    text = pieces(torch.arange(60) % 11, streams=2, steps=10)
    loss, last = NextTokens(), len(text) - 1
    with torch.no_grad():
        wanted = [loss(model, piece) for piece in text][-1].mean()
    judge = judge_of(model, text, NextTokens(), range(last, last + 1))
    for _ in range(2):
        assert judge.cost({}) == pytest.approx(float(wanted), rel=1e-5)


class Shuffled:
    """Ten batches in another order at every pass."""

    def __init__(self):
        self.batches, self.passes = batches(10), 0

    def __len__(self):
        return 10

    def __iter__(self):
        self.passes += 1
        order = torch.randperm(10, generator=torch.Generator().manual_seed(self.passes))
        return iter([self.batches[index] for index in order])


@pytest.mark.parametrize("loss", [losses, classes])
def test_all_matrices_are_measured_on_the_same_batches(loss):
    judge = judge_of(Tagger(), Shuffled(), loss, range(8, 10))
    assert judge.cost({}) == judge.cost({}) == judge.cost({})
    observer = ModuleObserver(model := Tagger(), find_hosts(model), Shuffled(), losses)
    seen = []
    for _ in range(2):
        found = list(observer.observe({}, range(8), range(8, 10)))
        seen.append([one.costs for one in found if one.costs is not None])
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_a_sensitivity_measures_no_mean_that_nobody_reads():
    given = Shuffled()
    sl.measure_sensitivity(Tagger(), given, losses)
    assert given.passes == 2  # one to calibrate, one to keep the batches held out


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTM(IN, H), nn.LSTM(H, H)
        self.second.weight_hh_l0 = self.first.weight_hh_l0

    def forward(self, x):
        return self.second(self.first(x)[0])[0]


def test_sites_that_share_a_matrix_have_one_entry():
    model, shared = Tied(), ("first.weight_hh_l0", "second.weight_hh_l0")
    found = sl.measure_sensitivity(model, batches(), losses)
    assert shared in [site.keys for site in found.sites]
    plan = found.plan(2000)
    assert plan.sites[shared[0]] == plan.sites[shared[1]]
    sl.compress_(model, plan, batches=batches(), loss=losses, refit=0)
    assert model.first.storages["weight_hh_l0"] == model.second.storages["weight_hh_l0"]


def test_too_few_effective_rows_are_named():
    config = sl.LowRank("fisher", bytes=2200, storage="int4")
    few = sl.compress_(Tagger(), config, batches=batches()[:1], loss=lambda model, batch: losses(model, batch)[:2], refit=0)
    assert any("effective rows for" in note for note in few.notes)
    many = sl.compress_(Tagger(), config, batches=batches(40), loss=losses, refit=0)
    assert not any("effective rows" in note for note in many.notes)


def test_effective_rows_count_equal_gradients_once():
    sums = MomentSums()
    sums.add(Rows((torch.randn(6, 3),), torch.tensor([[2.0, 0.0]] * 5 + [[0.0, 0.0]])))
    assert sums.effective_rows == pytest.approx(5)
    sums.add(Rows((torch.randn(1, 3),), torch.tensor([[2000.0, 0.0]])))
    assert sums.effective_rows == pytest.approx(1, abs=0.01)
