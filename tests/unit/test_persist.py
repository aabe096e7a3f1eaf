"""``save`` and ``load``: the same to the bit, whole or not at all, and the old model until the new one is complete."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strangers import STRANGERS, H, LanguageModel, V
from torch import Tensor, nn

from slimlstm import LowRank, LowRankLSTM, LowRankLSTMCell, Prune, SlimLSTMError, card, compress_, find_sites, load, save
from slimlstm.weight_files import compress_file

SVD, MASK = LowRank(rank=2, target="hh"), Prune(rank=2, target="hh")
every_stranger = pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
every_config = pytest.mark.parametrize("config", [SVD, MASK], ids=["svd", "prune"])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_same(actual, expected, rtol=0.0, atol=0.0)


def compressed(name: str = "tagger", config: LowRank | Prune = SVD, seed: int = 0) -> nn.Module:
    model = STRANGERS[name].make(seed)
    compress_(model, config)
    return model


def fresh(name: str = "tagger") -> nn.Module:
    return STRANGERS[name].make(seed=2)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that holds the compressed tagger."""
    save(compressed(), tmp_path / "small")
    return tmp_path / "small"


def weights_in(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def refuse(folder: Path, message: str, model: nn.Module | None = None) -> None:
    """``load`` says so, and leaves the fresh model as it is."""
    model = fresh() if model is None else model
    before, modules = state_of(model), list(model.named_modules())
    with pytest.raises(SlimLSTMError, match=message):
        load(folder, model)
    assert_equal_bits(model.state_dict(), before)
    assert list(model.named_modules()) == modules


@every_stranger
@every_config
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a forward pass"])
def test_what_is_loaded_is_what_was_saved(stranger, config, used, tmp_path):
    model = stranger.make()
    compress_(model, config)
    save(model, tmp_path / "small")
    other = stranger.make(seed=2).train()
    if used:
        other(*stranger.inputs())
    loaded = load(tmp_path / "small", other)
    assert loaded is other
    assert loaded.training
    assert_equal_bits(loaded.state_dict(), state_of(model))
    assert torch.equal(stranger.call(loaded), stranger.call(model))
    assert find_sites(loaded) == find_sites(model)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(value.requires_grad for value in loaded.parameters())


def roots() -> dict[str, nn.Module]:
    return {
        "LSTM": LowRankLSTM(5, H, num_layers=2, bidirectional=True, proj_size=3),
        "cell": LowRankLSTMCell(5, H),
    }


@pytest.mark.parametrize("kind", roots())
@every_config
def test_a_module_of_ours_is_a_model_of_its_own(kind, config, tmp_path):
    model, other = roots()[kind], roots()[kind]
    compress_(model, config)
    save(model, tmp_path)
    assert_equal_bits(load(tmp_path, other).state_dict(), state_of(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every_config
def test_saved_dtypes_are_loaded(config, dtype, tmp_path):
    model = compressed("CRNN", config).to(dtype)
    # A model that is partly of another dtype is one, too.
    model.rnn[1].embedding.double()
    save(model, tmp_path)
    assert_equal_bits(load(tmp_path, fresh("CRNN")).state_dict(), state_of(model))


def test_buffers_and_parameters_in_any_layout_are_kept(tmp_path):
    model = compressed("CRNN")
    model.cnn[1].running_mean.uniform_()
    model.cnn[1].num_batches_tracked.fill_(7)
    weight = model.rnn[1].embedding.weight
    weight.data = torch.randn(weight.shape[::-1]).double().T
    assert not weight.is_contiguous()
    expected = STRANGERS["CRNN"].call(model)
    save(model, tmp_path)
    loaded = load(tmp_path, fresh("CRNN"))
    assert_equal_bits(loaded.state_dict(), state_of(model))
    torch.testing.assert_close(STRANGERS["CRNN"].call(loaded), expected)


def with_tied_decoder(seed: int, tied: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    model = LanguageModel(nn.LSTM(6, H), 6)
    model.rnn = nn.LSTM(6, 6)
    if tied:
        model.head.weight = model.words.weight
    return model


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = with_tied_decoder(0)
    compress_(model, SVD)
    save(model, tmp_path)
    stored = load_file(weights_in(tmp_path)).values()
    assert sum(value.numel() for value in stored) == sum(value.numel() for value in model.parameters())
    loaded = load(tmp_path, with_tied_decoder(1))
    assert loaded.head.weight is loaded.words.weight
    assert_equal_bits(loaded.state_dict(), state_of(model))


@every_config
def test_tied_matrices_are_tied_again(config, tmp_path):
    model = compressed("tied", config)
    save(model, tmp_path)
    loaded = load(tmp_path, fresh("tied"))
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


def test_a_model_without_ties_gets_weights_of_its_own(tmp_path):
    model = with_tied_decoder(0)
    compress_(model, SVD)
    save(model, tmp_path)
    loaded = load(tmp_path, with_tied_decoder(1, tied=False))
    assert torch.equal(loaded.head.weight, loaded.words.weight)
    with torch.no_grad():
        loaded.head.weight.zero_()
    assert torch.equal(loaded.words.weight, model.words.weight)


@every_config
def test_what_is_frozen_in_the_fresh_model_stays_frozen(config, tmp_path):
    save(compressed(config=config), tmp_path)
    model = fresh()
    model.lstm.requires_grad_(False)
    load(tmp_path, model)
    assert [name for name, value in model.lstm.named_parameters() if value.requires_grad] == []
    assert all(value.requires_grad for value in model.labels.parameters())


def test_tied_in_the_model_but_not_in_the_folder(tmp_path):
    model = with_tied_decoder(0, tied=False)
    compress_(model, SVD)
    save(model, tmp_path)
    refuse(tmp_path, "are one parameter in the model, but differ in the folder", with_tied_decoder(1))


def test_a_loaded_model_needs_its_folder_no_more(folder):
    loaded = load(folder, fresh())
    expected = state_of(compressed())
    with weights_in(folder).open("r+b") as stream:
        stream.write(bytes(weights_in(folder).stat().st_size))
    assert_equal_bits(loaded.state_dict(), expected)


def test_saved_again_the_new_model_takes_the_place_of_the_old(folder):
    old, model = weights_in(folder).name, compressed(config=MASK, seed=3)
    (folder / "notes.txt").write_text("of the user")
    save(model, folder)
    assert weights_in(folder).name != old
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "notes.txt", weights_in(folder).name}
    assert_equal_bits(load(folder, fresh()).state_dict(), state_of(model))


def test_what_was_loaded_can_be_saved_in_its_own_folder(folder):
    model = load(folder, fresh())
    expected = state_of(model)
    save(model, folder)
    save(load(folder, fresh()), folder)
    assert_equal_bits(load(folder, fresh()).state_dict(), expected)


def test_a_folder_may_be_moved(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "else" / "where")
    shutil.rmtree(folder)
    assert_equal_bits(load(str(tmp_path / "else" / "where"), fresh()).state_dict(), state_of(compressed()))


def test_files_are_data(folder):
    """JSON, and safetensors, which is a length, JSON and plain numbers."""
    config = json.loads((folder / "config.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", config["weights"]["file"]}
    content = weights_in(folder).read_bytes()
    assert hashlib.sha256(content).hexdigest() == config["weights"]["sha256"]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"F64"}
    assert len(content) == 8 + length + 8 * sum(value.numel() for value in compressed().parameters())


def test_the_folder_says_where_its_numbers_come_from(folder):
    sites = json.loads((folder / "config.json").read_text())["sites"]
    dense = STRANGERS["tagger"].make()
    for site in find_sites(compressed()):
        if site.target == "ih":
            assert site.key not in sites
            continue
        numbers = dense.lstm.get_parameter(site.name).detach().numpy().tobytes()
        assert sites[site.key] == {
            "shape": list(site.shape),
            "dtype": "float64",
            "rank": 2,
            "method": "svd",
            "source_sha256": hashlib.sha256(numbers).hexdigest(),
        }


def forge(folder: Path, **changes) -> None:
    """Changes ``config.json`` and makes its SHA-256 fit, as nobody does by accident."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None and key != "sha256"}
    config["sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new, 1))


def weights_in_config(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["weights"]["file"]


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def swap_weights(folder: Path) -> None:
    """Intact weights of the same names and shapes, but another model's."""
    save(compressed(seed=5), folder.parent / "other")
    shutil.copy(weights_in(folder.parent / "other"), weights_in(folder))


def forge_rank(folder: Path, rank: object) -> None:
    sites = json.loads((folder / "config.json").read_text())["sites"]
    sites["lstm.weight_hh_l1"]["rank"] = rank
    forge(folder, sites=sites)


def forge_parts(folder: Path, cut: object) -> None:
    forge(folder, weights=json.loads((folder / "config.json").read_text())["weights"] | {"cut": cut})


DAMAGE = {
    "no folder": (shutil.rmtree, "holds no compressed model: config.json cannot be read"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "holds no compressed model: config.json cannot be read",
    ),
    "no weights": (lambda folder: weights_in(folder).unlink(), "is incomplete: model-.* cannot be read .*copy the whole"),
    "weights a folder": (
        lambda folder: weights_in(folder).rename(folder / "x") and (folder / weights_in_config(folder)).mkdir(),
        "is incomplete: model-.* cannot be read",
    ),
    "other weights": (swap_weights, "is damaged or altered: its SHA-256"),
    "config cut": (lambda folder: cut(folder / "config.json", 0.5), "config.json is damaged"),
    "config empty": (lambda folder: cut(folder / "config.json", 0.0), "config.json is damaged"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[1]"), "not of a model that slimlstm saved"),
    "of something else": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        "not of a model that slimlstm saved",
    ),
    "edited rank": (lambda folder: edit(folder, '"rank": 2', '"rank": 3'), "was altered after it was written"),
    "edited shape": (lambda folder: edit(folder, str(4 * H), "16"), "was altered after it was written"),
    "later format": (
        lambda folder: forge(folder, format_version=5),
        "has format 5, this slimlstm reads 1, 2, 3, 4; a newer one may read it",
    ),
    "forged rank": (lambda folder: forge_rank(folder, 3), "weight_hh_l1"),
    "forged rank 0": (lambda folder: forge_rank(folder, 0), "weight_hh_l1"),
    "forged rank -1": (lambda folder: forge_rank(folder, -1), "weight_hh_l1"),
    "forged rank, too large for memory": (lambda folder: forge_rank(folder, 10**13), "weight_hh_l1"),
    "forged rank, text": (lambda folder: forge_rank(folder, "2"), "weight_hh_l1"),
    "forged, no weights": (lambda folder: forge(folder, weights=None), "config.json"),
    "forged, no weights files": (lambda folder: forge(folder, weights={"files": {}}), "it names no weights"),
    "forged, weights files a list": (lambda folder: forge(folder, weights={"files": ["model"]}), "it names no weights"),
    "forged, weights without a name": (lambda folder: forge(folder, weights={"sha256": "0"}), "it names no weights"),
    "forged, parts": (lambda folder: forge_parts(folder, {"labels.bias": 2}), "labels.bias has 2 parts, of which only 0"),
    "forged, many parts": (lambda folder: forge_parts(folder, {"labels.bias": 10**13}), "of which only 0"),
    "forged, parts a list": (lambda folder: forge_parts(folder, ["labels.bias"]), "it names no weights"),
    "forged, no parts": (lambda folder: forge_parts(folder, {"labels.bias": 0}), "it names no weights"),
    "forged, parts a text": (lambda folder: forge_parts(folder, {"labels.bias": "2"}), "it names no weights"),
    "forged, no sites": (lambda folder: forge(folder, sites=None), "config.json"),
    "forged, no aliases": (lambda folder: forge(folder, aliases=None), "config.json"),
    "forged alias": (lambda folder: forge(folder, aliases={"lstm.bias_hh_l0": "nowhere"}), "config.json"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders_are_refused(folder, damage, message):
    damage(folder)
    refuse(folder, message)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/{}/secret.safetensors", "..", "", "sub/../../secret.safetensors"]
)
def test_weights_outside_the_folder_are_not_read(folder, name):
    """Even a ``config.json`` that fits reaches nothing but its own folder."""
    secret = folder.parent / "secret.safetensors"
    shutil.copy(weights_in(folder), secret)
    digest = hashlib.sha256(secret.read_bytes()).hexdigest()
    forge(folder, weights={"file": name.format(folder.parent), "sha256": digest})
    refuse(folder, r"names no weights file in its folder|is incomplete: .* cannot be read")


@pytest.mark.parametrize("size", [0, 7, 8, 100, 0.5, -1])
def test_weights_that_were_cut_are_refused(folder, size):
    content = weights_in(folder).read_bytes()
    weights_in(folder).write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
    refuse(folder, "is damaged or altered: its SHA-256 is not the one in config.json; copy the folder again")


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    save(compressed("cell"), folder)
    return folder


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", ["safetensors", "json"])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_one_byte_makes_the_difference(intact, tmp_path, kind, place, flip):
    folder = tmp_path / "flipped"
    shutil.copytree(intact, folder, dirs_exist_ok=True)
    (path,) = folder.glob(f"*.{kind}")
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= flip
    path.write_bytes(content)
    if kind == "json" and same_json(content, intact / path.name):
        load(folder, fresh("cell"))
    else:
        refuse(folder, ".", fresh("cell"))


def same_json(content: bytes, other: Path) -> bool:
    """Whether only white space differs."""
    try:
        return json.loads(content.decode()) == json.loads(other.read_text())
    except ValueError:
        return False


def larger() -> nn.Module:
    model = fresh()
    model.lstm = nn.LSTM(6, H + 1, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    return model


def larger_head() -> nn.Module:
    model = fresh()
    model.labels = nn.Linear(2 * H, V + 1)
    return model


def renamed() -> nn.Module:
    model = fresh()
    model.rnn = model.lstm
    del model.lstm
    return model


def renamed_head() -> nn.Module:
    model = fresh()
    model.classes = model.labels
    del model.labels
    return model


def without_lstm() -> nn.Module:
    model = fresh()
    model.lstm = nn.Identity()
    return model


def scripted() -> nn.Module:
    model = fresh()
    model.lstm = torch.jit.script(model.lstm)
    return model


OTHERS = {
    "larger": (larger, r"lstm.weight_hh_l0 is \[32, 8\] in the folder, \[36, 9\] in the model"),
    "larger head": (larger_head, r"labels.weight is \[11, 16\] in the folder, \[12, 16\] in the model"),
    "renamed": (renamed, r"the folder's lstm.weight_hh_l0 is not in the model, which has rnn.weight_ih_l0, "),
    "renamed head": (renamed_head, r"it lacks classes\.weight, classes\.bias; the model lacks labels\.(weight|bias), "),
    "another model": (lambda: fresh("seq2seq"), "the folder's lstm.weight_hh_l0 is not in the model"),
    "without LSTM": (without_lstm, "the folder's lstm.weight_hh_l0 is not in the model, which has no LSTM"),
    "more factored": (lambda: compressed(config=LowRank(rank=2)), "it lacks lstm.weight_ih_l0_u, "),
    "more masked": (lambda: compressed(config=Prune(rank=2)), "it lacks lstm.parametrizations.weight_ih_l0.original, "),
    "scripted": (scripted, "'lstm' is a torch.jit module"),
}


@pytest.mark.filterwarnings("ignore::Warning:torch")
@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_other_models_are_refused(folder, make, message):
    refuse(folder, message, make())


def test_integers_are_not_loaded_into_a_parameter(tmp_path):
    def model(count: Tensor) -> nn.Module:
        made = nn.ModuleDict({"lstm": nn.LSTM(6, 8), "counter": nn.Module()})
        if isinstance(count, nn.Parameter):
            made["counter"].count = count
        else:
            made["counter"].register_buffer("count", count)
        return made

    saved = model(torch.tensor(3))
    compress_(saved, LowRank(rank=2))
    save(saved, tmp_path)
    refuse(tmp_path, r"counter\.count is torch\.int64 in the folder, a parameter", model(nn.Parameter(torch.zeros(()))))


def test_masks_are_not_put_on_factors(tmp_path):
    save(compressed(config=MASK), tmp_path)
    refuse(tmp_path, "lstm.weight_hh_l0", compressed(config=SVD))


def test_a_dense_model_is_not_saved(tmp_path):
    with pytest.raises(SlimLSTMError, match="nothing in the model is compressed; call compress_ first"):
        save(fresh(), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_tensor_is_not_saved(tmp_path):
    class Remembers(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

    model = compressed()
    model.labels = Remembers(2 * H, V)
    with pytest.raises(SlimLSTMError, match=r"more than tensors: labels\._extra_state; it cannot be stored as data"):
        save(model, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


UNSTORABLE = {
    "complex128": (lambda: {"buffer": torch.zeros(2, dtype=torch.complex128)}, {}, "buffer is torch.complex128, which saf"),
    "lazy": (lambda: {"buffer": nn.UninitializedBuffer()}, {}, "buffer of a lazy module has no numbers yet"),
    "bytes in words": (lambda: {"buffer": torch.zeros(2)}, {"max_shard_bytes": "1GB"}, "a number of bytes, .* not '1GB'"),
    "no bytes": (lambda: {"buffer": torch.zeros(2)}, {"max_shard_bytes": 0}, "does not fit"),
}


@pytest.mark.parametrize("name", UNSTORABLE)
def test_what_files_cannot_hold_is_refused(name, tmp_path):
    make, given, message = UNSTORABLE[name]
    model = compressed()
    for key, value in make().items():
        model.register_buffer(key, value)
    with pytest.raises(SlimLSTMError, match=message):
        save(model, tmp_path / "small", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_file_that_folders_cannot_hold_is_refused(tmp_path):
    torch.save({**fresh().state_dict(), "buffer": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "dense.pt")
    with pytest.raises(SlimLSTMError, match=r"buffer is torch\.complex128"):
        compress_file(tmp_path / "dense.pt", SVD, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_lazy_model_is_not_loaded_into(folder):
    model = fresh()
    model.more = nn.LazyLinear(2)
    with pytest.raises(SlimLSTMError, match=r"more\.weight, more\.bias of a lazy module has no numbers yet"):
        load(folder, model)


def test_empty_buffers_are_kept_in_small_files(tmp_path):
    model, other = compressed(), fresh()
    for one in (model, other):
        one.register_buffer("empty_" + 100 * "x", torch.zeros(0, 3))
    save(model, tmp_path, max_shard_bytes=1200)
    assert_equal_bits(load(tmp_path, other).state_dict(), state_of(model))


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "[]", "not JSON", '"text"'])
def test_the_config_of_something_else_is_never_overwritten(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SlimLSTMError, match=r"a config\.json of something else, which would be lost; name another folder"):
        save(compressed(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == content


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "small").write_text("precious")
    with pytest.raises(SlimLSTMError, match="small is a file; name a folder"):
        save(compressed(), tmp_path / "small")
    assert (tmp_path / "small").read_text() == "precious"


class PowerError(Exception):
    """The power goes off."""


def crash_at(monkeypatch, owner, name: str, call: int) -> None:
    """The ``call``-th call of a function raises, after having done half its work where it writes a file."""
    done, original = [], getattr(owner, name)

    def crashing(*args, **settings):
        done.append(name)
        if len(done) < call:
            return original(*args, **settings)
        if name == "write_bytes":
            original(*args, **settings)
            os.truncate(args[0], args[0].stat().st_size // 2)
        raise PowerError

    monkeypatch.setattr(owner, name, crashing)


STEPS = {
    "weights half written": (Path, "write_bytes", 1),
    "config not written": (Path, "write_text", 1),
    "weights not flushed": (os, "fsync", 1),
    "config not flushed": (os, "fsync", 3),
    "weights not in place": (Path, "replace", 1),
    "config not in place": (Path, "replace", 2),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_crash_leaves_the_old_model(folder, monkeypatch, step):
    new = compressed(config=MASK, seed=3)
    with monkeypatch.context() as patch:
        crash_at(patch, *step)
        with pytest.raises(PowerError):
            save(new, folder)
    assert_equal_bits(load(folder, fresh()).state_dict(), state_of(compressed()))
    save(new, folder)
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", weights_in(folder).name}
    assert_equal_bits(load(folder, fresh()).state_dict(), state_of(new))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.slow
def test_a_crash_leaves_no_half_model(tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        crash_at(patch, *step)
        with pytest.raises(PowerError):
            save(compressed(), tmp_path)
    refuse(tmp_path, "holds no compressed model: config.json cannot be read")
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors"}
    save(compressed(), tmp_path)
    assert_equal_bits(load(tmp_path, fresh()).state_dict(), state_of(compressed()))


def test_a_crash_after_the_change_leaves_the_new_model(folder, monkeypatch):
    new = compressed(config=MASK, seed=3)
    with monkeypatch.context() as patch:
        crash_at(patch, Path, "unlink", 1)
        with pytest.raises(PowerError):
            save(new, folder)
    assert_equal_bits(load(folder, fresh()).state_dict(), state_of(new))


# The model card.


def test_the_card_has_figures_and_lines_that_load(folder, monkeypatch):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: slimlstm\n")
    for key, site in json.loads((folder / "config.json").read_text())["sites"].items():
        m, n = site["shape"]
        assert f"| `{key}` | {m} x {n} | " in text
        assert f"| {getattr(torch, site['dtype']).itemsize * m * n:,} |" in text
    lines = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder.parent)
    names = {"MyModel": fresh}
    exec(lines, names)  # noqa: S102 (the lines are under test)
    assert_equal_bits(names["model"].state_dict(), state_of(compressed()))


OWN = {
    "a file of the user": lambda path, adopted: path.write_text("mine"),
    "another encoding": lambda path, adopted: path.write_bytes(b"\xff\xfemine"),
    "a card that was adopted": lambda path, adopted: path.write_text(adopted),
    "a link to nothing": lambda path, adopted: path.symlink_to("notes.txt"),
    "a link to a card": lambda path, adopted: (
        path.with_name("notes.txt").write_text(card.MARK),
        path.symlink_to("notes.txt"),
    ),
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_a_readme_of_the_user_stays(folder, own):
    path = folder / "README.md"
    adopted = path.read_text().replace(card.MARK, "")
    path.unlink()
    own(path, adopted)
    before = path.is_symlink(), path.exists() and path.read_bytes()
    save(compressed(config=MASK, seed=3), folder)
    assert (path.is_symlink(), path.exists() and path.read_bytes()) == before
    assert_equal_bits(load(folder, fresh()).state_dict(), state_of(compressed(config=MASK, seed=3)))


def test_a_card_follows_the_model(folder):
    before = (folder / "README.md").read_text()
    save(compressed(config=MASK, seed=3), folder)
    assert (folder / "README.md").read_text() != before
