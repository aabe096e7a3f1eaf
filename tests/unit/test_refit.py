"""Factors are fitted again once the whole model is compressed."""

import pytest
import torch
from strangers import IN, STRANGERS, B, H, T, V
from test_fisher import batches_of, every_stranger, losses_of, matrices, state_of
from torch import nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from slimlstm import LowRank, SlimLSTMError, calibrate, compress_
from slimlstm.calibration.module_observer import ModuleObserver
from slimlstm.calibration.refit import fit_to_new_inputs
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig
from slimlstm.methods import MOMENT_DAMPING
from slimlstm.modules.hosts import find_hosts
from slimlstm.pipeline.fitting import PASSES


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.lstm = nn.LSTM(IN, H).double()

    def forward(self, x):
        return self.lstm(x)[0]


class NextWords:
    """Losses of the pieces of a text, with a state that is carried from piece to piece."""

    state = None

    def __call__(self, model, batch):
        start, piece = batch
        logits, state = model(piece[:-1], self.state if start else None)
        self.state = [(h.detach(), c.detach()) for h, c in state]
        return cross_entropy(logits.flatten(0, 1), piece[1:].flatten(), reduction="none")

    def state_dict(self):
        return {"state": self.state}

    def load_state_dict(self, state):
        self.state = state["state"]


class UntilSure(nn.Module):
    """Steps until its state is large enough, which depends on the weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.LSTMCell(IN, H).double()

    def forward(self, x):
        state = None
        for _ in range(50):
            state = self.cell(x, state)
            if float(state[0].detach().norm()) > 0.999 * self.limit(x):
                break
        return state[0]

    def limit(self, x):
        return 1.8


def recorded(targets):
    """Return solvers that record their arguments and return the weight unchanged."""

    def solver(key, weight):
        def solve(fitted, moment):
            targets[key] = fitted, moment
            return weight

        return solve

    return solver


@every_stranger
def test_without_a_loss_of_quality_every_matrix_is_fitted_to_itself(stranger):
    model, batches, targets = stranger.make(), batches_of(stranger), {}
    solver = recorded(targets)
    hosts = [host for host in find_hosts(model) if host.problem is None]
    solvers = {key: solver(key, weight) for key, weight in matrices(model).items()}
    fit_to_new_inputs(ModuleObserver(model, hosts, batches, losses_of), matrices(model), {}, solvers, 1)
    assert targets.keys() == matrices(model).keys()
    for key, weight in matrices(model).items():
        torch.testing.assert_close(targets[key][0], weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("index", [0, 1], ids=["ih", "hh"])
def test_a_matrix_becomes_the_ridge_regression_of_its_part_of_the_dense_gates(index):
    model, targets, x = OneLayer(), {}, torch.randn(T, B, IN, dtype=torch.float64)
    dense = matrices(model)
    keys = "lstm.weight_ih_l0", "lstm.weight_hh_l0"
    poorer = {key: weight + 0.3 * torch.randn_like(weight) for key, weight in dense.items()}
    solvers = {keys[index]: recorded(targets)(keys[index], poorer[keys[index]])}
    fit_to_new_inputs(ModuleObserver(model, find_hosts(model), [(x,)], None), dense, poorer, solvers, 1)
    z = [x.flatten(0, 1), states_before(model, x)]
    with torch.no_grad():
        for name, weight in poorer.items():
            model.lstm.get_parameter(name.removeprefix("lstm.")).copy_(weight)
    own, other = [x.flatten(0, 1), states_before(model, x)][index], [x.flatten(0, 1), states_before(model, x)][1 - index]
    wanted = z[0] @ dense[keys[0]].T + z[1] @ dense[keys[1]].T - other @ poorer[keys[1 - index]].T
    fitted, moment = targets[keys[index]]
    strength = (MOMENT_DAMPING + own.shape[1] / len(own)) * float((own**2).mean())
    # The ridge is more rows: of inputs √(λ N) I, whose outputs should be those of W.
    extra = (strength * len(own)) ** 0.5 * torch.eye(own.shape[1], dtype=torch.float64)
    rows, outputs = torch.cat([own, extra]), torch.cat([wanted, extra @ dense[keys[index]].T])
    torch.testing.assert_close(fitted, torch.linalg.lstsq(rows, outputs).solution.T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moment, rows.T @ rows / len(own), rtol=1e-8, atol=1e-8)


def states_before(model, x):
    with torch.no_grad():
        outputs = model(x)
    return torch.cat([torch.zeros_like(outputs[:1]), outputs[:-1]]).flatten(0, 1)


@pytest.mark.slow
def test_outputs_come_closer_to_those_of_the_dense_model():
    stranger = STRANGERS["CRNN"]
    dense, batches = stranger.make(), batches_of(stranger, 40)
    models = {refits: stranger.make() for refits in (0, PASSES)}
    for refits, model in models.items():
        compress_(model, LowRank("activation", rank=2), batches=batches, refit=refits)
    assert distance(models[PASSES], dense, batches) < distance(models[0], dense, batches)


def distance(model, dense, batches):
    with torch.no_grad():
        return sum(float((model.eval()(*batch) - dense.eval()(*batch)).norm()) for batch in batches)


def test_factors_that_lose_more_are_discarded(monkeypatch):
    stranger = STRANGERS["seq2seq"]
    dense, models, batches = stranger.make(), [stranger.make() for _ in range(2)], batches_of(stranger)

    def loss(model, batch):
        return (model(*batch) - dense(*batch) - 0.01).square()

    compress_(models[0], LowRank("fisher", keep=0.5), batches=batches, loss=loss, refit=0)
    worse = lambda self, dense, now, index: (30 * dense[index].flip(0), torch.eye(dense[index].shape[1]).double())  # noqa: E731
    monkeypatch.setattr("slimlstm.calibration.refit.PairedMoments.regression", worse)
    report = compress_(models[1], LowRank("fisher", keep=0.5), batches=batches, loss=loss)
    discarded = "factors were fitted again to their new inputs, but the loss was higher, so they stay as they were"
    assert report.notes[-1] == discarded
    for name, value in state_of(models[0]).items():
        assert value.equal(state_of(models[1])[name])


@pytest.mark.parametrize("held_out", [5, 100], ids=["the last fifth", "none"])
def test_held_out_batches_decide(held_out, monkeypatch):
    """All but the last fifth show one direction of the inputs, so factors fitted to them fail on the others."""
    monkeypatch.setattr("slimlstm.calibration.held_out._HELD_OUT", held_out)
    batches = [torch.randn(T, B, IN, dtype=torch.float64) for _ in range(10)]
    for x in batches[:8]:
        x[..., 1:] = 0.0
    dense = OneLayer().eval()

    def loss(model, x):
        counts = 1e-3 if x[..., 1:].any() else 1.0
        return counts * (model(x) - dense(x).detach() - 0.01).square()

    model = nn.Sequential(OneLayer())
    report = compress_(model, LowRank("fisher", rank=1, target="both"), batches=batches, loss=loss)
    stays = any("the loss was higher, so they stay" in note for note in report.notes)
    assert stays == (held_out == 5), report.notes


def test_the_divergence_from_the_dense_models_predictions_counts_where_labels_are_drawn():
    stranger = STRANGERS["CRNN"]
    model, batches, seen = stranger.make(), batches_of(stranger, 5), []

    def loss(model, batch):
        seen.append(1)
        return Categorical(logits=model(*batch))

    calibrate(model, batches, loss)
    # So few rows are drawn more than once.
    calls = len(seen)
    assert calls in range(5, 5 * 8 + 1, 5)
    seen.clear()
    report = compress_(model, LowRank("fisher", keep=0.5), batches=batches, loss=loss)
    # Calibration, then twice both models, and both once more on the last fifth to see what the last factors lose; the
    # report asks once, and learns that the loss is a distribution.
    assert len(seen) == calls + 5 * 2 * PASSES + 2 * 1 + 1
    assert any("fitted" in note for note in report.notes)


def test_by_default_factors_of_calibrated_methods_are_fitted_again():
    stranger = STRANGERS["seq2seq"]
    models, batches = [stranger.make() for _ in range(2)], batches_of(stranger)
    for model, passes in zip(models, (None, PASSES), strict=True):
        compress_(model, LowRank("fisher", keep=0.5), batches=batches, loss=losses_of, refit=passes)
    for name, value in state_of(models[0]).items():
        assert value.equal(state_of(models[1])[name])
    report = compress_(stranger.make(), LowRank("svd", keep=0.5), batches=batches, loss=losses_of)
    assert "fitted" not in str(report)


def test_a_loss_may_carry_a_state_for_either_model():
    def model():
        torch.manual_seed(5)
        return AWDLSTM(AWDLSTMConfig(V, IN, H)).double()

    torch.manual_seed(6)
    text = torch.randint(V, (25, B))
    pieces = [(start, text[start : start + 9]) for start in range(0, 24, 8)]
    at_once, in_pieces = model(), model()
    compress_(at_once, LowRank("activation", rank=2), batches=[(0, text)], loss=NextWords())
    compress_(in_pieces, LowRank("activation", rank=2), batches=pieces, loss=NextWords())
    for name, value in state_of(at_once).items():
        torch.testing.assert_close(state_of(in_pieces)[name], value, rtol=1e-7, atol=1e-9)


def test_rows_that_no_loss_depends_on_do_not_count():
    stranger, x = OneLayer, torch.randn(T, B, IN, dtype=torch.float64)
    found = []
    for rubbish in (0.0, 50.0):
        padded = torch.cat([x, rubbish * torch.randn(3, B, IN, dtype=torch.float64)])
        model = stranger()
        compress_(model, LowRank("fisher", rank=2), batches=[padded], loss=lambda model, x: model(x)[:T].square())
        found.append(state_of(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "batches", "problem"),
    [
        (LowRank("fisher", keep=0.5), iter, "more than once"),
        (LowRank("svd", keep=0.5), list, "by a calibrated method"),
    ],
    ids=["an iterator", "svd"],
)
def test_refit_is_refused_before_anything_changes(config, batches, problem):
    stranger = STRANGERS["seq2seq"]
    model, made = stranger.make(), batches_of(stranger)
    before = state_of(model)
    with pytest.raises(SlimLSTMError, match=problem):
        compress_(model, config, batches=batches(made), loss=losses_of, refit=2)
    assert state_of(model).keys() == before.keys()
    if config.method == "fisher":
        report = compress_(model, config, batches=batches(made), loss=losses_of)
        (note,) = report.notes
        assert note == f"factors were not fitted again to their new inputs: it takes batches that can be iterated {problem}"


def test_a_model_that_takes_another_path_when_it_is_compressed(monkeypatch):
    model, batches = UntilSure(), [torch.randn(B, IN, dtype=torch.float64)]
    limit = [float(model(batches[0]).detach().norm())]
    monkeypatch.setattr(UntilSure, "limit", lambda self, x: limit[0])
    config = LowRank("fisher", rank=1)
    loss = lambda model, x: model(x).square()  # noqa: E731
    before = state_of(model)
    with pytest.raises(SlimLSTMError, match="the number of steps that an LSTM takes depends on its weights"):
        compress_(model, config, batches=batches, loss=loss, refit=1)
    assert all(value.equal(before[name]) for name, value in state_of(model).items())
    *_, note = compress_(model, config, batches=batches, loss=loss).notes
    assert "takes depends on its weights" in note
