"""``compress_`` with the calibrated methods: what they lose, what they may take, what they refuse, on strangers' models."""

import json

import pytest
import torch
from helpers import EXACT, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from strangers import IN, STRANGERS, B, First, H, LanguageModel, Stranger, T, V
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from slimlstm import LowRank, Plan, Prune, Quantize, Report, SlimLSTMError, compress_, find_sites, load, save
from slimlstm.calibration.collect import calibrate, mean_loss
from slimlstm.calibration.moments import Calibration, Moments
from slimlstm.methods import WeightedSVD
from slimlstm.modules.hosts import find_hosts
from slimlstm.pipeline.plan import SitePlan

WEIGHTED = {
    "activation, rank": LowRank("activation", rank=2),
    "activation, keep": LowRank("activation", keep=0.6),
    "activation, energy": LowRank("activation", energy=0.8),
    "fisher, rank": LowRank("fisher", rank=2),
    "fisher, keep": LowRank("fisher", keep=0.6),
    "fisher, uniform": LowRank("fisher", keep=0.6, allocation="uniform"),
    "fisher, energy": LowRank("fisher", energy=0.8),
    "fisher, ih only": LowRank("fisher", keep=0.6, target="ih"),
}
every_stranger = pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
every_config = pytest.mark.parametrize("config", WEIGHTED.values(), ids=WEIGHTED)
both_methods = pytest.mark.parametrize("method", ["activation", "fisher"])


def losses_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Towards labels that go round."""
    logits = model(*batch).flatten(0, -2)
    return cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1], reduction="none")


def batches_of(stranger: Stranger, count: int = 2) -> list[tuple[Tensor, ...]]:
    torch.manual_seed(2)
    return [stranger.inputs() for _ in range(count)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {site.key: host.matrix(site.name).clone() for host in find_hosts(model) for site in host.sites()}


def best(matrix: Tensor, rank: int, moments: Moments, method: str) -> Tensor:
    """R_G⁻¹ [R_G W R_A]_r R_A⁻¹ by symmetric roots and an SVD, with both moments damped so that the roots have inverses."""
    g = moments.gradients if method == "fisher" else torch.eye(len(matrix), dtype=torch.float64)
    # That of the inputs is what WeightedSVD says; that of the gradients only has to vanish.
    left, left_inverse = roots(g, 1e-12)
    right, right_inverse = roots(moments.inputs, 1e-3)
    u, s, v = torch.linalg.svd(left @ matrix @ right, full_matrices=False)
    return left_inverse @ (u[:, :rank] * s[:rank]) @ v[:rank] @ right_inverse


def roots(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment + damping * moment.diagonal().mean() * torch.eye(len(moment)))
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T


@every_stranger
@every_config
def test_the_calibrated_methods_from_batches_to_a_folder(stranger, config, tmp_path):
    model, dense, batches = stranger.make().train(), stranger.make(), batches_of(stranger)
    report = compress_(model, config, batches=batches, loss=losses_of)
    assert model.training
    assert {site.method for site in report.sites} <= {config.method, "dense"}
    assert any(site.method == config.method for site in report.sites)
    assert stranger.call(model).isfinite().all()
    # Losses are those of the models themselves.
    assert report.loss_before == pytest.approx(mean_loss(dense, batches, losses_of), rel=1e-9)
    assert report.loss_after == pytest.approx(mean_loss(model, batches, losses_of), rel=1e-9)
    assert report.measured_rise == report.loss_after - report.loss_before
    assert report.predicted_rise == pytest.approx(sum(site.predicted_rise for site in report.sites))
    assert report.predicted_rise > 0.0
    assert "loss on the calibration batches: predicted +" in str(report)
    assert Report.from_dict(json.loads(report.to_json())) == report
    save(model, tmp_path / "small")
    loaded = load(tmp_path / "small", stranger.make(seed=2))
    assert_same(dict(loaded.state_dict()), state_of(model), rtol=0.0, atol=0.0)
    assert torch.equal(stranger.call(loaded), stranger.call(model))


@pytest.mark.parametrize("name", ["CRNN", "projected", "cell", "shared", "parametrized"])
@both_methods
def test_factors_and_predictions_are_those_of_the_moments(name, method):
    """Each matrix is the best in its metric, and what is predicted is ½ tr(Δᵀ G Δ A) rows / predictions."""
    model, dense, batches = STRANGERS[name].make(), STRANGERS[name].make(), batches_of(STRANGERS[name], 40)
    calibration = calibrate(dense, batches, losses_of)
    report = compress_(model, LowRank(method, rank=2), calibration=calibration)
    before, after = matrices(dense), matrices(model)
    for site in report.sites:
        moments, difference = calibration.sites[site.key], before[site.key] - after[site.key]
        torch.testing.assert_close(after[site.key], best(before[site.key], 2, moments, method), rtol=1e-4, atol=1e-6)
        loss = 0.5 * float(torch.trace(difference.T @ moments.gradients @ difference @ moments.inputs))
        assert site.predicted_rise == pytest.approx(loss * moments.rows / calibration.predictions, rel=1e-9)


def test_what_is_predicted_comes_true_where_little_is_lost():
    """With as many drawn labels as it takes, rises of the loss are predicted within a fifth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(IN, H), First(), nn.Linear(H, V)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    x = torch.randn(T, 4000, IN, dtype=torch.float64)
    labels = Categorical(logits=model(x)).sample()

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(m(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none")

    for config in (LowRank("fisher", rank=5, target="hh"), LowRank("fisher", rank=4, target="ih")):
        small = nn.Sequential(nn.LSTM(IN, H), First(), nn.Linear(H, V)).double()
        small.load_state_dict(model.state_dict())
        report = compress_(small, config, batches=[(x, labels)], loss=loss)
        # A finite sample has a gradient of its own, which draws of the same labels share.
        assert report.measured_rise == pytest.approx(report.predicted_rise, rel=0.2, abs=3e-4)
        assert "apart" not in report.loss_note


def total_loss(report: Report) -> float:
    return sum(site.predicted_rise for site in report.sites)


@every_stranger
@pytest.mark.parametrize("keep", [0.4, 0.6])
@pytest.mark.slow
def test_global_allocation_is_predicted_to_lose_no_more_than_uniform(stranger, keep):
    """With as many parameters, up to the last rank that a uniform allocation leaves over."""
    dense, batches = stranger.make(), batches_of(stranger, 8)
    calibration = calibrate(dense, batches, losses_of)
    uniform, shared = (
        compress_(stranger.make(), LowRank("fisher", keep=keep, allocation=allocation), calibration=calibration)
        for allocation in ("uniform", "global")
    )
    budget = keep * sum(m * n for m, n in stranger.sites.values())
    assert sum(site.parameters_after for site in shared.sites) <= budget * (1 + 1e-9)
    assert total_loss(shared) <= total_loss(uniform) * (1 + 1e-9)


@pytest.mark.parametrize("method", ["svd", "activation", "fisher"])
def test_energy_is_the_share_of_the_loss_that_is_kept_away(method):
    """Each rank is the lowest with Σ_{i>r} ℓ_i ≤ (1 - energy) Σ ℓ_i, and stays dense above break-even."""
    stranger, energy = STRANGERS["seq2seq"], 0.7
    dense, batches = stranger.make(), batches_of(stranger, 4)
    calibration = calibrate(dense, batches, losses_of)
    report = compress_(stranger.make(), LowRank(method, energy=energy), calibration=calibration)
    before = matrices(dense)
    for site in report.sites:
        moments, matrix = calibration.sites[site.key], before[site.key]
        eye = torch.eye(len(matrix), dtype=torch.float64)
        a = torch.eye(matrix.shape[1], dtype=torch.float64) if method == "svd" else moments.inputs
        losses = WeightedSVD(matrix, a, moments.gradients if method == "fisher" else eye).losses
        enough = [r for r in range(1, len(losses) + 1) if losses[r:].sum() <= (1 - energy) * losses.sum()]
        assert site.rank == (enough[0] if enough[0] < site.break_even_rank else None)
    assert any(site.rank is not None for site in report.sites)


@pytest.mark.parametrize("storage", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("method", ["svd", "activation", "fisher"])
@settings(max_examples=settings.default.max_examples // 5)
@given(st.data())
def test_bytes_are_a_budget_that_is_kept(storage, method, data):
    stranger = STRANGERS["tagger"]
    model = stranger.make().float()
    batches = batches_of(stranger)
    whole = sum(4 * m * n for m, n in stranger.sites.values())
    budget = data.draw(st.integers(whole // 4, whole))
    report = compress_(model, LowRank(method, bytes=budget, storage=storage), batches=batches, loss=losses_of)
    taken = sum(site.bytes_after for site in report.sites)
    assert taken <= budget
    # What is left would not pay for one more rank of every matrix.
    assert taken > budget - sum(4 * sum(shape) for shape in stranger.sites.values()) or all(
        site.rank is None or site.rank + 1 >= site.break_even_rank for site in report.sites
    )
    parts = [host.lstm.stored_parts(s.name) for host in find_hosts(model) for s in host.sites() if s.storage is not None]
    assert bool(parts) is (storage is not None)


def test_a_matrix_that_is_used_more_often_gets_more_ranks():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rarely, self.often = nn.LSTM(IN, H, dtype=torch.float64), nn.LSTM(IN, H, dtype=torch.float64)
            self.often.load_state_dict(self.rarely.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.rarely(x)[0], self.often(x.repeat(1, 50, 1))[0]], dim=1)

    config = LowRank("fisher", keep=0.5, target="hh")
    batches = [(torch.randn(T, B, IN, dtype=torch.float64),)]
    rarely, often = compress_(Two(), config, batches=batches, loss=losses_of).sites
    assert rarely.predicted_rise > 0.0
    assert often.parameters_after >= rarely.parameters_after + 2 * sum(rarely.shape)


def test_int8_buys_more_ranks_for_the_same_bytes():
    stranger, plans = STRANGERS["tagger"], []
    for storage in (None, "int8"):
        config = LowRank("fisher", bytes=4000, storage=storage)
        report = compress_(stranger.make().float(), config, batches=batches_of(stranger), loss=losses_of)
        plans.append(sum(min(site.shape) if site.rank is None else site.rank for site in report.sites))
    assert plans[1] > plans[0]


@every_stranger
@every_config
@pytest.mark.slow
def test_a_plan_does_the_same_again(stranger, config):
    model, other, batches = stranger.make(), stranger.make(), batches_of(stranger)
    calibration = calibrate(model, batches, losses_of)
    report = compress_(model, config, calibration=calibration)
    plan = Plan.from_dict(json.loads(json.dumps(report.plan.to_dict())))
    assert compress_(other, plan, calibration=calibration) == report
    assert_same(state_of(other), state_of(model), rtol=0.0, atol=0.0)


def test_a_saved_calibration_does_what_a_new_one_does(tmp_path):
    stranger = STRANGERS["seq2seq"]
    batches, models = batches_of(stranger), [stranger.make() for _ in range(3)]
    calibrate(models[0], batches, losses_of).save(tmp_path / "calibration")
    compress_(models[0], LowRank("fisher", keep=0.5), calibration=Calibration.load(tmp_path / "calibration"))
    compress_(models[1], LowRank("fisher", keep=0.5), batches=batches, loss=losses_of, refit=0)
    compress_(models[2], LowRank("fisher", keep=0.5), batches=iter(batches), loss=losses_of)
    for other in models[1:]:
        assert_same(state_of(other), state_of(models[0]), rtol=0.0, atol=0.0)


def test_tied_matrices_get_one_pair_of_factors_from_what_both_see():
    model, dense, batches = STRANGERS["tied"].make(), STRANGERS["tied"].make(), batches_of(STRANGERS["tied"])
    calibration = calibrate(dense, batches, losses_of)
    keys = ["first.weight_hh_l0", "second.weight_hh_l0"]
    first, second = (calibration.sites[key] for key in keys)
    report = compress_(model, LowRank("fisher", rank=2, target="hh"), calibration=calibration)
    assert model.first.weight_hh_l0_u is model.second.weight_hh_l0_u
    assert model.first.weight_hh_l0_v is model.second.weight_hh_l0_v
    assert first.rows == second.rows
    factors = WeightedSVD(
        dense.first.weight_hh_l0, (first.inputs + second.inputs) / 2, (first.gradients + second.gradients) / 2
    ).factors(2)
    merged = factors.u @ factors.v
    torch.testing.assert_close(model.first.weight_hh_l0_u @ model.first.weight_hh_l0_v, merged, **EXACT)
    difference = dense.first.weight_hh_l0.detach() - merged
    rises = [calibration.sites[key].loss_of(difference) * first.rows / calibration.predictions for key in keys]
    assert [site.predicted_rise for site in report.sites] == pytest.approx(rises, rel=1e-9)


def test_merged_moments_count_every_row_once():
    one, other = Moments(torch.eye(2), torch.eye(3), 1), Moments(5 * torch.eye(2), 9 * torch.eye(3), 3)
    both = Moments.together([one, other])
    torch.testing.assert_close(both.inputs, 4 * torch.eye(2))
    torch.testing.assert_close(both.gradients, 7 * torch.eye(3))
    assert both.rows == 4
    assert Moments.together([one, Moments(torch.eye(2), None, 1)]).gradients is None


ANY_CONFIG = {
    "svd": LowRank(rank=2),
    "prune": Prune(keep=0.5),
    "int8": Quantize("int8"),
    "pruned plan": Plan({"lstm.weight_hh_l0": SitePlan("prune", nonzeros=50, storage="bfloat16")}),
}


@pytest.mark.parametrize("config", ANY_CONFIG.values(), ids=ANY_CONFIG)
def test_losses_are_predicted_and_measured_for_every_config(config):
    stranger = STRANGERS["tagger"]
    model, dense, batches = stranger.make().float(), stranger.make().float(), batches_of(stranger)
    report = compress_(model, config, batches=batches, loss=losses_of)
    calibration, before, after = calibrate(dense, batches, losses_of), matrices(dense), matrices(model)
    for site in report.sites:
        moments = calibration.sites[site.key]
        expected = moments.loss_of(before[site.key].double() - after[site.key].double()) * moments.rows
        assert site.predicted_rise == pytest.approx(expected / calibration.predictions, rel=1e-3)
        assert site.predicted_rise > 0.0
    assert report.loss_after == pytest.approx(mean_loss(model, batches, losses_of), rel=1e-5)


def test_where_nothing_changes_nothing_is_predicted_and_both_agree():
    stranger = STRANGERS["tagger"]
    report = compress_(stranger.make().float(), LowRank(rank=11), batches=batches_of(stranger), loss=losses_of)
    assert {site.method for site in report.sites} == {"dense"}
    assert report.predicted_rise == 0.0
    assert "apart" not in report.loss_note


def test_a_loss_that_is_far_from_its_prediction_is_said_to_be():
    stranger = STRANGERS["tagger"]
    model = stranger.make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    report = compress_(model, LowRank(rank=1), batches=batches_of(stranger), loss=losses_of)
    assert not 0.5 <= report.measured_rise / report.predicted_rise <= 2.0
    assert "these differ: the prediction ranks plans here, but does not measure the loss" in report.loss_note


def test_losses_before_and_after_are_on_the_batches_given():
    """Also where the model was calibrated on others before."""
    stranger = STRANGERS["tagger"]
    model, batches = stranger.make(), batches_of(stranger)
    calibration = calibrate(model, [stranger.inputs()], lambda m, batch: 10 * losses_of(m, batch))
    before = mean_loss(model, batches, losses_of)
    report = compress_(model, LowRank("fisher", rank=2), calibration=calibration, batches=batches, loss=losses_of)
    assert (report.loss_before, report.loss_after) == (before, mean_loss(model, batches, losses_of))


def test_what_cannot_be_measured_is_not_reported():
    """Generators are used up, labels drawn from two models are no measure of either, a mean has no scale."""
    stranger = STRANGERS["tagger"]
    batches = batches_of(stranger)

    def drawn(m: nn.Module, batch: tuple[Tensor, ...]) -> Categorical:
        return Categorical(logits=m(*batch))

    def mean(m: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return losses_of(m, batch).mean()

    cases = [(iter(batches), losses_of, True, False), (batches, drawn, True, False), (batches, mean, False, True)]
    for given_batches, loss, predicted, measured in cases:
        report = compress_(stranger.make(), LowRank("fisher", rank=2), batches=given_batches, loss=loss)
        assert (report.predicted_rise is not None) is predicted
        assert (report.measured_rise is not None) is measured
        assert (report.loss_before is None) is (report.loss_after is None) is (not measured)


@pytest.mark.filterwarnings("ignore::Warning:torch", "ignore:torch.ao:DeprecationWarning")
def test_an_lstm_that_cannot_be_compressed_does_not_stand_in_the_way():
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(V, H), First()), {nn.LSTM})
    model = nn.Sequential(LanguageModel(nn.LSTM(IN, H)), packed, nn.Linear(H, V))
    config = LowRank("activation", rank=2, filter=lambda site: site.problem is None)
    report = compress_(model, config, batches=[torch.randint(V, (T, B))])
    assert [site.method for site in report.sites] == ["activation", "activation"]


STRANGER = STRANGERS["shared"]
BATCHES = batches_of(STRANGER)
UNREACHED = {"batches": BATCHES, "loss": lambda m, batch: m.left(*batch)[0]}


def of_another() -> dict[str, object]:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.LSTM(IN, H, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x)[0]

    return {"calibration": calibrate(Other(), BATCHES, losses_of)}


REFUSED = {
    "no batches": (
        lambda: LowRank("activation", rank=2),
        dict,
        "'activation' has to see data; give batches=, or",
    ),
    "no batches, fisher": (lambda: LowRank("fisher", keep=0.5), dict, "give batches= and loss=, or calibration="),
    "no batches, plan": (lambda: Plan({"left.weight_hh_l0": SitePlan("fisher", 2)}), dict, "'fisher' has to see data"),
    "no loss": (
        lambda: LowRank("fisher", rank=2),
        lambda: {"batches": BATCHES},
        "'fisher' needs a loss, and compress_ got none",
    ),
    "no loss, keep": (lambda: LowRank("fisher", keep=0.5), lambda: {"batches": BATCHES}, "'fisher' needs a loss"),
    "no batch": (lambda: LowRank("fisher", rank=2), lambda: {"batches": [], "loss": losses_of}, "no batch was given"),
    "not reached": (lambda: LowRank("fisher", rank=2), lambda: UNREACHED, "no batch reached towers.0.weight_ih_l0, or no"),
    "not reached, keep": (lambda: LowRank("fisher", keep=0.5), lambda: UNREACHED, "no batch reached towers.0.weight_ih_l0"),
    "another model's": (lambda: LowRank(rank=2), of_another, "left.weight_ih_l0 had another shape when .* calibrate this"),
    "global semi-nmf": (lambda: LowRank("semi-nmf", keep=0.5, allocation="global"), dict, "semi-nmf has no spectrum"),
    "semi-nmf bytes": (lambda: LowRank("semi-nmf", bytes=500), dict, "semi-nmf has no spectrum to choose ranks from"),
    "two amounts": (lambda: LowRank("fisher", keep=0.5, bytes=500), dict, "not keep, bytes"),
    "three amounts": (lambda: LowRank("fisher", rank=2, keep=0.5, energy=0.5), dict, "not rank, keep, energy"),
    "global rank": (lambda: LowRank("fisher", rank=2, allocation="global"), dict, "rank is the same for every matrix"),
    "global energy": (lambda: LowRank(energy=0.5, allocation="global"), dict, "energy is the same for every matrix"),
    "uniform bytes": (lambda: LowRank(bytes=500, allocation="uniform"), dict, "bytes are one budget for all matrices"),
    "allocation": (lambda: LowRank(keep=0.5, allocation="greedy"), dict, "'uniform' or 'global', not 'greedy'"),
    "energy 0": (lambda: LowRank(energy=0.0), dict, r"energy is a fraction in \(0, 1\], not 0\.0"),
    "energy a bool": (lambda: LowRank(energy=True), dict, r"energy is a fraction in \(0, 1\], not True"),
    "energy text": (lambda: LowRank(energy="much"), dict, r"energy is a fraction in \(0, 1\], not 'much'"),
    "bytes 0": (lambda: LowRank(bytes=0), dict, "bytes is an int of at least 1, not 0"),
    "bytes a float": (lambda: LowRank(bytes=1e3), dict, r"bytes is an int of at least 1, not 1000\.0"),
    "few bytes": (lambda: LowRank(bytes=10), dict, "a budget of 10 is too small for rank 1 at every matrix, which takes"),
    "little kept": (lambda: LowRank("svd", keep=0.001, allocation="global"), dict, "too small for rank 1 at every matrix"),
    "failing loss": (
        lambda: LowRank("fisher", rank=2),
        lambda: {"batches": BATCHES, "loss": lambda m, batch: None},
        "the loss returned NoneType",
    ),
}


@pytest.mark.parametrize(("config", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_changed(config, given, message):
    model = STRANGER.make().train()
    before, modules = state_of(model), [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(SlimLSTMError, match=message):
        compress_(model, config(), **given())
    assert_same(state_of(model), before, rtol=0.0, atol=0.0)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert all(module.training and "forward" not in vars(module) for module in model.modules())


@both_methods
@pytest.mark.parametrize("amount", [{"rank": 2}, {"keep": 0.5}, {"energy": 0.9}], ids=str)
def test_nan_is_refused_with_the_name_of_the_matrix(method, amount):
    model = STRANGERS["tagger"].make()
    calibration = calibrate(model, batches_of(STRANGERS["tagger"]), losses_of)
    with torch.no_grad():
        model.lstm.weight_hh_l1[0, 0] = torch.nan
    with pytest.raises(SlimLSTMError, match=r"lstm\.weight_hh_l1: the matrix holds 1 NaN"):
        compress_(model, LowRank(method, **amount), calibration=calibration)
    assert all(site.rank is None for site in find_sites(model))


def test_a_share_that_a_rank_meets_exactly_is_met_globally_too():
    """As keep · m n may be rounded below r (m + n)."""
    for m, n, rank in [(12, 23, 7), (12, 30, 6), (16, 25, 5)]:
        model, keep = nn.Sequential(nn.LSTM(n, m // 4)), rank * (m + n) / (m * n)
        assert keep * (m * n) < rank * (m + n)
        (site,) = compress_(model, LowRank(keep=keep, target="ih", allocation="global")).sites
        assert site.rank == rank


@pytest.mark.parametrize(
    ("inputs", "keep", "reason"),
    [
        (1, 0.9, "rank 1 is not below break-even"),
        (16, 1.0, "stays whole, because other matrices lose less at the same cost"),
    ],
)
def test_a_matrix_that_stays_whole_says_why(inputs, keep, reason):
    """Factors of a 64 x 1 matrix are never smaller; factors of a 64 x 16 matrix would be, but all of it fits."""
    model = nn.Sequential(nn.LSTM(inputs, 16))
    found = compress_(model, LowRank(keep=keep, allocation="global")).sites
    (site,) = (site for site in found if site.key == "0.weight_ih_l0")
    assert (site.rank, site.note) == (None, reason)


def test_a_missing_loss_is_told_before_any_batch_runs():
    def batches():
        raise AssertionError("nothing has to run")
        yield

    with pytest.raises(SlimLSTMError, match="give it loss= beside batches="):
        compress_(nn.ModuleList([nn.LSTM(3, 4)]), LowRank("fisher", keep=0.5), batches=batches())


def test_a_budget_that_is_too_small_is_told_as_it_was_given():
    model = nn.ModuleList([nn.LSTM(8, 8)])
    with pytest.raises(SlimLSTMError, match="a budget of 300 is too small"):
        compress_(model, LowRank(bytes=300, storage="int8"))
