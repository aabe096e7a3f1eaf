"""``Quantize``: what is rounded and how, that every backend and every folder has the same weights, and what it costs.

m x n a weight, U [m, r] and V [r, n] factors.
"""

import json
import lzma
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from strangers import STRANGERS, H
from torch import Tensor, nn
from torch.nn.utils import parametrizations

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
from slimlstm.methods import rounded
from slimlstm.methods.storages import to_int8
from slimlstm.modules.factored import FactoredModule
from slimlstm.modules.hosts import find_hosts
from slimlstm.ops import native
from slimlstm.pipeline.plan import SitePlan

SMALL = ("bfloat16", "int8")
TINIEST = torch.finfo(torch.float32).tiny
BEFORE = {"dense": None, "factored": LowRank(rank=2), "masked": Prune(keep=0.5)}
every_stranger = pytest.mark.parametrize("name", STRANGERS)
every_storage = pytest.mark.parametrize("storage", SMALL)
every_start = pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
needs_kernel = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What inference sees of everything that can be quantised: matrices, factors and projections."""
    found = {}
    for host in find_hosts(model):
        for site in host.sites():
            kept_as, key = host.weight(site.name), site.key
            parts = {key: kept_as} if isinstance(kept_as, Tensor) else {f"{key}_u": kept_as[0], f"{key}_v": kept_as[1]}
            projection = host.projection(site.name)
            found |= parts | ({} if projection is None else {f"{key} projection": projection})
    return {name: value.clone() for name, value in found.items()}


def make(name: str, before=None, seed: int = 0) -> nn.Module:
    model = STRANGERS[name].make(seed).float()
    if before is not None:
        compress_(model, before)
    return model


def call(name: str, model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    inputs = [value.float() if value.is_floating_point() else value for value in STRANGERS[name].inputs()]
    with torch.no_grad():
        return model.eval()(*inputs)


# ---- rounding ----


@st.composite
def matrices(draw) -> Tensor:
    """Weights of every magnitude, rows of zeros, of denormals and of few different numbers among them."""
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 99)))
    exponents = draw(st.lists(st.integers(-46, 37), min_size=m, max_size=m))
    weight = torch.randn(m, n).clamp(-3, 3) * torch.tensor([10.0**exponent for exponent in exponents])[:, None]
    weight[draw(st.integers(0, m - 1))] *= draw(st.sampled_from([0.0, 1.0]))
    return weight


@given(matrices())
def test_int8_is_exact_and_final(weight):
    encoded = to_int8(weight)
    integers, scale = encoded.codes, encoded.scale
    found = rounded(weight, "int8")
    assert torch.equal(bits(encoded.decoded()), bits(found))
    assert torch.equal(bits(rounded(found, "int8")), bits(found))
    # What the kernel makes of the rounded weights, in its own words.
    kernels_scale = found.abs().amax(dim=1) / 127
    assert torch.equal(bits(kernels_scale), bits(scale))
    quotients = torch.where(scale[:, None] > 0, found / kernels_scale[:, None], 0.0)
    assert torch.equal(quotients, integers.float())
    assert int(integers.abs().amax()) <= 127
    error = (weight.double() - found.double()).abs()
    assert (error <= torch.where(scale > 0, scale.double() * 0.502, 127 * TINIEST)[:, None]).all()


@given(matrices())
def test_bfloat16_is_final(weight):
    found = rounded(weight, "bfloat16")
    assert torch.equal(bits(rounded(found, "bfloat16")), bits(found))
    assert torch.equal(found, weight.bfloat16().float())


def test_rows_that_hold_no_number_are_seen():
    weight = torch.ones(3, 4)
    weight[0, 1], weight[1, 2] = torch.nan, -torch.inf
    found = rounded(weight, "int8")
    assert found[:2].isnan().all()
    torch.testing.assert_close(found[2], weight[2], rtol=2e-5, atol=0.0)


def test_zeros_have_no_sign():
    found = rounded(torch.tensor([[1.0, -1e-9, -0.0]]), "int8")
    assert torch.equal(found[0, 1:], torch.zeros(2))
    assert not found.signbit().any()


@needs_kernel
@pytest.mark.parametrize("storage", SMALL)
@torch.no_grad()
def test_the_kernel_packs_the_very_weights(storage):
    """Unit inputs make the gates the weights themselves; where the kernel's int8 inputs are 127 / 127, they are exact."""
    module = LowRankLSTM(40, 33, bias=False, backend="fused").eval()
    module.store("weight_ih_l0", storage)
    nn.init.zeros_(module.weight_hh_l0)
    plain = LowRankLSTM(40, 33, bias=False, backend="fused").eval()
    plain.load_state_dict(module.state_dict())
    for x in torch.eye(40)[:, None, None]:
        torch.testing.assert_close(module(x)[0], plain(x)[0], rtol=2e-7, atol=1e-9)


# ---- in a model ----


@every_stranger
@every_storage
@every_start
def test_weights_are_rounded_and_nothing_else(name, storage, before):
    model, dense = make(name, before), make(name, before)
    report = compress_(model, Quantize(storage))
    expected = {key: rounded(value, storage) for key, value in weights(dense).items()}
    assert_same(weights(model), expected, rtol=0.0, atol=0.0)
    assert [(site.rank, site.nonzeros) for site in find_sites(model)] == [
        (site.rank, site.nonzeros) for site in find_sites(dense)
    ]
    assert {site.storage for site in find_sites(model)} == {storage}
    assert all(isinstance(host.lstm, FactoredModule) for host in find_hosts(model))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert all(value.requires_grad for value in model.parameters())
    matrices_before = {site.key: host.matrix(site.name) for host in find_hosts(dense) for site in host.sites()}
    matrices_after = {site.key: host.matrix(site.name) for host in find_hosts(model) for site in host.sites()}
    for site in report.sites:
        was, now = matrices_before[site.key].double(), matrices_after[site.key].double()
        assert site.relative_error == pytest.approx(float((was - now).norm() / was.norm()), rel=1e-4)
        assert 0 < site.relative_error < (0.02 if storage == "int8" else 0.005)
        method = "dense" if before is None else "prune" if isinstance(before, Prune) else "svd"
        assert (site.method, site.storage, site.note) == (method, storage, "")
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert storage in str(report)
    # int8 of these small models is no exact science; the reference recurrence is the same for both.
    torch.testing.assert_close(call(name, model), call(name, dense), rtol=0.05, atol=0.05)


@every_stranger
@every_storage
@every_start
@pytest.mark.slow
def test_again_is_as_once(name, storage, before):
    model = make(name, before)
    first = compress_(model, Quantize(storage))
    state = state_of(model)
    again = compress_(model, Quantize(storage))
    assert_same(state_of(model), state, rtol=0.0, atol=0.0)
    assert {(site.relative_error, site.note) for site in again.sites} == {(0.0, f"already {storage}")}
    assert again.model.bytes_before == again.model.bytes_after == first.model.bytes_after


@every_stranger
@every_storage
def test_a_plan_names_rank_and_storage_together(name, storage):
    one, other, third = make(name), make(name), make(name)
    plan = Plan({site.key: SitePlan("svd", rank=2, storage=storage) for site in find_sites(one)})
    report = compress_(one, plan)
    compress_(other, LowRank(rank=2))
    compress_(other, Quantize(storage))
    assert_same(state_of(one), state_of(other), rtol=0.0, atol=0.0)
    assert find_sites(one) == find_sites(other)
    text = Plan.from_dict(json.loads(json.dumps(report.plan.to_dict())))
    assert text == report.plan == plan
    assert compress_(third, text) == report
    assert_same(state_of(third), state_of(one), rtol=0.0, atol=0.0)
    assert f"svd {storage} rank 2" in str(plan)


def test_a_plan_without_storage_says_nothing_of_it():
    plan = compress_(make("tagger"), LowRank(rank=2)).plan
    assert not any("storage" in entry for entry in plan.to_dict().values())
    assert "storage" not in str(compress_(make("tagger"), plan))


@pytest.mark.parametrize("target", ["ih", "hh"])
def test_only_what_is_meant(target):
    model = make("projected")
    before = weights(model)
    compress_(model, Quantize("int8", target, filter=lambda site: site.layer == 1))
    for key, value in weights(model).items():
        meant = f"weight_{target}_l1" in key
        assert torch.equal(value, rounded(before[key], "int8") if meant else before[key])


def test_a_tied_matrix_that_is_not_meant_stays_as_it_is():
    model = make("tied")
    before = weights(model)
    compress_(model, Quantize("int8", filter=lambda site: site.module == "first"))
    assert torch.equal(weights(model)["second.weight_hh_l0"], before["second.weight_hh_l0"])
    both = make("tied")
    compress_(both, Quantize("int8"))
    assert both.first.weight_hh_l0 is both.second.weight_hh_l0


def test_masks_stay_and_what_they_hide_is_gone():
    model = make("tagger", Prune(keep=0.5))
    zeros = {key: value == 0 for key, value in weights(model).items()}
    compress_(model, Quantize("int8"))
    assert all(torch.equal(value == 0, zeros[key] | (value == 0)) for key, value in weights(model).items())
    assert [site.nonzeros for site in find_sites(model)] == [
        site.nonzeros for site in find_sites(make("tagger", Prune(keep=0.5)))
    ]
    for entry in model.lstm.parametrizations.values():
        assert torch.equal(entry.original * entry[0].mask, entry.original)


def test_masked_after_it_was_quantised():
    model = make("tagger", Quantize("int8"))
    report = compress_(model, Prune(keep=0.5))
    assert {site.storage for site in report.sites} == {"int8"}
    for value in weights(model).values():
        assert torch.equal(rounded(value, "int8"), value)


STORED = {
    "another storage": (Quantize("int8"), Quantize("bfloat16"), "bfloat16", "bfloat16, was int8"),
    "a smaller one": (Quantize("bfloat16"), Quantize("int8"), "int8", "int8, was bfloat16"),
    "factors": (Quantize("bfloat16"), LowRank(rank=1), None, "float32, was bfloat16"),
    "factors that are larger": (
        Quantize("int8"),
        LowRank(rank=3),
        "int8",
        "float32 factors of rank 3 take no fewer bytes than int8 does now",
    ),
}


@pytest.mark.parametrize(("first", "second", "storage", "note"), STORED.values(), ids=STORED)
def test_sites_that_are_stored_already(first, second, storage, note):
    model = make("CRNN", first)
    report = compress_(model, second)
    assert {(site.storage, site.note) for site in report.sites} == {(storage, note)}
    assert {site.storage for site in find_sites(model)} == {storage}
    assert "".join(note.split()) in "".join(str(report).split())


def test_back_to_float32():
    model = make("tagger", Quantize("int8"))
    before = weights(model)
    report = compress_(model, Plan({site.key: SitePlan("dense", storage="float32") for site in find_sites(model)}))
    assert {(site.storage, site.relative_error) for site in report.sites} == {(None, 0.0)}
    assert report.model.bytes_after == report.model.parameters_after * 4
    assert_same(weights(model), before, rtol=0.0, atol=0.0)


def with_nan(name: str) -> nn.Module:
    model = make("projected")
    with torch.no_grad():
        model.rnn.get_parameter(name)[1, 1] = torch.nan
    return model


def weight_normed() -> nn.Module:
    model = make("tagger", LowRank(rank=2))
    parametrizations.weight_norm(model.lstm, "weight_hh_l1_v")
    return model


REFUSED = {
    "storage": (
        lambda: make("tagger"),
        lambda: Quantize("int9"),
        "no storage is called 'int9'; the storages are 'bfloat16', 'int8'",
    ),
    "float32": (
        lambda: make("tagger"),
        lambda: Quantize("float32"),
        "in float32 nothing gets smaller; the storages to round to are 'bfloat16', 'int8'",
    ),
    "target": (lambda: make("tagger"), lambda: Quantize("int8", "all"), "the target is 'ih', 'hh' or 'both', not 'all'"),
    "plan": (
        lambda: make("tagger"),
        lambda: Plan({"lstm.weight_hh_l0": SitePlan("dense", storage="int9")}),
        "no storage is called 'int9'; the storages are 'float32', ",
    ),
    "filter": (lambda: make("tagger"), lambda: Quantize("int8", filter=lambda site: False), "selected none of the 8 sites"),
    "float64": (
        STRANGERS["tagger"].make,
        lambda: Quantize("int8"),
        r"lstm.weight_ih_l0: only float32 .* not torch.float64",
    ),
    "factors in float64": (
        lambda: make("tagger", LowRank(rank=2)).double(),
        lambda: Quantize("int4"),
        "lstm.weight_ih_l0: only float32 .* torch.float64; convert",
    ),
    "half": (lambda: make("cell").half(), lambda: Quantize("bfloat16"), r"cell.weight_ih: only float32 .* torch.float16"),
    "factors in bfloat16": (
        lambda: make("tagger", LowRank(rank=2)).bfloat16(),
        lambda: Quantize("int8"),
        "lstm.weight_ih_l0: only float32 .* torch.bfloat16; convert",
    ),
    "NaN": (lambda: with_nan("weight_ih_l1"), lambda: Quantize("int8"), "rnn.weight_ih_l1: .*1 NaN .* training stable"),
    "NaN in a projection": (
        lambda: with_nan("weight_hr_l1"),
        lambda: Quantize("bfloat16"),
        "rnn.weight_hh_l1: .*1 NaN .* training stable",
    ),
    "factors that are computed": (
        weight_normed,
        lambda: Quantize("int8"),
        "weight_hh_l1_v of 'lstm' is parametrized; remove",
    ),
}


@pytest.mark.parametrize(("build", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_changed(build, config, message):
    model = build()
    before, modules = state_of(model), list(model.named_modules())
    with pytest.raises(SlimLSTMError, match=message):
        compress_(model, config())
    assert_same(state_of(model), before, rtol=0.0, atol=0.0, equal_nan=True)
    assert list(model.named_modules()) == modules


@pytest.mark.parametrize("module", [LowRankLSTM(5, H, 2, proj_size=3), LowRankLSTMCell(5, H)], ids=["LSTM", "cell"])
def test_a_module_of_ours_is_a_model_of_its_own(module, tmp_path):
    fresh = deepcopy(module)
    compress_(module, Quantize("int8"))
    save(module, tmp_path)
    assert_same(load(tmp_path, fresh).state_dict(), state_of(module), rtol=0.0, atol=0.0)
    assert fresh.storages == module.storages


def test_training_goes_on_and_is_rounded_again(tmp_path):
    model = make("tagger", Quantize("int8"))
    torch.manual_seed(1)
    model(*STRANGERS["tagger"].inputs()).sum().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    with pytest.raises(
        SlimLSTMError, match=r"lstm.weight_ih_l0 was changed since .* compress_\(model, Quantize\('int8'\)\)"
    ):
        save(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    report = compress_(model, Quantize("int8"))
    assert all(site.relative_error > 0 for site in report.sites)
    save(model, tmp_path / "small")
    assert_same(load(tmp_path / "small", make("tagger")).state_dict(), state_of(model), rtol=0.0, atol=0.0)


@every_start
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("storage", [*SMALL, "int4"])
def test_rounded_weights_that_changed_dtype_are_not_saved(storage, dtype, before, tmp_path):
    model = make("tagger", before) if before else make("tagger")
    compress_(model, Quantize(storage))
    model.to(dtype)
    with pytest.raises(SlimLSTMError, match=rf"rounded to {storage}, .* became {dtype}; .* model\.float\(\)"):
        save(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    if dtype == torch.float64:
        save(model.float(), tmp_path / "small")


# ---- in a folder ----


def content(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def assert_equal_storages(model: nn.Module, other: nn.Module) -> None:
    assert find_sites(model) == find_sites(other)
    ours, theirs = ([h.lstm.storages for h in find_hosts(m)] for m in (model, other))
    assert ours == theirs


@every_stranger
@every_storage
@every_start
def test_what_is_loaded_is_what_was_saved(name, storage, before, tmp_path):
    model = make(name, before)
    report = compress_(model, Quantize(storage))
    save(model, tmp_path)
    loaded = load(tmp_path, STRANGERS[name].make(seed=2))
    state, expected = loaded.state_dict(), state_of(model)
    assert_same(state, expected, rtol=0.0, atol=0.0)
    stored = {key for key, value in expected.items() if value.dtype == torch.float32}
    assert all(torch.equal(bits(state[key]), bits(expected[key])) for key in stored)
    assert_equal_storages(loaded, model)
    assert torch.equal(call(name, loaded), call(name, model))
    assert [key for key, _ in loaded.named_parameters()] == [key for key, _ in model.named_parameters()]
    # Report and file agree in bytes, but for buffers other than masks.
    buffers = {key.rpartition(".")[2] for key, _ in model.named_buffers()} - {"mask"}
    sizes = {key: value.numel() * value.element_size() for key, value in content(tmp_path).items()}
    assert sum(size for key, size in sizes.items() if key.rpartition(".")[2] not in buffers) == report.model.bytes_after
    assert report.model.bytes_after < report.model.bytes_before
    # What was loaded can be saved again.
    save(loaded, tmp_path / "again")
    again = load(tmp_path / "again", STRANGERS[name].make(seed=3))
    assert_same(again.state_dict(), expected, rtol=0.0, atol=0.0)


def test_parts_of_a_model(tmp_path):
    model = make("tagger")
    names = [site.key for site in find_sites(model)]
    plan = Plan({names[0]: SitePlan("svd", 2, storage="int8"), names[1]: SitePlan("dense", storage="bfloat16")})
    plan.sites |= {names[2]: SitePlan("prune", nonzeros=9, storage="int8"), names[3]: SitePlan("svd", 2)}
    compress_(model, plan)
    save(model, tmp_path)
    dtypes = {key: value.dtype for key, value in content(tmp_path).items() if names[0] in key or names[1] == key}
    assert dtypes == {
        f"{names[0]}_u": torch.int8,
        f"{names[0]}_v": torch.int8,
        f"{names[0]}_u.scale": torch.float32,
        f"{names[0]}_v.scale": torch.float32,
        names[1]: torch.bfloat16,
    }
    loaded = load(tmp_path, make("tagger", seed=2))
    assert_same(loaded.state_dict(), state_of(model), rtol=0.0, atol=0.0)
    assert_equal_storages(loaded, model)


def test_folders_without_storages_are_of_the_first_format(tmp_path):
    """So that a slimlstm that knows no storages reads them."""
    for config, version in ((LowRank(rank=2), 1), (Quantize("int8"), 2)):
        save(make("tagger", config), tmp_path / str(version))
        assert json.loads((tmp_path / str(version) / "config.json").read_text())["format_version"] == version


def resign(folder: Path, change) -> None:
    """Changes ``config.json`` and signs it again, as a forger would."""
    from slimlstm.folders import _config_sha256

    config = json.loads((folder / "config.json").read_text())
    change(config["sites"]["lstm.weight_hh_l0"])
    config["sha256"] = _config_sha256(config)
    (folder / "config.json").write_text(json.dumps(config))


FORGED = {
    "unknown storage": (lambda entry: entry.update(storage="int9"), "has weights in 'int9', an unknown storage"),
    "another storage": (lambda entry: entry.update(storage="bfloat16"), "stored as 'bfloat16', which its tensors are not"),
    "storage left out": (lambda entry: entry.pop("storage"), r"weight_hh_l0"),
    "rank": (lambda entry: entry.update(rank=2), "rank 2, which its tensors do not have"),
}


@pytest.mark.parametrize(("change", "message"), FORGED.values(), ids=FORGED)
def test_forged_folders_are_refused(change, message, tmp_path):
    save(make("tagger", Quantize("int8")), tmp_path)
    resign(tmp_path, change)
    model = make("tagger", seed=2)
    before = state_of(model)
    with pytest.raises(SlimLSTMError, match=message):
        load(tmp_path, model)
    assert_same(state_of(model), before, rtol=0.0, atol=0.0)


OTHERS = {
    "quantised, not in the folder": (LowRank(rank=2), Quantize("int8"), "is int8 in the model, not in the folder"),
    "another storage": (Quantize("bfloat16"), Quantize("int8"), "is int8 in the model, not in the folder"),
    "factored, dense in the folder": (
        Quantize("int8"),
        LowRank(rank=2),
        "is dense in the folder, but factored in the model",
    ),
}


@pytest.mark.parametrize(("saved", "other", "message"), OTHERS.values(), ids=OTHERS)
def test_models_that_do_not_fit_are_refused(saved, other, message, tmp_path):
    save(make("tagger", saved), tmp_path)
    model = make("tagger", other)
    before = state_of(model)
    with pytest.raises(SlimLSTMError, match=message):
        load(tmp_path, model)
    assert_same(state_of(model), before, rtol=0.0, atol=0.0)


# ---- through the kernel ----


@needs_kernel
@every_storage
@every_start
@pytest.mark.parametrize("name", ["tagger", "projected", "cell", "seq2seq", "CRNN"])
def test_the_kernel_computes_with_the_rounded_weights(name, storage, before):
    model = make(name, before)
    compress_(model, Quantize(storage))
    reference = deepcopy(model).double()
    for module in reference.modules():
        if isinstance(module, LowRankLSTM):
            module.backend = "reference"
    expected = STRANGERS[name].call(reference)
    assert float((call(name, model).double() - expected).norm() / expected.norm()) < (0.02 if storage == "int8" else 1e-5)


# ---- what it costs ----


def char_rnn(folder: Path) -> tuple[nn.Sequential, Tensor]:
    """A trained character model and an excerpt of its text, [T, 1]; how it is stored is said beside it."""
    place = folder / "pretrained" / "charrnn_shakespeare"
    shapes = json.loads((place / "manifest.json").read_text())
    arrays = {
        key.split("/", 1)[-1]: torch.from_numpy(np.fromfile(place / entry["filename"], "<f4").reshape(entry["shape"]))
        for key, entry in shapes.items()
        if entry["shape"]
    }
    lstm = nn.LSTM(128, 128, 2)
    with torch.no_grad():
        for layer in (0, 1):
            cell = f"multi_rnn_cell/cell_{layer}/basic_lstm_cell/"
            i, j, f, o = arrays[cell + "weights"].T.chunk(4)
            lstm.get_parameter(f"weight_ih_l{layer}").copy_(torch.cat([i, f, j, o])[:, :128])
            lstm.get_parameter(f"weight_hh_l{layer}").copy_(torch.cat([i, f, j, o])[:, 128:])
            i, j, f, o = arrays[cell + "biases"].chunk(4)
            lstm.get_parameter(f"bias_ih_l{layer}").copy_(torch.cat([i, f + 1.0, j, o]))
            lstm.get_parameter(f"bias_hh_l{layer}").zero_()
    ids = {
        {"": "U", "  ": "u"}.get(key, key): value for key, value in json.loads((place / "vocab.json").read_text()).items()
    }
    text = lzma.decompress((folder / "text" / "tinyshakespeare.txt.xz").read_bytes()).decode()[:2000]
    model = nn.Sequential(nn.Embedding.from_pretrained(arrays["embedding"]), lstm).eval()
    return model, torch.tensor([ids[character] for character in text])[:, None]


@pytest.mark.parametrize("backend", ["reference", "fused"])
@torch.no_grad()
def test_outputs_of_a_trained_model(backend, data_folder):
    model, text = char_rnn(data_folder)
    expected = model(text)[0]
    compress_(model, Quantize("int8"))
    model[1].backend = backend
    assert float((model(text)[0] - expected).norm() / expected.norm()) < 0.02


def test_a_matrix_that_int8_would_make_larger_stays_as_it_is():
    """One column has as many scales as integers: m + 4 m bytes against 4 m."""
    model = nn.Sequential(nn.LSTM(1, H))
    before = model[0].weight_ih_l0.detach().clone()
    ih, hh = compress_(model, Quantize("int8")).sites
    assert (ih.storage, hh.storage) == (None, "int8")
    assert ih.bytes_after == ih.bytes_before
    assert "no fewer bytes" in ih.note
    assert torch.equal(model[0].weight_ih_l0, before)
