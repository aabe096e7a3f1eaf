"""Searches: the smallest model that a metric allows, the best within bytes or a latency; limits, interrupts, files."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import slimlstm as sl
from slimlstm.search import find_best, find_smallest, limit_of
from slimlstm.search.result import student_quantile

WORDS, SIZE = 12, 24


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(WORDS, SIZE), nn.LSTM(SIZE, SIZE)
        self.decoder = nn.Linear(SIZE, WORDS)

    def forward(self, tokens):
        return self.decoder(self.lstm(self.embedding(tokens))[0])


def losses(model, batch):
    return cross_entropy(model(batch[:-1]).flatten(0, 1), batch[1:].flatten(), reduction="none")


@pytest.fixture(scope="module")
def net():
    """A model that has learnt to count, with eight batches for calibration and one more to measure on."""
    torch.manual_seed(0)
    model = Net()
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimiser.zero_grad()
        losses(model, counting(16)).mean().backward()
        optimiser.step()
    return model.eval()


def counting(streams):
    start, step = torch.randint(0, WORDS, (1, streams)), torch.randint(1, 4, (1, streams))
    return (start + step * torch.arange(20)[:, None]) % WORDS


BATCHES = [counting(4) for _ in range(5)]
HELD_OUT = counting(8)


def loss_of(model):
    with torch.no_grad():
        return float(losses(model, HELD_OUT).mean())


def accuracy_of(model):
    with torch.no_grad():
        return float((model(HELD_OUT[:-1]).argmax(-1) == HELD_OUT[1:]).float().mean())


DATA = {
    "nothing": {},
    "batches": {"batches": [(batch[:-1],) for batch in BATCHES]},
    "batches and a loss": {"batches": BATCHES, "loss": losses},
}


@pytest.mark.parametrize("data", [pytest.param(data, marks=[pytest.mark.slow] * (data == "batches")) for data in DATA])
@pytest.mark.parametrize(("metric", "better"), [(loss_of, "lower"), (accuracy_of, "higher")], ids=["loss", "accuracy"])
def test_the_smallest_model_that_a_metric_allows(net, data, metric, better):
    before, calls = copy.deepcopy(net.state_dict()), []

    def counted(model):
        calls.append(model)
        return metric(model)

    found = find_smallest(net, counted, better=better, at_most="5%", evaluations=7, **DATA[data])
    limit = limit_of(metric(net), "5%", better)
    assert len(calls) == 1 + len(found.trials) <= 7
    # The model in hand is the one that was measured, and no trial that meets the limit is smaller.
    assert metric(found.model) == pytest.approx(found.best.metric, rel=1e-6)
    accepted = [trial for trial in found.trials if trial.accepted]
    assert all((t.metric <= limit if better == "lower" else t.metric >= limit) == t.accepted for t in found.trials)
    assert found.best.bytes == min(trial.bytes for trial in accepted) < found.dense.bytes
    assert found.report.model.bytes_after == found.best.bytes
    # Nothing has happened to the model that was given, and the plan makes the same model from it.
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    again = copy.deepcopy(net)
    calibration = sl.calibrate(net, **DATA[data]) if DATA[data] else None
    sl.compress_(again, found.plan, calibration=calibration)
    assert metric(again) == pytest.approx(found.best.metric, rel=1e-4)


def test_a_frontier_has_no_trial_that_another_one_beats(net):
    found = find_smallest(net, loss_of, better="lower", at_most="5%", evaluations=6, **DATA["batches and a loss"])
    sizes = [trial.bytes for trial in found.frontier]
    metrics = [trial.metric for trial in found.frontier]
    assert sizes == sorted(set(sizes), reverse=True)
    assert metrics == sorted(set(metrics))
    text = str(found)
    assert all(trial.label in text for trial in found.trials)
    assert "chosen" in text


def compressed_net(net):
    model = copy.deepcopy(net)
    sl.compress_(model, sl.LowRank(rank=6))
    return model, {}


def calibrated_without_a_loss(net):
    return net, {"calibration": sl.calibrate(net, BATCHES)}


def impossible_loss(net):
    return net, {
        "loss": lambda model, batch: losses(model, batch).sum() * math.nan,
        "calibration": sl.calibrate(net, BATCHES),
    }


UNMEASURABLE = {
    "compressed": compressed_net,
    "calibration without a loss": calibrated_without_a_loss,
    "NaN": impossible_loss,
}


@pytest.mark.parametrize("make", UNMEASURABLE.values(), ids=UNMEASURABLE)
@pytest.mark.parametrize("find", [find_smallest, pytest.param(find_best, marks=pytest.mark.slow)])
def test_a_refused_step_leaves_what_was_accepted(net, make, find):
    model, given = make(net)
    limit = {"at_most": "50%", "evaluations": 8} if find is find_smallest else {"bytes": 9000}
    found = find(model, loss_of, better="lower", **{"batches": BATCHES, "loss": losses, **given, **limit})
    assert found.best.plan is not None
    assert sum("rank and bits chosen together: " in note for note in found.notes) == 1
    errors = [note.partition(": ")[2] for note in found.notes]
    assert len(set(errors)) == len(errors)


def test_nothing_smaller_is_said_plainly(net):
    dense = loss_of(net)
    with pytest.raises(sl.SlimLSTMError, match=r"nothing smaller meets the limit .*Tried: int8: .*bfloat16: "):
        find_smallest(net, lambda model: loss_of(model) if isinstance(model.lstm, nn.LSTM) else dense + 1.0, better="lower")


def test_a_model_in_int8_becomes_smaller_still(net):
    model = copy.deepcopy(net)
    before = sl.compress_(model, sl.Quantize("int8")).model.bytes_after
    found = find_smallest(model, loss_of, better="lower", at_most="50%")
    assert found.best.bytes < before
    assert found.trials[1].label != "int8"


def test_what_makes_a_model_no_smaller_is_named(net):
    model = copy.deepcopy(net)
    sl.compress_(model, sl.Quantize("int3"))
    with pytest.raises(sl.SlimLSTMError, match=r"no smaller than the model: int8, .*int3"):
        find_smallest(model, loss_of, better="lower")


@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_interrupt_leaves_the_best_so_far(net, tmp_path, after):
    count, before = 0, copy.deepcopy(net.state_dict())

    def interrupted(model):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return loss_of(model)

    arguments = {"better": "lower", "at_most": "20%", "output": tmp_path / "search.json"}
    if after == 1:
        with pytest.raises(KeyboardInterrupt):
            find_smallest(net, interrupted, **arguments)
        assert not (tmp_path / "search.json").exists()
    else:
        found = find_smallest(net, interrupted, **arguments)
        assert found.interrupted
        assert len(found.trials) == after - 1
        stored = json.loads((tmp_path / "search.json").read_text())
        assert sl.Plan.from_dict(stored["best"]["plan"]) == found.plan
        assert stored["interrupted"]
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not net.training


def test_the_file_is_written_after_every_trial(net, tmp_path):
    path, sizes = tmp_path / "search.json", []

    def progress(trial, seconds_left):
        assert seconds_left >= 0.0
        sizes.append(len(json.loads(path.read_text())["trials"]))

    found = find_smallest(net, loss_of, better="lower", at_most="20%", evaluations=4, output=path, progress=progress)
    assert sizes == [1, 2, 3] == list(range(1, len(found.trials) + 1))


@pytest.mark.parametrize("data", [pytest.param("nothing", marks=pytest.mark.slow), "batches and a loss"])
def test_the_best_within_bytes(net, data):
    budget = int(0.2 * 4 * sum(site.shape[0] * site.shape[1] for site in sl.find_sites(net)))
    found = find_best(net, loss_of, better="lower", bytes=budget, evaluations=6, **DATA[data])
    assert all(sum(plan.bytes_at(site) for site, plan in planned(net, trial)) <= budget for trial in found.trials)
    assert found.best.metric == min(trial.metric for trial in found.trials)


def test_shared_matrices_count_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LSTM(SIZE, SIZE), nn.LSTM(SIZE, SIZE)
            self.second.weight_ih_l0, self.second.weight_hh_l0 = self.first.weight_ih_l0, self.first.weight_hh_l0

        def forward(self, x):
            return self.second(self.first(x)[0])[0]

    model, x = Shared(), torch.randn(5, 2, SIZE)
    with torch.no_grad():
        expected = model(x)
    one = 4 * SIZE * SIZE + 4 * 4 * SIZE

    def error(model):
        return float((model(x) - expected).norm())

    found = find_best(model, error, better="lower", bytes=2 * one)
    assert found.best.label == "int8"


def planned(net, trial):
    return [(site, trial.plan.sites[site.key]) for site in sl.find_sites(net)]


def test_the_best_within_a_latency(net):
    found = find_best(net, loss_of, better="lower", latency=10.0, inputs=(HELD_OUT[:-1],), evaluations=3)
    assert found.best.metric == min(trial.metric for trial in found.trials)
    assert all(trial.latency > 0.0 and trial.faster > 0.0 for trial in found.trials)
    assert "speed" in str(found)
    with pytest.raises(sl.SlimLSTMError, match="nothing smaller meets the limit"):
        find_best(net, loss_of, better="lower", latency=1e-12, inputs=(HELD_OUT[:-1],), evaluations=3)


def test_a_frontier_leaves_out_metrics_that_are_not_numbers(net):
    found = find_smallest(
        net,
        lambda model: math.nan if "int5" in str(sl.find_sites(model)) else loss_of(model),
        better="lower",
        evaluations=5,
    )
    nans = replace(found.best, metric=math.nan, bytes=1)
    found = replace(found, trials=[nans, *found.trials])
    assert nans not in found.frontier
    assert found.best in found.frontier


def test_a_metric_runs_without_gradients(net):
    found = find_smallest(net, lambda model: model(HELD_OUT).numpy().mean(), better="lower", evaluations=2, at_most=1.0)
    assert math.isfinite(found.best.metric)


def test_a_metric_that_is_not_a_number_is_never_accepted(net):
    def broken(model):
        return loss_of(model) if isinstance(model.lstm, nn.LSTM) else math.nan

    with pytest.raises(sl.SlimLSTMError, match="nothing smaller"):
        find_smallest(net, broken, better="lower")


def right_answers(model):
    with torch.no_grad():
        return (model(HELD_OUT[:-1]).argmax(-1) == HELD_OUT[1:]).float().flatten()


@pytest.mark.slow
def test_values_of_examples_meet_the_limit_with_confidence(net):
    # Only the examples differ, so every mean is the same with and without them.
    alone = find_smallest(net, accuracy_of, better="higher", at_most="5%", evaluations=8)
    found = find_smallest(net, right_answers, better="higher", at_most="5%", evaluations=8)
    limit = limit_of(accuracy_of(net), "5%", "higher")
    before = right_answers(net).double()
    assert found.dense.metric == pytest.approx(alone.dense.metric)
    for trial in found.trials:
        model = copy.deepcopy(net)
        sl.compress_(model, trial.plan)
        difference = right_answers(model).double() - before
        error = float(difference.std()) / math.sqrt(len(difference))
        assert trial.margin == pytest.approx(student_quantile(0.995, len(difference) - 1) * error)
        assert trial.accepted == (trial.metric - trial.margin >= limit)
    assert found.best.bytes >= alone.best.bytes
    assert "with 95% confidence" in found.limit
    assert "with 95% confidence" not in alone.limit


SHAPES = {
    "a matrix": lambda model: torch.zeros(2, 2),
    "no examples": lambda model: [],
    "words": lambda model: "good",
    "nothing": lambda model: None,
    "other examples": lambda model: [1.0, 2.0] if isinstance(model.lstm, nn.LSTM) else [1.0, 2.0, 3.0],
    "a number at last": lambda model: [1.0, 2.0] if isinstance(model.lstm, nn.LSTM) else 1.5,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_metric_of_another_kind_is_refused(net, name):
    with pytest.raises(sl.SlimLSTMError, match=r"the metric returned .*a number, or one for each"):
        find_smallest(net, SHAPES[name], better="higher")


WRONG = {
    "direction": ({"better": "smaller"}, "better is 'lower' or 'higher'"),
    "limit in words": ({"at_most": "little"}, "at_most is a share such as '1%'"),
    "share without a sign": ({"at_most": "0.01"}, "at_most is a share such as '1%'"),
    "negative": ({"at_most": -0.1}, "at least 0"),
    "not a number": ({"at_most": math.nan}, "at least 0"),
    "one evaluation": ({"evaluations": 1}, "at least two evaluations"),
    "iterator": ({"batches": iter(BATCHES)}, "the batches are an iterator"),
    "loss alone": ({"loss": losses}, "a loss takes batches"),
    "a folder": ({"output": "."}, r"\. is a folder; give output= the name of a JSON file"),
    "metric": ({"metric": lambda model: math.inf}, "it has to be a finite number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_are_refused_before_anything_is_tried(net, name):
    changed, message = WRONG[name]
    tried = []
    arguments = {"metric": loss_of, "better": "lower", "progress": lambda *trial: tried.append(trial)} | changed
    with pytest.raises(sl.SlimLSTMError, match=message):
        find_smallest(net, **arguments)
    assert tried == []


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"bytes": "1500"}, "bytes is an int of at least 1, not '1500'"),
        ({"bytes": 0}, "bytes is an int of at least 1"),
        ({"latency": "1", "inputs": [1]}, "a latency is a number of seconds above 0"),
        ({}, "give either bytes or latency"),
        ({"bytes": 9, "latency": 1.0}, "either"),
        ({"latency": 1.0}, "takes inputs"),
    ],
)
def test_one_limit_is_given(net, limits, message):
    with pytest.raises(sl.SlimLSTMError, match=message):
        find_best(net, loss_of, better="lower", **limits)


def test_a_share_of_zero_is_no_limit():
    with pytest.raises(sl.SlimLSTMError, match="give at_most as a number"):
        limit_of(0.0, "1%", "lower")
    assert limit_of(0.0, 0.25, "lower") == 0.25
    assert limit_of(-2.0, "50%", "lower") == -1.0


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    # From tables of Student's distribution.
    [(0.995, 4, 4.604), (0.995, 9, 3.250), (0.995, 30, 2.750), (0.95, 9, 1.833), (0.975, 10**6, 1.960), (0.5, 7, 0.0)],
)
def test_quantiles_of_student(probability, freedom, expected):
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=3e-3, abs=1e-9)
