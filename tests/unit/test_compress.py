"""``compress_`` on strangers' models: what is computed afterwards, what is reported, what stays, and what is refused.

m x n a matrix W, r a rank, U [m, r] and V [r, n] its factors.
"""

import json
import math
import operator
from copy import deepcopy

import numpy as np
import pytest
import torch
from helpers import EXACT, assert_same
from strangers import IN, STRANGERS, B, H, LanguageModel, Stranger, T, V, WeightDrop
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize

from slimlstm import (
    LowRank,
    LowRankLSTM,
    LowRankLSTMCell,
    Plan,
    Prune,
    Quantize,
    Report,
    SlimLSTMError,
    compress_,
    find_sites,
    load,
    save,
)
from slimlstm.modules.hosts import find_hosts
from slimlstm.pipeline.plan import SitePlan

AMOUNTS = {
    "svd": lambda target: LowRank("svd", rank=2, target=target),
    "svd, keep": lambda target: LowRank("svd", keep=0.5, target=target),
    "semi-nmf": lambda target: LowRank("semi-nmf", rank=2, target=target),
    "prune": lambda target: Prune(rank=2, target=target),
    "prune, keep": lambda target: Prune(keep=0.3, target=target),
}
every_stranger = pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
every_target = pytest.mark.parametrize("target", ["hh", "ih", "both"])
one_of_each = pytest.mark.parametrize(
    "config", [AMOUNTS["svd"], AMOUNTS["semi-nmf"], AMOUNTS["prune"]], ids=["svd", "semi-nmf", "prune"]
)
every_config = pytest.mark.parametrize("config", AMOUNTS.values(), ids=AMOUNTS)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_same(actual, expected, rtol=0.0, atol=0.0)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """What inference sees of every matrix, read without the library: factors multiplied, drops off."""
    found = {}
    training = {module: module.training for module in model.modules()}
    model.eval()
    for site in find_sites(model):
        owner = model.get_submodule(site.module)
        inner = getattr(owner, "module", owner)
        places = [vars(place)["_parameters"].get(f"{site.name}_raw") for place in (owner, inner)]
        raw = next((place for place in places if place is not None), None)
        if raw is None and site.rank is not None:
            raw = getattr(inner, f"{site.name}_u") @ getattr(inner, f"{site.name}_v")
        found[site.key] = (getattr(inner, site.name) if raw is None else raw).detach().clone()
    for module, mode in training.items():
        module.training = mode
    return found


@torch.no_grad()
def overwrite(model: nn.Module, key: str, matrix: Tensor) -> None:
    """Puts a matrix into a model that was never compressed, wherever its author keeps it."""
    path, _, name = key.rpartition(".")
    owner = model.get_submodule(path)
    inner = getattr(owner, "module", owner)
    for place in (owner, inner):
        if f"{name}_raw" in place._parameters:
            place.get_parameter(f"{name}_raw").copy_(matrix)
            return
    if parametrize.is_parametrized(inner, name):
        parametrize.remove_parametrizations(inner, name)
    getattr(inner, name).copy_(matrix)


def largest(matrix: Tensor, kept: int) -> Tensor:
    """W with all but its ``kept`` entries of largest magnitude at zero."""
    flat = matrix.flatten().clone()
    flat[flat.abs().argsort(descending=True)[kept:]] = 0.0
    return flat.view_as(matrix)


def best(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@every_stranger
@every_target
@every_config
def test_the_model_computes_with_its_new_matrices(stranger, config, target):
    model, dense, config = stranger.make(), stranger.make(), config(target)
    report = compress_(model, config)
    before, after = matrices(dense), matrices(model)
    assert [site.key for site in report.sites] == [key for key in stranger.sites if target in (*key.split("_"), "both")]
    for site in report.sites:
        m, n = site.shape
        amount = config.rank * (m + n) if config.rank else int(config.keep * m * n + 1e-9)
        if site.method == "svd":
            torch.testing.assert_close(after[site.key], best(before[site.key], site.rank), **EXACT)
            assert amount - (m + n) < site.parameters_after == site.rank * (m + n) <= amount
        elif site.method == "prune":
            torch.testing.assert_close(after[site.key], largest(before[site.key], site.parameters_after), **EXACT)
            assert abs(site.parameters_after - amount) <= 1
        else:
            assert (site.method, site.rank) == ("semi-nmf", 2)
            assert int(torch.linalg.matrix_rank(after[site.key])) == 2
        error = (before[site.key] - after[site.key]).norm() / before[site.key].norm()
        assert site.relative_error == pytest.approx(float(error), rel=1e-9)
        assert 0.0 < site.relative_error < 1.0
        overwrite(dense, site.key, after[site.key])
    untouched = before.keys() - {site.key for site in report.sites}
    assert all(torch.equal(after[key], before[key]) for key in untouched)
    torch.testing.assert_close(stranger.call(model), stranger.call(dense), **EXACT)
    torch.testing.assert_close(stranger.call(deepcopy(model)), stranger.call(model), rtol=0, atol=0)


def fine_tune(stranger: Stranger, model: nn.Module, steps: int = 10) -> list[float]:
    """The losses of some steps towards labels that do not change, and that after them."""
    torch.manual_seed(1)
    inputs = stranger.inputs()
    labels = torch.randint(V, stranger.call(model).shape[:-1])
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    model.eval()  # dropout would hide whether ten steps help
    for _ in range(steps + 1):
        loss = cross_entropy(model(*inputs).flatten(0, 1), labels.flatten())
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


@pytest.mark.parametrize("name", ["CRNN", "seq2seq", "tagger"])
@every_config
def test_compressed_models_are_fine_tuned_saved_and_loaded(name, config, tmp_path):
    stranger = STRANGERS[name]
    model = stranger.make()
    compress_(model, config("both"))
    before = matrices(model)
    losses = fine_tune(stranger, model)
    assert all(torch.tensor(losses).isfinite())
    assert losses[-1] < losses[0]
    for site in find_sites(model):
        matrix = matrices(model)[site.key]
        assert not torch.equal(matrix, before[site.key])
        assert site.nonzeros is None or torch.equal(matrix != 0.0, before[site.key] != 0.0)
    for parameter in model.parameters():
        assert parameter.grad is not None
    save(model, tmp_path / "small")
    loaded = load(tmp_path / "small", stranger.make(seed=2))
    assert_equal_bits(loaded.state_dict(), state_of(model))
    assert torch.equal(stranger.call(loaded), stranger.call(model))


@pytest.mark.parametrize("name", ["Merity", "fastai", "parametrized"])
@pytest.mark.parametrize("config", [LowRank(rank=2, target="hh"), Prune(rank=2, target="hh")], ids=["svd", "prune"])
def test_weight_drop_ends_and_all_weights_are_trained_on(name, config):
    stranger = STRANGERS[name]
    model = stranger.make().train()
    report = compress_(model, config)
    (note,) = report.notes
    assert note.startswith("rnn: ")
    assert note in str(report)
    tokens = stranger.inputs()
    assert torch.equal(model(*tokens), model(*tokens))
    assert [key for key, value in model.named_parameters() if not value.requires_grad] == []
    assert not any("_raw" in key or "original1" in key for key in model.state_dict())


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_weight_drop_that_hands_over_the_raw_weight_itself(rate):
    """In evaluation mode, ``dropout`` returns its argument, which thereby becomes a second name of the parameter."""

    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.LSTM(3, 4)
            raw = self.module.weight_hh_l0
            del self.module._parameters["weight_hh_l0"]
            self.module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))

        def forward(self, *inputs):
            self.module.weight_hh_l0 = nn.functional.dropout(self.module.weight_hh_l0_raw, rate, self.training)
            return self.module(*inputs)

    model, x = nn.Sequential(Literal()).eval(), torch.randn(2, 1, 3)
    expected = model(x)[0]
    compress_(model, LowRank(rank=4))
    torch.testing.assert_close(model(x)[0], expected)


def test_a_weight_drop_wrapper_is_asked_without_a_trace():
    class Counting(WeightDrop):
        def __init__(self):
            super().__init__(nn.LSTM(3, 4), 0.5)
            self.register_buffer("calls", torch.zeros(()))
            self.sizes = []

        def forward(self, input, hx=None):
            self.calls += 1
            self.sizes.append(input.shape)
            return super().forward(input, hx)

    model = nn.Sequential(Counting())
    state, weights = torch.random.get_rng_state(), list(model[0].module._flat_weights)
    assert {site.problem for site in find_sites(model)} == {None}
    assert (model[0].calls, model[0].sizes) == (0, [])
    assert all(map(operator.is_, model[0].module._flat_weights, weights))
    assert not hasattr(model[0].module, "weight_hh_l0")
    assert "forward" not in vars(model[0].module)
    assert torch.equal(torch.random.get_rng_state(), state)


@every_stranger
@pytest.mark.parametrize("config", [AMOUNTS["svd, keep"], AMOUNTS["prune, keep"]], ids=["svd", "prune"])
def test_the_report_counts_what_is_there(stranger, config):
    model, config = stranger.make(), config("both")
    before = recount(model)
    report = compress_(model, config)
    assert (report.model.parameters_before, report.model.bytes_before) == before
    assert (report.model.parameters_after, report.model.bytes_after) == recount(model)
    assert report.model.parameters_after < report.model.parameters_before
    rest = report.model.parameters_before - report.lstm.parameters_before
    assert report.model.parameters_after - report.lstm.parameters_after == rest
    assert report.model.bytes_after - report.lstm.bytes_after == 8 * rest
    number = 8 if config.method != "prune" else 9
    for site in report.sites:
        m, n = site.shape
        assert site.shape == stranger.sites[site.key]
        assert site.break_even_rank == pytest.approx(m * n / (m + n))
        assert (site.parameters_before, site.bytes_before) == (m * n, 8 * m * n)
        assert site.bytes_after == number * (m * n if site.rank is None else site.rank * (m + n))
        assert site.parameters_after < site.parameters_before
    assert report.lstm.parameters_before - report.lstm.parameters_after == saved_by(report, stranger)


def recount(model: nn.Module) -> tuple[int, int]:
    """Parameters, without those that masks zero, and bytes, from the state dict; what is stored once counts once."""
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = {state[name].data_ptr(): name for name in state if name in parameters}
    zeroed = {}
    for name, mask in state.items():
        if name.endswith(".0.mask"):
            zeroed[state[name.replace(".0.mask", ".original")].data_ptr()] = int((~mask).sum())
    count = sum(state[name].numel() for name in stored.values()) - sum(zeroed.values())
    masks = {mask.data_ptr(): mask for name, mask in state.items() if name.endswith(".0.mask")}
    return count, sum(state[name].nbytes for name in stored.values()) + sum(mask.nbytes for mask in masks.values())


def saved_by(report: Report, stranger: Stranger) -> int:
    """The parameters that the sites saved; the two matrices of tied LSTMs are one, and weight_norm's scales go too."""
    tied = {"second.weight_hh_l0"} if stranger is STRANGERS["tied"] else set()
    scales = 3 * 4 * H if stranger is STRANGERS["parametrized"] else 0
    return scales + sum(site.parameters_before - site.parameters_after for site in report.sites if site.key not in tied)


@every_stranger
@one_of_each
def test_reports_and_plans_travel_as_json_and_do_the_same_again(stranger, config):
    model, other = stranger.make(), stranger.make()
    report = compress_(model, config("both"))
    assert Report.from_dict(json.loads(report.to_json())) == report
    plan = Plan.from_dict(json.loads(json.dumps(report.plan.to_dict())))
    assert plan == report.plan
    assert compress_(other, plan) == report
    assert_equal_bits(other.state_dict(), state_of(model))
    text = str(report)
    for site in report.sites:
        assert site.key in text
        assert f" {site.parameters_after:,} " in text
        assert f"{site.key}: " in str(plan)
    assert str(report.model) in text
    assert str(report.lstm) in text


def test_an_edited_plan_does_what_it_says():
    stranger = STRANGERS["seq2seq"]
    plan = compress_(stranger.make(), LowRank(rank=2)).plan
    plan.sites["encoder.weight_ih_l0"] = SitePlan("dense")
    plan.sites["decoder.weight_hh_l0"] = SitePlan("semi-nmf", rank=3)
    plan.sites["encoder.weight_hh_l0_reverse"] = SitePlan("prune", nonzeros=7)
    del plan.sites["decoder.weight_ih_l0"]
    model = stranger.make()
    report = compress_(model, plan)
    assert [site.key for site in report.sites] == list(plan.sites)
    sites = {site.key: (site.rank, site.nonzeros) for site in find_sites(model)}
    assert sites == {
        "encoder.weight_ih_l0": (None, None),
        "encoder.weight_hh_l0": (2, None),
        "encoder.weight_ih_l0_reverse": (2, None),
        "encoder.weight_hh_l0_reverse": (None, 7),
        "decoder.weight_ih_l0": (None, None),
        "decoder.weight_hh_l0": (3, None),
    }


@pytest.mark.slow
@every_stranger
def test_nothing_grows(stranger):
    """A rank at or above break-even, (4 H n) / (4 H + n), leaves a matrix as it is, to the bit, and the report says so."""
    for rank in range(1, max(map(min, stranger.sites.values())) + 1):
        model = stranger.make()
        expected, kinds = state_of(model), [type(module) for module in model.modules()]
        report = compress_(model, LowRank(rank=rank))
        assert report.model.parameters_after <= report.model.parameters_before
        assert report.model.bytes_after <= report.model.bytes_before
        for site in report.sites:
            dense = rank >= site.break_even_rank
            assert (site.rank, site.method) == ((None, "dense") if dense else (rank, "svd"))
            assert (site.note == f"rank {rank} is not below break-even") is dense
            assert f"{site.key}: {site.note}" in str(report) or not dense
        if all(site.rank is None for site in report.sites):
            assert_equal_bits(model.state_dict(), expected)
            assert [type(module) for module in model.modules()] == kinds


def test_keeping_all_weights_leaves_a_model_as_it_is():
    model = STRANGERS["tagger"].make()
    expected = state_of(model)
    report = compress_(model, Prune(keep=1.0))
    assert {site.method for site in report.sites} == {"dense"}
    assert all("no more than" in site.note for site in report.sites)
    assert_equal_bits(model.state_dict(), expected)


AGAIN = {
    "hh, then ih": (LowRank(rank=3, target="hh"), LowRank(rank=2, target="ih"), {"hh": (3, None), "ih": (2, None)}),
    "ih masked, then hh": (
        Prune(keep=0.5, target="ih"),
        LowRank(rank=2, target="hh"),
        {"hh": (2, None), "ih": (None, 0.5)},
    ),
    "hh, then ih masked": (
        LowRank(rank=2, target="hh"),
        Prune(keep=0.5, target="ih"),
        {"hh": (2, None), "ih": (None, 0.5)},
    ),
    "masked, then factored": (Prune(keep=0.9), LowRank(rank=2), {"hh": (2, None), "ih": (2, None)}),
    "masked, then fewer": (Prune(keep=0.5), Prune(keep=0.25), {"hh": (None, 0.25), "ih": (None, 0.25)}),
    "lower rank": (LowRank(rank=3), LowRank(rank=2), {"hh": (2, None), "ih": (2, None)}),
    "same rank": (LowRank(rank=2), LowRank("semi-nmf", rank=2), {"hh": (2, None), "ih": (2, None)}),
    "higher rank": (LowRank(rank=2), LowRank(rank=3), {"hh": (2, None), "ih": (2, None)}),
    "same mask": (Prune(keep=0.25), Prune(keep=0.25), {"hh": (None, 0.25), "ih": (None, 0.25)}),
    "more weights": (Prune(keep=0.25), Prune(keep=0.5), {"hh": (None, 0.25), "ih": (None, 0.25)}),
}


@every_stranger
@pytest.mark.parametrize(("first", "second", "expected"), AGAIN.values(), ids=AGAIN)
@pytest.mark.slow
def test_compressing_again(stranger, first, second, expected):
    model, dense = stranger.make(), stranger.make()
    compress_(model, first)
    before, state, sites = matrices(model), state_of(model), find_sites(model)
    report = compress_(model, second)
    after = matrices(model)
    # A new mask takes a byte for every weight.
    masks = sum(math.prod(one.shape) for one in find_sites(model) if one.nonzeros is not None)
    assert report.model.bytes_after <= report.model.bytes_before + masks
    for site in find_sites(model):
        rank, kept = expected[site.target]
        assert (site.rank, site.nonzeros) == (rank, kept and int(kept * site.shape[0] * site.shape[1]))
    for site in report.sites:
        if not site.source_sha256:
            assert "already" in site.note or "no more" in site.note
        error = (before[site.key] - after[site.key]).norm() / before[site.key].norm()
        assert site.relative_error == pytest.approx(float(error), rel=1e-9, abs=1e-15)
    if find_sites(model) == sites:
        assert not any(site.source_sha256 for site in report.sites)
        assert_equal_bits(model.state_dict(), state)
    for key, matrix in after.items():
        overwrite(dense, key, matrix)
    torch.testing.assert_close(stranger.call(model), stranger.call(dense), **EXACT)


@every_config
def test_shared_modules_and_tied_parameters_stay_shared(config):
    shared, tied = STRANGERS["shared"].make(), STRANGERS["tied"].make()
    compress_(shared, config("both"))
    assert shared.left is shared.right is shared.towers[1] is not shared.towers[0]
    compress_(tied, config("both"))
    names = [name for name, _ in tied.first.named_parameters() if "weight_hh_l0" in name]
    assert names
    for name in names:
        assert tied.first.get_parameter(name) is tied.second.get_parameter(name)


def test_weights_that_are_computed_are_not_taken_for_one_another():
    """Each is a new tensor at every look, which may get the address of the one before."""
    model = LanguageModel(nn.LSTM(H, H, num_layers=8, dtype=torch.float64))
    for site in find_sites(model):
        parametrizations.weight_norm(model.rnn, site.name)
    before = matrices(model)
    compress_(model, LowRank(rank=2))
    for key, matrix in matrices(model).items():
        torch.testing.assert_close(matrix, best(before[key], 2), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@every_config
def test_dtype_training_mode_and_frozen_weights_are_kept(config, dtype):
    model = STRANGERS["tagger"].make().to(dtype)
    model.lstm.weight_hh_l0.requires_grad_(False)
    model.lstm.eval()
    report = compress_(model, config("both"))
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert (model.training, model.lstm.training) == (True, False)
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert frozen
    assert all(
        name.removesuffix("_u").removesuffix("_v").endswith(("weight_hh_l0", "weight_hh_l0.original")) for name in frozen
    )
    size = torch.finfo(dtype).bits // 8
    masks = sum(value.numel() for name, value in model.named_buffers() if name.endswith(".mask"))
    assert report.model.bytes_after == sum(size * value.numel() for value in model.parameters()) + masks


def test_what_is_trained_is_not_frozen_where_gradients_are_off():
    model = STRANGERS["parametrized"].make()
    with torch.no_grad():
        compress_(model, LowRank(rank=2))
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("config", [LowRank(rank=2), Prune(rank=2)], ids=["svd", "prune"])
def test_hooks_are_kept_and_can_still_be_removed(config):
    model, calls = STRANGERS["hooked"].make(), []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: calls.append("before")),
        model[0].register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True),
    ]
    compress_(model, config)
    STRANGERS["hooked"].call(model)
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    STRANGERS["hooked"].call(model)
    assert calls == ["before", "after"]


def test_what_was_not_chosen_is_the_same_object():
    model = STRANGERS["seq2seq"].make()
    encoder, biases = model.encoder, [model.decoder.bias_ih_l0, model.decoder.bias_hh_l0, model.decoder.weight_ih_l0]
    compress_(model, LowRank(rank=2, target="hh", filter=lambda site: site.module == "decoder"))
    assert model.encoder is encoder
    assert isinstance(model.decoder, LowRankLSTM)
    kept = [model.decoder.bias_ih_l0, model.decoder.bias_hh_l0, model.decoder.weight_ih_l0]
    assert all(now is then for now, then in zip(kept, biases, strict=True))


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("tagger", LowRank(rank=2), LowRankLSTM),
        ("cell", LowRank(rank=2), LowRankLSTMCell),
        ("tagger", Prune(rank=2), nn.LSTM),
        ("cell", Prune(rank=2), nn.LSTMCell),
    ],
)
def test_factors_make_a_module_of_ours_and_masks_do_not(name, config, kind):
    model = STRANGERS[name].make()
    compress_(model, config)
    assert all(isinstance(host.lstm, kind) for host in find_hosts(model))


def test_a_bare_lstm_goes_through_from_dense():
    lstm, x = nn.LSTM(IN, H, dtype=torch.float64), torch.randn(T, B, IN, dtype=torch.float64)
    module = LowRankLSTM.from_dense(lstm)
    torch.testing.assert_close(module(x)[0], lstm(x)[0], **EXACT)
    compress_(module, LowRank(rank=2, target="hh"))
    assert module.ranks == {"weight_hh_l0": 2}
    torch.testing.assert_close(module(x)[0], module.to_dense()(x)[0], **EXACT)


@every_config
def test_progress_goes_up_to_one(config):
    seen: list[tuple[str, float]] = []
    report = compress_(STRANGERS["tagger"].make(), config("both"), progress=lambda key, done: seen.append((key, done)))
    fractions = [done for _, done in seen]
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0
    assert fractions == sorted(fractions)
    assert list(dict.fromkeys(key for key, _ in seen)) == [site.key for site in report.sites]


def plain() -> nn.Module:
    return STRANGERS["tagger"].make()


def with_nan(name: str = "weight_ih_l1_reverse") -> nn.Module:
    model = plain()
    with torch.no_grad():
        getattr(model.lstm, name)[3, 1] = float("nan")
    return model


def with_a_subclass() -> nn.Module:
    class Residual(nn.LSTM):
        def forward(self, x, hx=None):
            out, state = super().forward(x, hx)
            return out + x, state

    return nn.ModuleList([LanguageModel(nn.LSTM(IN, H)), LanguageModel(Residual(IN, IN), IN)]).double()


def factored() -> nn.Module:
    model = plain()
    compress_(model, LowRank(rank=2, filter=lambda site: site.key == "lstm.weight_hh_l1"))
    return model


KEY = "lstm.weight_hh_l0"
NOTHING = "the model holds no nn.LSTM or nn.LSTMCell"


def test_lazy_modules_are_refused_until_they_have_run():
    model = nn.Sequential(nn.LSTM(5, H), nn.LazyLinear(3))
    with pytest.raises(SlimLSTMError, match=r"1\.weight, 1\.bias of a lazy module has no numbers yet; run the model once"):
        compress_(model, LowRank(rank=2))
    model[1](torch.ones(1, H))
    compress_(model, LowRank(rank=2))


def with_weight(number):
    model = plain().float()
    with torch.no_grad():
        model.lstm.weight_hh_l0[0, 0] = number
    return model


def test_fractions_of_numpy_are_taken():
    assert LowRank(energy=np.float64(0.9)).energy == LowRank(keep=np.float64(0.9)).keep == 0.9


ARGUMENTS = {
    "refit": ({"refit": -1}, "refit is a number of passes, at least 0, or None, not -1"),
    "refit a float": ({"refit": 1.5}, "refit is a number of passes"),
    "a loss alone": ({"loss": lambda model, batch: model(batch)}, "a loss takes batches to be computed on"),
    "sensitivity": ({"sensitivity": "nonsense"}, "sensitivity is a Sensitivity, not 'nonsense'"),
    "calibration": ({"calibration": "file"}, r"calibration is a Calibration, not 'file'; Calibration\.load"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_are_refused_before_anything_changed(arguments, message):
    model = plain()
    before = state_of(model)
    with pytest.raises(SlimLSTMError, match=message):
        compress_(model, LowRank(rank=2), **arguments)
    assert_same(state_of(model), before, rtol=0.0, atol=0.0)


REFUSED = {
    "unknown method": (
        plain,
        lambda: LowRank("tucker", rank=2),
        r"no method that finds factors is called 'tucker'; .*'svd', 'semi-nmf'",
    ),
    "rank 0": (plain, lambda: LowRank(rank=0), "a rank is an int of at least 1, not 0"),
    "rank -1": (plain, lambda: Prune(rank=-1), "a rank is an int of at least 1, not -1"),
    "rank a bool": (plain, lambda: LowRank(rank=True), "a rank is an int of at least 1, not True"),
    "rank a float": (plain, lambda: LowRank(rank=2.0), r"a rank is an int of at least 1, not 2\.0"),
    "rank too large": (plain, lambda: LowRank(rank=H + 1, target="hh"), f"rank {H + 1} is above {H}, the highest"),
    "rank of a mask too large": (plain, lambda: Prune(rank=H + 1, target="hh"), f"rank {H + 1} is above {H}, the highest"),
    "both": (plain, lambda: LowRank(rank=2, keep=0.5), "give exactly one of rank, keep, bytes and energy, not rank, keep"),
    "neither": (plain, Prune, "either rank or keep, not rank=None and keep=None"),
    "keep 0": (plain, lambda: LowRank(keep=0.0), r"keep is a fraction .* in \(0, 1\], not 0\.0"),
    "keep above 1": (plain, lambda: Prune(keep=1.5), r"keep is a fraction .* in \(0, 1\], not 1\.5"),
    "keep NaN": (plain, lambda: Prune(keep=float("nan")), r"keep is a fraction .* in \(0, 1\], not nan"),
    "keep a bool": (plain, lambda: LowRank(keep=True), r"keep is a fraction .* in \(0, 1\], not True"),
    "keep text": (plain, lambda: LowRank(keep="0.5"), r"keep is a fraction .* in \(0, 1\], not '0\.5'"),
    "target": (plain, lambda: LowRank(rank=2, target="weights"), "the target is 'ih', 'hh' or 'both', not 'weights'"),
    "filter": (
        plain,
        lambda: LowRank(rank=2, target="hh", filter=lambda site: False),
        f"none of the 4 sites with target 'hh': {KEY}, ",
    ),
    "no LSTM": (lambda: nn.Sequential(nn.Linear(2, 3)), lambda: LowRank(rank=2), NOTHING),
    "no LSTM for a plan": (lambda: nn.Linear(2, 3), lambda: Plan({KEY: SitePlan("dense")}), f"names {KEY}; .* no LSTM"),
    "NaN": (with_nan, lambda: LowRank(rank=2), r"lstm\.weight_ih_l1_reverse: .*holds 1 NaN .* was training stable\?"),
    "NaN under a mask": (with_nan, lambda: Prune(rank=2), r"lstm\.weight_ih_l1_reverse: .*1 NaN .* was training stable\?"),
    "unknown key": (
        plain,
        lambda: Plan({KEY: SitePlan("svd", 2), "lstm.weight_hh_l7": SitePlan("svd", 2)}),
        f"the plan names lstm.weight_hh_l7; the model has .*{KEY}",
    ),
    "plan's rank": (plain, lambda: Plan({KEY: SitePlan("svd", H + 1)}), f"rank {H + 1} is above {H}"),
    "plan's rank 0": (plain, lambda: Plan({KEY: SitePlan("svd", 0)}), "at least 1, not 0"),
    "plan's rank a bool": (plain, lambda: Plan({KEY: SitePlan("svd", True)}), "at least 1, not True"),
    "plan's weights": (
        plain,
        lambda: Plan({KEY: SitePlan("prune", nonzeros=999)}),
        f"{KEY} has 256 weights; the number of nonzeros cannot be 999",
    ),
    "plan's weights, none": (
        plain,
        lambda: Plan({KEY: SitePlan("prune", nonzeros=0)}),
        f"{KEY} has 256 weights; the number of nonzeros cannot be 0",
    ),
    "plan's weights, a part": (plain, lambda: Plan({KEY: SitePlan("prune", nonzeros=2.5)}), f"{KEY}.* cannot be 2.5"),
    "plan's method": (plain, lambda: Plan({KEY: SitePlan("tucker", 2)}), "no plan for a site: 'svd', 'semi-nmf'"),
    "plan without a rank": (plain, lambda: Plan({KEY: SitePlan("svd")}), "no plan for a site: .* need a rank"),
    "plan of a list": (plain, lambda: Plan.from_dict([]), "this is no plan: .*items"),
    "plan of something else": (plain, lambda: Plan.from_dict({KEY: {"methods": "svd"}}), "this is no plan: .*methods"),
    "mask on factors": (factored, lambda: Prune(rank=2), "lstm.weight_hh_l1 is a product of factors of rank 2; a mask"),
    "mask on factors in a plan": (
        factored,
        lambda: Plan({KEY: SitePlan("svd", 2), "lstm.weight_hh_l1": SitePlan("prune", nonzeros=5)}),
        "lstm.weight_hh_l1 is a product of factors of rank 2; a mask",
    ),
    "a name for a configuration": (plain, lambda: "int8", r"a LowRank, Prune, Quantize or Plan, not 'int8'; give for exam"),
    "a dictionary for a plan": (plain, lambda: {KEY: {}}, r"Quantize or Plan, not \{.*Plan\.from_dict"),
    "a class for a configuration": (plain, lambda: LowRank, "a LowRank, Prune, Quantize or Plan, not <class"),
    "a plan of names": (plain, lambda: Plan({KEY: "svd"}), "a plan holds a SitePlan for every key, .* not 'svd'"),
    "a plan of dictionaries": (plain, lambda: Plan({KEY: {"method": "svd"}}), "a plan holds a SitePlan for every key"),
    "a plan of a list": (plain, lambda: Plan([KEY]), "a plan holds a SitePlan for every key"),
    "a filter in words": (plain, lambda: Quantize("int8", filter="lstm"), "a filter is a function of a site, .*'lstm'"),
    "a filter of pruning": (plain, lambda: Prune(keep=0.5, filter="lstm"), "a filter is a function of a site, .*'lstm'"),
    "a list of methods": (plain, lambda: LowRank(["svd"], rank=2), r"no method that finds factors is called \['svd'\]"),
    "a list in a plan": (plain, lambda: Plan({KEY: SitePlan(["svd"], 2)}), r"is a name, such as 'svd', not \['svd'\]"),
    "energy in words": (plain, lambda: LowRank(energy="0.9"), r"energy is a fraction in \(0, 1\], not '0\.9'"),
    "energy a bool": (plain, lambda: LowRank(energy=True), r"energy is a fraction in \(0, 1\], not True"),
    "dense with a rank": (plain, lambda: Plan({KEY: SitePlan("dense", 1)}), "'dense' nothing, and none takes more"),
    "dense with nonzeros": (plain, lambda: Plan({KEY: SitePlan("dense", nonzeros=1)}), "none takes more"),
    "a mask with a rank": (plain, lambda: Plan({KEY: SitePlan("prune", 1, 5)}), "none takes more"),
    "factors with nonzeros": (plain, lambda: Plan({KEY: SitePlan("svd", 1, 5)}), "none takes more"),
    "too large for float16": (
        lambda: with_weight(1e6),
        lambda: Quantize("int4"),
        r"weights of up to 1e\+06 are too large for int4; use 'int8'",
    ),
    "too large in factors": (
        lambda: with_weight(1e12),
        lambda: LowRank(rank=2, storage="int3"),
        "are too large for int3; use 'int8'",
    ),
    "a subclass among others": (
        with_a_subclass,
        lambda: LowRank(rank=2),
        r"'1\.rnn' is a Residual, whose forward would be lost",
    ),
    "a subclass in a plan": (
        with_a_subclass,
        lambda: Plan({"0.rnn.weight_hh_l0": SitePlan("svd", 2), "1.rnn.weight_hh_l0": SitePlan("svd", 2)}),
        r"'1\.rnn' is a Residual, whose forward would be lost",
    ),
}


@pytest.mark.parametrize(("make", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_changed(make, config, message):
    model = make()
    before = state_of(model)
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    with pytest.raises(SlimLSTMError, match=message):
        compress_(model, config())
    assert_same(state_of(model), before, rtol=0.0, atol=0.0, equal_nan=True)
    assert list(model.named_modules()) == modules
    assert [(name, id(value)) for name, value in model.named_parameters()] == [(name, id(v)) for name, v in parameters]


def test_nan_where_nobody_looks_is_no_obstacle():
    model = with_nan("weight_hh_l0")
    report = compress_(model, LowRank(rank=2, target="ih"))
    assert {site.method for site in report.sites} == {"svd"}


def test_a_filter_spares_what_cannot_be_compressed():
    model = with_a_subclass()
    report = compress_(model, LowRank(rank=2, filter=lambda site: site.problem is None))
    assert [site.key for site in report.sites] == ["0.rnn.weight_ih_l0", "0.rnn.weight_hh_l0"]
