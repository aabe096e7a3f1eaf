"""Folders whose weights are in several files: each within its size, together the model to the bit."""

import json
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from strangers import STRANGERS
from torch import nn

from slimlstm import LowRank, Prune, Quantize, SlimLSTMError, compress_, load, save
from slimlstm.shards import join, split
from slimlstm.weight_files import read_tensors

CONFIGS = {
    "svd": LowRank(rank=2),
    "prune": Prune(rank=2),
    "int8": Quantize("int8"),
    "int4": Quantize("int4"),
    "svd and int4": LowRank(rank=2, storage="int4"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool]


def compressed(config, seed=0):
    model = STRANGERS["CRNN"].make(seed).float()
    compress_(model, config)
    return model


def config_in(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


shapes = st.lists(st.integers(0, 9), max_size=3)
names = st.text(string.printable, min_size=1, max_size=60)


@given(
    st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=9),
    st.integers(500, 3000),
)
def test_groups_fit_and_join_to_the_bit(described, most):
    tensors = {name: torch.empty(shape).uniform_(-99, 99).to(dtype) for name, (shape, dtype) in described.items()}
    try:
        groups, cut = split(tensors, most)
    except SlimLSTMError as error:
        assert "does not fit" in str(error) or "is taken" in str(error)
        return
    assert all(group for group in groups)
    assert all(len(as_bytes(group, metadata={"format": "pt"})) <= most for group in groups)
    assert sum(map(len, groups)) == len({name for group in groups for name in group})
    joined = join({name: tensor for group in groups for name, tensor in group.items()}, cut)
    assert joined.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert joined[name].dtype == tensor.dtype
        assert joined[name].shape == tensor.shape
        assert torch.equal(joined[name], tensor)


@every_config
@pytest.mark.parametrize("most", [900, 3000, 10**6])
def test_a_model_in_several_files_is_the_same_model(config, most, tmp_path):
    model = compressed(config)
    save(model, tmp_path, max_shard_bytes=most)
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) == 1) == (most == 10**6)
    assert max(path.stat().st_size for path in shards) <= most
    state = load(tmp_path, STRANGERS["CRNN"].make(seed=2).float()).state_dict()
    read = read_tensors(tmp_path)
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(read[name], tensor)


def test_each_file_is_plain_safetensors_that_config_names(tmp_path):
    save(compressed(LowRank(rank=2)), tmp_path, max_shard_bytes=900)
    config = config_in(tmp_path)
    assert config["format_version"] == 4
    assert set(config["weights"]["files"]) == {path.name for path in tmp_path.glob("*.safetensors")}
    stored = {name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    for name, count in config["weights"]["cut"].items():
        assert {f"{name}.part{index}" for index in range(count)} <= stored
        assert name not in stored


def test_one_file_has_the_format_that_earlier_versions_read(tmp_path):
    save(compressed(LowRank(rank=2)), tmp_path, max_shard_bytes=10**6)
    assert config_in(tmp_path)["format_version"] == 1
    assert set(config_in(tmp_path)["weights"]) == {"file", "sha256"}


@pytest.mark.parametrize(("first", "second"), [(900, 3000), (900, None), (None, 900)])
def test_saved_again_only_the_files_of_the_old_model_go(first, second, tmp_path):
    kept = [tmp_path / "model-best.safetensors", tmp_path / "model-00001-of-00002.safetensors", tmp_path / "notes.txt"]
    for path in kept:
        path.write_text("of the user")
    save(compressed(LowRank(rank=2)), tmp_path, max_shard_bytes=first)
    model = compressed(Prune(rank=2), seed=3)
    save(model, tmp_path, max_shard_bytes=second)
    config = config_in(tmp_path)["weights"]
    files = set(config.get("files", [config.get("file")]))
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", *files, *(path.name for path in kept)}
    assert all(path.read_text() == "of the user" for path in kept)
    state = load(tmp_path, STRANGERS["CRNN"].make(seed=2).float()).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is incomplete: model-.* cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), "is damaged or altered: its SHA-256"),
    ],
    ids=["missing", "altered"],
)
def test_damage_in_any_file_is_seen(index, damage, message, tmp_path):
    save(compressed(LowRank(rank=2)), tmp_path, max_shard_bytes=900)
    damage(sorted(tmp_path.glob("*.safetensors"))[index])
    with pytest.raises(SlimLSTMError, match=message):
        load(tmp_path, STRANGERS["CRNN"].make(seed=2).float())


REFUSED = {
    "a row too large": (nn.LSTM(3, 400), LowRank(rank=1), 600, r"one row of weight_hh_l0_v \[1, 400\] does not fit"),
    "no room for anything": (nn.LSTM(3, 4), LowRank(rank=1), 10, "one row of .* does not fit into 10 bytes"),
    "negative": (nn.LSTM(3, 4), LowRank(rank=1), -1, "does not fit"),
}


@pytest.mark.parametrize(("model", "config", "most", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(model, config, most, message, tmp_path):
    compress_(model, config)
    with pytest.raises(SlimLSTMError, match=message):
        save(model, tmp_path / "small", max_shard_bytes=most)
    assert not (tmp_path / "small").exists()


def test_a_name_that_a_part_would_need_is_refused():
    with pytest.raises(SlimLSTMError, match=r"its part's name w\.part0 is taken"):
        split({"w": torch.ones(100, 10), "w.part0": torch.ones(1)}, 2000)
