"""What runs of recipes share: seeds, limits of time, checks of settings, locks, checkpoints, plugins."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paper import methods
from paper.awd_training import Training, TrainingOptions
from paper.checkpoints import moments_of, read_tensors, restore_moments, without_prefix, write_tensors
from paper.optimization import one_cycle, take_gradients
from paper.processes import Processes
from paper.runs import Pace, check_settings, exit_if_done, lock_folder, seed, settings_of
from paper.tensor_train import three_factors
from slimlstm import SlimLSTMError
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig
from slimlstm.methods import METHODS


def test_a_place_in_the_run_has_its_own_random_numbers():
    drawn = {}
    for place in ((1, "dropout", 0, 3), (1, "dropout", 3, 0), (2, "dropout", 0, 3), (1, "dropout", 0, 3)):
        seed(*place)
        drawn.setdefault(place, []).append(float(torch.rand(())))
    first, again = drawn[1, "dropout", 0, 3]
    assert first == again
    assert len({values[0] for values in drawn.values()}) == 3


def test_seeds_are_those_of_runs_that_are_in_progress():
    """A change would make resumed runs draw other numbers than they would have drawn."""
    seed(1, "weights")
    assert torch.initial_seed() == 1200024532


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr("paper.runs.time.monotonic", lambda: now[0])
    return now


def test_checkpoints_come_at_intervals_and_at_the_end(clock):
    pace, written = Pace(max_minutes=1.0, checkpoint_seconds=20.0), []
    for second in (5, 19, 20, 30, 41, 59):
        clock[0] = 100.0 + second
        pace.after_step(lambda second=second: written.append(second))
    assert written == [20, 41]
    clock[0] = 160.0
    with pytest.raises(SystemExit) as ended:
        pace.after_step(lambda: written.append(60))
    assert (written, ended.value.code) == ([20, 41, 60], None)


def test_settings_have_to_agree():
    ours = settings_of(argparse.Namespace(lr=0.1, device="cpu", limit=None), without=["device"])
    assert ours == {"lr": "0.1", "limit": "None"}
    check_settings(Path("checkpoint"), {"lr": "0.1"}, ours)  # older than the option limit
    for theirs, message in (({"lr": "0.2"}, "is of a run with lr=0.2, not 0.1"), ({"lr": "0.1", "limit": "5"}, "limit=5")):
        with pytest.raises(SlimLSTMError, match=message):
            check_settings(Path("checkpoint"), theirs, ours)


def test_a_locked_folder_is_left_alone(tmp_path):
    lock = lock_folder(tmp_path / "run")
    with pytest.raises(SystemExit, match="another process works in"):
        lock_folder(tmp_path / "run")
    lock.release()
    lock_folder(tmp_path / "run").release()


def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    exit_if_done(tmp_path / "result.json")
    (tmp_path / "result.json").touch()
    with pytest.raises(SystemExit) as ended:
        exit_if_done(tmp_path / "result.json")
    assert ended.value.code is None
    assert "already exists" in capsys.readouterr().out


def test_the_rate_never_exceeds_its_peak_and_ends_at_zero():
    rates = [one_cycle(done / 100, 0.1, 0.05 + done / 5) for done in range(101)]
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_gradients_that_are_not_finite_are_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(SlimLSTMError, match=r"norm is inf in epoch 3; try an lr below 0\.1"):
        take_gradients((weight * torch.inf).sum(), torch.optim.SGD([weight]), [weight], clip=1.0, lr=0.1, epoch=3)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_continues_from_its_checkpoint(make, tmp_path):
    def step(parameter, optimizer):
        parameter.grad = parameter.detach().sin()
        optimizer.step()

    whole, first = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    optimizer, started = make([whole], lr=0.1), make([first], lr=0.1)
    step(whole, optimizer)
    step(first, started)
    write_tensors(tmp_path / "a.safetensors", {"model.w": first, **moments_of(started)}, {"place": {"epoch": 2}})
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    resumed = torch.nn.Parameter(without_prefix("model", tensors)["w"])
    continued = make([resumed], lr=0.1)
    restore_moments(continued, tensors)
    step(whole, optimizer)
    step(resumed, continued)
    assert torch.equal(whole, resumed)
    assert metadata == {"place": {"epoch": 2}}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_checkpoints_of_earlier_versions_are_read(tmp_path):
    texts = {"place": json.dumps({"epoch": 1}), "settings": json.dumps({"lr": "0.1"})}
    save_file({"moment.0.step": torch.tensor(3.0)}, tmp_path / "checkpoint.safetensors", texts)
    tensors, metadata = read_tensors(tmp_path / "checkpoint.safetensors")
    assert metadata == {"place": {"epoch": 1}, "settings": {"lr": "0.1"}}
    assert tensors["moment.0.step"] == 3.0


def test_streams_are_divided_evenly():
    Processes(2, 0).check_streams(4)
    with pytest.raises(SlimLSTMError, match="5 streams cannot be divided evenly among 2 processes"):
        Processes(2, 0).check_streams(5)


@pytest.mark.parametrize(("size", "factors"), [(4600, [23, 20, 10]), (1600, [16, 10, 10]), (7, [7, 1, 1])])
def test_three_factors_are_near_to_each_other(size, factors):
    assert three_factors(size) == sorted(factors, reverse=True)


@pytest.fixture
def plugin(tmp_path):
    """A file that registers a method; the table is restored afterwards."""
    path = tmp_path / "toy_of_runs.py"
    path.write_text(
        "from slimlstm.methods import METHODS, register_method\nregister_method('toy', METHODS['svd'])\n", encoding="utf-8"
    )
    yield path
    METHODS.pop("toy", None)
    sys.modules.pop("plugin_toy_of_runs", None)


def test_a_plugin_registers_a_method_once(plugin, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe", "--other", "1", "--plugin", str(plugin)])
    parser = argparse.ArgumentParser()
    assert methods.add_plugin_option(parser) == [str(plugin)]
    methods.import_plugins([str(plugin)])
    assert "toy" in methods.beyond_paper()
    parser.add_argument("--other")
    assert parser.parse_args().plugin == [str(plugin)]


@pytest.mark.parametrize("name", ["missing_plugin_file.py", "missing_plugin_module"])
def test_a_missing_plugin_is_an_error(name, monkeypatch, capsys):
    with pytest.raises(SlimLSTMError, match=r"the plugin .*missing_plugin"):
        methods.import_plugins([name])
    monkeypatch.setattr(sys, "argv", ["recipe", "--plugin", name])
    with pytest.raises(SystemExit):
        methods.add_plugin_option(argparse.ArgumentParser())
    assert "the plugin" in capsys.readouterr().err


def test_variants_of_methods():
    assert methods.configuration_called("fisher-int8", 0.25, 4000).storage == "int8"
    assert methods.configuration_called("svd-global", 0.25, 4000).allocation == "global"
    assert methods.configuration_called("semi-nmf", 0.25, 4000).method == "semi-nmf"
    assert methods.configuration_called("prune", 0.25, 4000).keep == 0.25
    assert methods.configuration_called("fisher-auto", 0.25, 4000).is_auto
    assert methods.configuration_called("dense-int4", 0.25, 4000).storage == "int4"
    calibrated = {"svd-int8": False, "fisher-int8": True, "semi-nmf": False, "dense": False, "dense-int4": True}
    assert {name: methods.is_calibrated(name) for name in calibrated} == calibrated


def rates_of(first_epoch, warm_up=0.1):
    """The learning rates of a cycle of ten epochs, ten times an epoch."""
    tokens = {split: torch.arange(44) % 5 for split in ("train", "valid", "test")}
    options = TrainingOptions("adamw", lr=1.0, epochs=10, first_epoch=first_epoch, warm_up=warm_up)
    training = Training(AWDLSTM(AWDLSTMConfig(5, 2, 3)), tokens, 2, options, Processes(1, 0))
    assert training.place.epoch == first_epoch
    rates = []
    for epoch, position in itertools.product(range(first_epoch, 10), range(0, training.length, 2)):
        training.place.epoch, training.place.position = epoch, position
        rates.append(training.learning_rate(taken=options.bptt))
    return rates


def test_a_cycle_continues_from_stored_weights_after_a_short_warm_up():
    whole, rest = rates_of(0), rates_of(4, warm_up=0.05)
    same = whole[-len(rest) :]
    assert rest[0] == pytest.approx(0.1 * same[0])
    assert rest[6:] == same[6:], "after half an epoch, a twentieth of the cycle"
    assert all(one < other for one, other in zip(rest[:5], same[:5], strict=True))


def texts_in(content):
    """Yield all texts within parsed JSON."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from texts_in(part)


def test_stored_results_name_no_folder_of_the_machine_that_made_them():
    files = sorted((Path(__file__).parents[2] / "results").rglob("*.json"))
    assert files
    found = {text for file in files for text in texts_in(json.loads(file.read_text(encoding="utf-8")))}
    assert [text for text in found if Path(text).is_absolute()] == []
