"""Weights, histories and checkpoints after a training run, and the caller's settings, which it has to restore."""

import json
import math
from itertools import pairwise

import pytest
import torch
from finetuning import (
    METHODS,
    OUTPUTS,
    RUN,
    Carried,
    assert_state,
    drawn_batches,
    other_weights,
    outputs,
    some_batches,
    squares,
    state_of,
    tagger,
    taggers,
    value_of,
)
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.optimizer import register_optimizer_step_pre_hook

import slimlstm as sl
from slimlstm import SlimLSTMError
from slimlstm.tuning import distillation, divergence, run


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_a_compressed_model_comes_closer_to_the_dense_one(method, temperature):
    dense, model = taggers(method)
    matrices = ("weight_ih_l0", "weight_hh_l0")
    masks = [getattr(model.lstm, name) == 0.0 for name in matrices] if method == "masks" else []
    batches, loss = some_batches(), distillation(dense.train(), outputs, temperature)

    def validate(model):
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in (*model.modules(), *dense.modules()))
        return sum(float(loss(model, batch)) for batch in batches)

    history = sl.finetune(model, batches, loss, steps=100, lr=3e-2, validate=validate)
    with torch.no_grad():
        assert validate(model.eval()) == min(value for _, value in history.validations) < 0.5 * history.validations[0][1]
    for name, mask in zip(matrices, masks, strict=False):
        assert torch.equal(getattr(model.lstm, name) == 0.0, mask)
    assert all(site.rank == 2 or site.nonzeros for site in sl.find_sites(model))


def test_divergence_by_hand():
    found, expected = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.0, math.log(3.0)], [1.0, 3.0]])
    of_first_row = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(divergence(found, expected)) == pytest.approx(of_first_row / 2)
    assert float(divergence(2.0 * found, 2.0 * expected, 2.0)) == pytest.approx(4.0 * of_first_row / 2)
    assert float(divergence(found[0], expected[0])) == pytest.approx(of_first_row)
    assert float(divergence(found, expected, None)) == pytest.approx(math.log(3.0) ** 2 / 4)
    assert float(divergence(expected[None], expected[None])) == 0.0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(SlimLSTMError, match=r"\[2, 3\] cannot be compared with targets of shape \[2, 1\]"):
        divergence(torch.ones(2, 3), torch.ones(2, 1))
    with pytest.raises(SlimLSTMError, match=r"the temperature is 0\.0; give a number above zero"):
        divergence(torch.ones(2), torch.ones(2), 0.0)


def test_the_history_tells_what_happened():
    seen = []
    history = sl.finetune(
        tagger(), some_batches(), squares, steps=20, validate=value_of, validations=4, progress=lambda *a: seen.append(a)
    )
    assert history.steps == len(history.losses) == 20
    assert [step for step, _ in history.validations] == [0, 5, 10, 15, 20]
    assert history.best_step == min(history.validations, key=lambda entry: entry[1])[0] > 0
    assert history.stopped == "steps"
    assert history.seconds > 0.0
    assert [fraction for _, fraction in seen] == [step / 20 for step in range(1, 21)]
    assert seen[2][0] == f"step 3: loss {history.losses[2]:.4f}, best {history.validations[0][1]:.4f}"
    written = json.loads(json.dumps(history.to_dict()))
    assert written == history.to_dict()
    assert written["steps"] == 20


def test_without_validation_the_last_weights_stay():
    model = tagger()
    before = state_of(model)
    history = sl.finetune(model, some_batches(), squares, steps=3)
    assert history.validations == []
    assert history.best_step == 3
    assert not torch.equal(model.lstm.weight_hh_l0_u, before["lstm.weight_hh_l0_u"])


def test_the_best_weights_come_back():
    values, states = [3.0, 2.0, math.nan, 1.0, 1.0, 5.0], []

    def validate(model):
        states.append(state_of(model))
        return values[len(states) - 1]

    model = tagger()
    history = sl.finetune(model, some_batches(), squares, steps=10, lr=0.1, validate=validate, validations=5)
    assert history.best_step == 6
    assert [int(state["calls"]) for state in states] == [0, 2, 4, 6, 8, 10]
    assert_state(model, states[3])


def test_patience_ends_a_run_that_only_gets_worse():
    model, values = tagger(), iter(range(100))
    before = state_of(model)
    history = sl.finetune(
        model, some_batches(), squares, steps=100, validate=lambda model: next(values), validations=20, patience=3
    )
    assert (history.stopped, history.steps, history.best_step) == ("patience", 15, 0)
    assert_state(model, before)


def test_the_learning_rate_rises_and_falls():
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        sl.finetune(tagger(), some_batches(), squares, steps=100, lr=0.5)
    finally:
        hook.remove()
    top = rates.index(max(rates))
    assert rates[0] == pytest.approx(0.05)
    assert rates[top] == pytest.approx(0.5, rel=0.01)
    assert top == 5
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a > b for a, b in pairwise(rates[top:]))
    assert rates[-1] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("seconds_to_validate", [0.0, 7.0])
def test_minutes_are_wall_clock_with_all_validations(seconds_to_validate, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])

    def loss(model, batch):
        now[0] += 1.0
        return squares(model, batch)

    def validate(model):
        now[0] += seconds_to_validate
        return value_of(model)

    history = sl.finetune(tagger(), some_batches(), loss, minutes=2.0, validate=validate, validations=5)
    assert history.stopped == "minutes"
    assert 120.0 <= history.seconds <= 121.0
    assert history.steps == history.seconds - 6 * seconds_to_validate
    assert history.validations[-1][0] == history.steps


class LossError(Exception):
    """Comes from a loss of the user's."""


@pytest.mark.parametrize("fails", [False, True])
def test_a_callers_settings_come_back(fails):
    model = tagger()
    model.head.bias.requires_grad_(False)
    model.lstm.train()
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random_numbers, frozen = torch.get_rng_state(), model.head.bias.clone()

    def loss(model, batch):
        assert all(module.training for module in model.modules())
        if fails:
            raise LossError
        return squares(model, batch)

    if fails:
        with pytest.raises(LossError):
            sl.finetune(model, some_batches(), loss, steps=4)
    else:
        sl.finetune(model, some_batches(), loss, steps=4)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert torch.equal(model.head.bias, frozen)


def test_only_what_is_named_is_trained():
    model = tagger()
    before = state_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sl.finetune(model, some_batches(), squares, steps=4, parameters=model.lstm.parameters())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"lstm.{name}" for name, _ in model.lstm.named_parameters()}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_losses_of_single_predictions_are_averaged():
    means, singles = tagger(), tagger()
    expected = sl.finetune(means, some_batches(), squares, steps=5)
    found = sl.finetune(
        singles, some_batches(), lambda m, x: mse_loss(outputs(m, x), x[..., :OUTPUTS], reduction="none"), steps=5
    )
    assert found.losses == expected.losses
    assert_state(singles, state_of(means))


def test_the_seed_decides():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        results.append(sl.finetune(tagger(), drawn_batches, squares, steps=7, seed=seed).losses)
    assert results[0] == results[1] != results[2]


def test_bfloat16_computes_and_float32_is_trained():
    def loss(model, batch):
        assert torch.is_autocast_enabled("cpu")
        found = outputs(model, batch)
        assert found.dtype == torch.bfloat16
        return mse_loss(found.float(), batch[..., :OUTPUTS])

    model = tagger()
    history = sl.finetune(model, some_batches(), loss, steps=40, lr=3e-2, validate=value_of, dtype=torch.bfloat16)
    assert history.validations[-1][1] < 0.9 * history.validations[0][1]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def interrupted_at(step):
    def progress(text, fraction):
        if text.startswith(f"step {step}:"):
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("step", [1, 3, 4, 10])
@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(step, every_step, tmp_path, monkeypatch):
    if every_step:
        monkeypatch.setattr(run, "_SECONDS_BETWEEN_WRITES", 0.0)
    whole, parts = tagger(), tagger()
    expected = sl.finetune(whole, drawn_batches, Carried(), **RUN)
    with pytest.raises(KeyboardInterrupt):
        sl.finetune(
            parts, drawn_batches, Carried(), **RUN, checkpoint=tmp_path / "new" / "run", progress=interrupted_at(step)
        )
    parts, steps = tagger(), []
    found = sl.finetune(
        parts,
        drawn_batches,
        Carried(),
        **RUN,
        checkpoint=tmp_path / "new" / "run",
        progress=lambda text, _: steps.append(text.split(":")[0]),
    )
    assert_state(parts, state_of(whole))
    assert (found.losses, found.validations, found.best_step) == (expected.losses, expected.validations, expected.best_step)
    kept = step - 1 if every_step else max(number for number, _ in expected.validations if number < step)
    assert steps == [f"step {number}" for number in range(kept + 1, 12)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run"]


def test_a_finished_run_is_only_read(tmp_path):
    first, again = tagger(), tagger()
    expected = sl.finetune(first, some_batches(), squares, **RUN, checkpoint=tmp_path / "run")

    def never(*_):
        raise AssertionError

    settings = RUN | {"validate": never}
    assert sl.finetune(again, some_batches(), never, **settings, checkpoint=tmp_path / "run") == expected
    assert_state(again, state_of(first))


OTHERS = {
    "other settings": (tagger, squares, {"lr": 1e-2}, r"belongs to a run with lr=0\.03, not 0\.01"),
    "no validation": (tagger, squares, {"validate": None}, "belongs to a run with validate=True, not False"),
    "masks": (lambda: taggers("masks")[1], squares, {}, "began with another model"),
    "other weights": (other_weights, squares, {}, "began with another model"),
    "a loss that carries": (tagger, Carried(), {}, "another loss"),
}


@pytest.mark.parametrize(("make", "loss", "settings", "message"), OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_run_is_refused(make, loss, settings, message, tmp_path):
    sl.finetune(tagger(), some_batches(), squares, **RUN, checkpoint=tmp_path / "run")
    content, model = (tmp_path / "run").read_bytes(), make()
    before = state_of(model)
    with pytest.raises(SlimLSTMError, match=message):
        sl.finetune(model, some_batches(), loss, **RUN | settings, checkpoint=tmp_path / "run")
    assert_state(model, before)
    assert (tmp_path / "run").read_bytes() == content


@pytest.mark.parametrize("content", ["nothing", "text", "half", "other tensors", "code"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "run"
    sl.finetune(tagger(), some_batches(), squares, steps=1, checkpoint=path)
    if content == "other tensors":
        torch.save({"weight": torch.ones(2)}, path)
    elif content == "code":
        torch.save(tagger(), path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"nothing": b"", "text": b"to be or not", "half": whole[: len(whole) // 2]}[content])
    with pytest.raises(SlimLSTMError, match="is damaged or not a checkpoint of finetune"):
        sl.finetune(tagger(), some_batches(), squares, steps=1, checkpoint=path)


def test_a_resumed_run_needs_the_batches_it_had(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sl.finetune(tagger(), some_batches(9), squares, **RUN, checkpoint=tmp_path / "run", progress=interrupted_at(10))
    with pytest.raises(SlimLSTMError, match="epoch 0 has 4 batches, but 9 are needed"):
        sl.finetune(tagger(), some_batches(4), squares, **RUN, checkpoint=tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": None}, "needs one budget: give either steps or minutes"),
        ({"minutes": 1.0}, "needs one budget: give either steps or minutes"),
        ({"steps": 0}, "steps has to be above zero, not 0"),
        ({"steps": None, "minutes": -1.0}, r"minutes has to be above zero, not -1\.0"),
        ({"lr": 0.0}, r"lr has to be above zero, not 0\.0"),
        ({"lr": "1e-3"}, "lr has to be a number, not '1e-3'"),
        ({"steps": "9"}, "steps has to be a number, not '9'"),
        ({"patience": "2"}, "patience has to be a number"),
        ({"validate": lambda model: None}, "validate returned NoneType; it has to return a number"),
        ({"lr": math.nan}, "lr has to be above zero, not nan"),
        ({"validations": 0}, "validations has to be at least 1, not 0"),
        ({"patience": 0}, "patience has to be at least 1, not 0"),
        ({"parameters": []}, "no parameter to train"),
        (
            {"parameters": nn.LSTM(2, 3).parameters()},
            "4 of the 4 parameters do not belong to the model; compress_ makes new parameters",
        ),
        ({"batches": iter(some_batches())}, "list_iterator, which can be read only once"),
        ({"batches": []}, "epoch 0 has 0 batches, but 1 are needed"),
        ({"batches": lambda epoch: some_batches(2 - epoch)}, "epoch 2 has 0 batches"),
        ({"loss": lambda model, batch: 1.0}, "loss returned float; it has to return a tensor"),
        ({"loss": lambda model, batch: outputs(model, batch)[:0]}, "at step 0 the loss is nan"),
        ({"loss": lambda model, batch: squares(model, batch).detach()}, "does not depend on any parameter"),
        ({"loss": lambda model, batch: squares(model, batch) / 0.0}, "at step 0 the loss is inf"),
        ({"validate": lambda model: math.nan}, "validate returned nan before the first step"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_what_cannot_be_trained_is_refused_and_the_model_stays(settings, message):
    model = tagger()
    before = state_of(model)
    arguments = {"batches": some_batches(), "loss": squares, "steps": 9, **settings}
    with pytest.raises(SlimLSTMError, match=message):
        sl.finetune(model, **arguments)
    if "epoch 2" not in message:
        assert_state(model, before)


def test_after_a_loss_that_is_not_finite_the_model_has_the_best_weights():
    model, states = tagger(), []

    def loss(model, batch):
        value = squares(model, batch)
        return value * math.nan if len(states) == 3 else value

    def validate(model):
        states.append(state_of(model))
        return [3.0, 1.0, 2.0][len(states) - 1]

    with pytest.raises(SlimLSTMError, match=r"at step 8 the loss is nan .* lower lr than 0\.1"):
        sl.finetune(model, some_batches(), loss, steps=40, lr=0.1, validate=validate)
    assert_state(model, states[1])


def test_a_model_without_parameters_is_refused():
    with pytest.raises(SlimLSTMError, match="no parameter to train"):
        sl.finetune(nn.Tanh(), some_batches(), squares, steps=1)
