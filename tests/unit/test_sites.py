"""``find_sites`` on strangers' models: its list, its reasons, and that it changes nothing."""

import copy
import re

import pytest
import torch
from strangers import IN, STRANGERS, H, LanguageModel, tokens
from torch import nn
from torch.nn.utils import prune, weight_norm

from slimlstm import LowRankLSTM, LowRankLSTMCell, Quantize, compress_, find_sites
from slimlstm.modules.masks import apply_mask

# PyTorch warns of its own deprecated functions, which people still use.
pytestmark = pytest.mark.filterwarnings("ignore::Warning:torch", "ignore:torch.ao:DeprecationWarning")
every_stranger = pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)


@every_stranger
def test_every_matrix_is_listed_once_and_in_order(stranger):
    sites = find_sites(stranger.make())
    assert [(site.key, site.shape) for site in sites] == list(stranger.sites.items())
    assert {(site.problem, site.rank, site.nonzeros) for site in sites} == {(None, None, None)}
    assert [site.parameters for site in sites] == [m * n for m, n in stranger.sites.values()]


@every_stranger
@pytest.mark.parametrize("training", [True, False])
def test_looking_changes_nothing(stranger, training):
    model = stranger.make().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    find_sites(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize(
    ("stranger", "key", "expected"),
    [
        ("tagger", "lstm.weight_ih_l0", ("ih", 0, False)),
        ("tagger", "lstm.weight_hh_l0_reverse", ("hh", 0, True)),
        ("tagger", "lstm.weight_ih_l1_reverse", ("ih", 1, True)),
        ("Merity", "rnn.weight_hh_l0", ("hh", 0, False)),
        ("cell", "cell.weight_ih", ("ih", 0, False)),
        ("cell", "cell.weight_hh", ("hh", 0, False)),
    ],
)
def test_names_give_target_layer_and_direction(stranger, key, expected):
    site = {site.key: site for site in find_sites(STRANGERS[stranger].make())}[key]
    assert (site.target, site.layer, site.reverse) == expected


def test_ten_layers_are_told_apart():
    sites = find_sites(nn.Sequential(nn.LSTM(IN, H, num_layers=11)))
    assert [site.layer for site in sites if site.target == "hh"] == list(range(11))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda **ranks: LowRankLSTM(IN, H, **ranks), ("weight_ih_l0", "weight_hh_l0")),
        (lambda **ranks: LowRankLSTMCell(IN, H, **ranks), ("weight_ih", "weight_hh")),
    ],
    ids=["LSTM", "cell"],
)
def test_factors_and_masks_are_seen_and_a_root_of_ours_is_no_problem(make, names):
    module = make(ranks={names[1]: 2})
    apply_mask(module, names[0], (torch.arange(4 * H * IN) % 3 == 0).view(4 * H, IN))
    ih, hh = find_sites(module)
    assert (ih.key, ih.rank, ih.nonzeros, ih.parameters, ih.problem) == (
        names[0],
        None,
        4 * H * IN // 3,
        4 * H * IN // 3,
        None,
    )
    assert (hh.key, hh.rank, hh.nonzeros, hh.parameters, hh.problem) == (names[1], 2, None, 2 * 5 * H, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(3, 4)),
        # Three gates of 4 units are 12 rows, which four gates of 3 units would have too.
        lambda: LanguageModel(nn.GRU(IN, 4), 4),
        lambda: torch.jit.script(LanguageModel(nn.GRU(IN, 4), 4)),
        lambda: torch.jit.script(LanguageModel(nn.RNN(IN, 4), 4)),
    ],
    ids=["linear", "GRU", "scripted GRU", "scripted RNN"],
)
def test_other_modules_have_no_sites(make):
    assert find_sites(make()) == []


class Residual(nn.LSTM):
    def forward(self, x, hx=None):
        out, state = super().forward(x, hx)
        return out + x, state


def on_meta() -> nn.Module:
    model = LanguageModel(nn.LSTM(IN, H))
    model.rnn.to("meta")
    return model


def with_hook(hook, *settings) -> nn.Module:
    model = LanguageModel(nn.LSTM(IN, H))
    hook(model.rnn, "weight_hh_l0", *settings)
    return model


REMEDIES = {
    "script": (lambda: torch.jit.script(LanguageModel(nn.LSTM(IN, H))), "'rnn' is a torch.jit .* before scripting"),
    "trace": (lambda: torch.jit.trace(LanguageModel(nn.LSTM(IN, H)), tokens()), "'rnn' is a torch.jit .* before scripting"),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(LanguageModel(nn.LSTM(IN, H)), {nn.LSTM}),
        "'rnn' is a quantised LSTM, .* compress the float model and quantise after",
    ),
    "meta": (on_meta, "'rnn' is on the meta device .* load the weights first"),
    "subclass": (lambda: LanguageModel(Residual(IN, IN), IN), "'rnn' is a Residual, whose forward would be lost"),
    "weight_norm": (lambda: with_hook(weight_norm), "weight_hh_l0 of 'rnn' is no parameter .* remove_weight_norm"),
    "prune": (
        lambda: with_hook(prune.l1_unstructured, 0.5),
        "weight_hh_l0 of 'rnn' is no parameter .* or torch.nn.utils.prune.remove",
    ),
}


@pytest.mark.parametrize(("make", "message"), REMEDIES.values(), ids=REMEDIES)
def test_sites_that_cannot_be_compressed_are_listed_with_the_reason(make, message):
    sites = find_sites(make())
    assert len(sites) == 2
    for site in sites:
        assert re.search(message, site.problem)


@pytest.mark.parametrize("name", ["script", "trace", "quantised", "meta", "weight_norm", "prune"])
def test_sites_that_cannot_be_compressed_have_names_and_shapes(name):
    expected = STRANGERS["Merity"].sites
    assert {site.key: site.shape for site in find_sites(REMEDIES[name][0]())} == expected


LOOKS = {"find": find_sites, "compress": lambda model: compress_(model, Quantize("bfloat16"))}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_power_iterations_of_spectral_norm_do_not_go_on_while_sites_are_read(look):
    """In training mode, each evaluation of the parametrization changes its vectors u and v."""
    model = nn.Sequential(nn.LSTM(3, 8))
    nn.utils.parametrizations.spectral_norm(model[0], "weight_hh_l0")
    nn.init.normal_(model[0].parametrizations.weight_hh_l0.original)
    x, before = torch.randn(5, 2, 3), copy.deepcopy(model)
    look(model)
    torch.testing.assert_close(model.eval()(x)[0], before.eval()(x)[0], rtol=0.02, atol=0.02)


def test_a_random_parametrization_is_not_evaluated():
    model = nn.Sequential(nn.LSTM(3, 4))
    nn.utils.parametrize.register_parametrization(model[0], "weight_hh_l0", nn.Dropout(0.5))
    state = torch.random.get_rng_state()
    find_sites(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_subclass_that_keeps_the_forward_pass_is_an_lstm():
    class Named(nn.LSTM):
        """Adds nothing but a name."""

    assert [site.problem for site in find_sites(LanguageModel(Named(IN, H)))] == [None, None]
