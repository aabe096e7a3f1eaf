import json
import re
from dataclasses import astuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from slimlstm import LowRank, Prune, SlimLSTMError, compress_
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig, config_of, load_awd_lstm, locked_dropout, save_awd_lstm

V, E, H, LAYERS, T, B = 11, 6, 8, 3, 7, 4
DRY = AWDLSTMConfig(V, E, H, LAYERS).scaled(0.0)
RATES = ("dropout_embedding", "dropout_input", "dropout_hidden", "dropout_output", "weight_drop")


def make(**rates):
    """An AWD-LSTM in float64 with the same weights every time, and no dropout but what is asked for."""
    torch.manual_seed(0)
    return AWDLSTM(AWDLSTMConfig(**(vars(DRY) | rates))).double()


@pytest.fixture
def tokens():
    return torch.randint(V, (T, B))


def signals(model, tokens):
    """The inputs and outputs of every LSTM in one call, and the features."""
    seen = []
    for lstm in model.lstms:
        lstm.register_forward_hook(lambda _, inputs, outputs: seen.extend([inputs[0], outputs[0]]))
    features = model.features(tokens)[0]
    return [signal.detach() for signal in (*seen, features)]


def test_shapes(tokens):
    logits, state = make()(tokens)
    assert logits.shape == (T, B, V)
    assert [(h.shape, c.shape) for h, c in state] == [((1, B, n), (1, B, n)) for n in (H, H, E)]
    assert make().features(tokens)[0].shape == (T, B, E)


def test_the_softmax_shares_the_embeddings_weights(tokens):
    model = make()
    assert model.decoder.weight is model.embedding.weight
    nn.init.normal_(model.decoder.bias)
    features, _ = model.features(tokens)
    assert_close(model(tokens)[0], features @ model.embedding.weight.T + model.decoder.bias)


def test_a_carried_state_is_one_long_call(tokens):
    model = make()
    whole, last = model(tokens)
    first, state = model(tokens[:3])
    second, state = model(tokens[3:], state)
    assert_close(torch.cat([first, second]), whole, rtol=1e-12, atol=1e-12)
    assert_close(state, last, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(tokens[3:])[0], second)


@pytest.mark.parametrize("rate", RATES)
def test_dropout_acts_in_training_only(rate, tokens):
    model = make(**{rate: 0.5})
    dry = make()(tokens)[0]
    assert torch.equal(model.eval()(tokens)[0], dry)
    assert not torch.allclose(model.train()(tokens)[0], dry)
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    ("rate", "places"),
    [("dropout_input", [0]), ("dropout_hidden", [2, 4]), ("dropout_output", [6])],
)
def test_a_locked_mask_is_one_for_all_steps(rate, places, tokens):
    model = make(**{rate: 0.5})
    seen = signals(model.train(), tokens)
    for place in range(0, 2 * LAYERS + 1, 2):
        whole = model.embedding(tokens).detach() if place == 0 else seen[place - 1]
        factor = seen[place] / whole
        if place in places:
            assert torch.equal(factor.round(decimals=9), factor[:1].round(decimals=9).expand_as(factor))
            assert set(factor.round(decimals=9).flatten().tolist()) == {0.0, 2.0}
        else:
            assert torch.equal(seen[place], whole)


def test_locked_dropout_keeps_the_mean():
    x = torch.ones(2, 100, 100)
    assert_close(locked_dropout(x, 0.25, training=True).mean(), torch.tensor(1.0), rtol=0.03, atol=0.0)


def test_embedding_dropout_drops_whole_words_everywhere():
    model = make(dropout_embedding=0.5)
    tokens = torch.arange(V).repeat(2)[:, None]
    factor = (signals(model.train(), tokens)[0] / model.embedding(tokens).detach())[:, 0]
    assert all(set(word.round(decimals=9).tolist()) in ({0.0}, {2.0}) for word in factor)
    assert {word[0].round(decimals=9).item() for word in factor} == {0.0, 2.0}
    assert torch.equal(factor[:V], factor[V:])


def test_weight_drop_leaves_the_weights_and_gives_gradients(tokens):
    model = make(weight_drop=0.5).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(tokens)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    # A dropped weight has no part in the output, every other one has.
    dropped = torch.cat([(lstm.weight_hh_l0.grad == 0.0).flatten() for lstm in model.lstms])
    assert 0.3 < dropped.double().mean() < 0.7


@pytest.mark.parametrize("rate", [0.1, 0.75, 1.0])
def test_weight_drop_scales_the_weights_that_it_leaves(rate):
    """Weights whose number four does not divide, so that the last number drawn serves fewer."""
    model = AWDLSTM(AWDLSTMConfig(11, 101, 101, 1, weight_drop=rate)).train()
    used = []
    model.lstms[0].forward = lambda x, state: used.append(model.lstms[0].weight_hh_l0) or (x, None)
    model.features(torch.randint(11, (2, 1)))
    ratio = (used[0] / model.lstms[0].weight_hh_l0).detach()
    left = ratio != 0.0
    assert left.double().mean() == pytest.approx(1.0 - rate, abs=0.02)
    assert_close(ratio[left], torch.full_like(ratio[left], 1.0 / (1.0 - rate) if rate < 1.0 else 0.0))


def test_weight_drop_makes_way_for_factors(tokens):
    model = make(weight_drop=0.5)
    compress_(model, LowRank(rank=1))
    assert torch.equal(model.train()(tokens)[0], model.eval()(tokens)[0])


def test_weight_drop_goes_on_under_a_mask(tokens):
    model = make(weight_drop=0.5)
    compress_(model, Prune(keep=0.5))
    assert not torch.equal(model.train()(tokens)[0], model(tokens)[0])
    model(tokens)[0].square().sum().backward()
    for lstm in model.lstms:
        dropped_or_masked = lstm.parametrizations.weight_hh_l0.original.grad == 0.0
        assert dropped_or_masked[lstm.weight_hh_l0 == 0.0].all()
        assert 0.6 < dropped_or_masked.double().mean() < 0.9


@pytest.mark.parametrize(
    "config",
    [None, LowRank(rank=2), LowRank(rank=2, target="hh"), Prune(rank=2), Prune(rank=2, target="ih")],
    ids=str,
)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_config_of_reads_the_sizes(config, layers):
    model = AWDLSTM(AWDLSTMConfig(V, E, E if layers == 1 else H, layers))
    if config is not None:
        compress_(model, config)
    assert config_of(model.state_dict()) == AWDLSTMConfig(V, E, E if layers == 1 else H, layers)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"embedding.weight": torch.ones(3)}, {"embedding.weight": torch.ones(3, 2)}, nn.LSTM(2, 3).state_dict()],
)
def test_config_of_refuses_other_tensors(tensors):
    with pytest.raises(SlimLSTMError, match="AWD-LSTM"):
        config_of(tensors)


def test_scaled_multiplies_every_rate():
    published = AWDLSTMConfig(V)
    assert all(getattr(published.scaled(0.5), rate) == getattr(published, rate) / 2 > 0.0 for rate in RATES)
    assert astuple(published.scaled(0.5))[:4] == astuple(published)[:4]


def state_of(model, dtype=torch.float32):
    """The tensors as stored: without the softmax's name for the embedding."""
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if name != "decoder.weight"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tied_twice", [False, True])
def test_load_awd_lstm(dtype, tied_twice, tmp_path):
    state = state_of(make(), dtype)
    stored = state | ({"decoder.weight": state["embedding.weight"].clone()} if tied_twice else {})
    save_file(stored, tmp_path / "model.safetensors")
    model = load_awd_lstm(tmp_path)
    assert not model.training
    assert model.decoder.weight is model.embedding.weight
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in state_of(model).items())


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


FOREIGN = {
    "one tensor too few": lambda state: without(state, "lstms.1.weight_hh_l0"),
    "one tensor too many": lambda state: state | {"lstms.0.weight_hr_l0": torch.ones(2, 2)},
    "another shape": lambda state: state | {"lstms.1.weight_hh_l0": torch.ones(4 * H, H + 1)},
    "no embedding": lambda state: without(state, "embedding.weight"),
    "no LSTM": lambda state: {"embedding.weight": state["embedding.weight"]},
    "GRUs": lambda state: {**state, **{f"lstms.0.{k}": v for k, v in nn.GRU(E, H).state_dict().items()}},
    "a softmax with weights of its own": lambda state: state | {"decoder.weight": torch.ones(V, E)},
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_load_awd_lstm_refuses_other_models(change, tmp_path):
    save_file(change(state_of(make())), tmp_path / "model.safetensors")
    with pytest.raises(SlimLSTMError, match="does not hold an AWD-LSTM"):
        load_awd_lstm(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_load_awd_lstm_refuses_a_cut_file(kept, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state_of(make()), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SlimLSTMError, match="does not hold an AWD-LSTM"):
        load_awd_lstm(tmp_path)


def test_load_awd_lstm_names_the_missing_file(tmp_path):
    with pytest.raises(SlimLSTMError, match=r"nowhere has no model\.safetensors"):
        load_awd_lstm(tmp_path / "nowhere")


@pytest.mark.parametrize("shard_bytes", [16_000_000, 700, 500])
def test_shards_hold_the_model_in_half_precision(shard_bytes, tmp_path):
    model = make()
    save_awd_lstm(model, tmp_path, shard_bytes=shard_bytes)
    files = sorted(path.name for path in tmp_path.iterdir())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert files == sorted({"model.safetensors.index.json", *index["weight_map"].values()})
    assert (len(files) > 2) == (shard_bytes < 16_000_000)
    assert any(".part1" in name for name in index["weight_map"]) == (shard_bytes < 16_000_000)
    assert max((tmp_path / file).stat().st_size for file in files[:-1]) <= shard_bytes
    sizes = [sum(2 * tensor.numel() for tensor in load_file(tmp_path / file).values()) for file in files[:-1]]
    assert sum(sizes) == index["metadata"]["total_size"]
    found, state = state_of(load_awd_lstm(tmp_path)), state_of(model, torch.float16)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in state.items())


@pytest.mark.slow
def test_shards_of_a_model_as_large_as_the_published_ones_are_small(tmp_path):
    save_awd_lstm(AWDLSTM(AWDLSTMConfig(33_278, num_layers=2)), tmp_path)
    shards = list(tmp_path.glob("*.safetensors"))
    # The embedding alone takes 26.6 MB.
    assert len(shards) >= 3
    assert max(path.stat().st_size for path in shards) <= 16_000_000
    assert load_awd_lstm(tmp_path).config.vocab_size == 33_278


def test_what_shards_cannot_hold_is_refused(tmp_path):
    def refused(model, message, **options):
        with pytest.raises(SlimLSTMError, match=message):
            save_awd_lstm(model, tmp_path / "new", **options)
        assert not list(tmp_path.glob("new/model-*"))

    refused(make(), "one row of", shard_bytes=200)
    large, compressed = make(), make()
    with torch.no_grad():
        large.lstms[0].weight_hh_l0[0, 0] = 1e5
    refused(large, r"half precision cannot hold lstms\.0\.weight_hh_l0, whose numbers exceed 65504")
    compress_(compressed, LowRank(rank=1))
    refused(compressed, "only a dense")
    (tmp_path / "new").mkdir()
    save_file(state_of(make()), tmp_path / "new" / "model.safetensors")
    refused(make(), "exists and would be read instead")


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {"a": "../a"}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_says_nothing_is_refused(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(SlimLSTMError, match="its index cannot be read"):
        load_awd_lstm(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save_awd_lstm(make(), tmp_path, shard_bytes=700)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].rename(tmp_path / "elsewhere")
    with pytest.raises(SlimLSTMError, match=shards[1].name):
        load_awd_lstm(tmp_path)
    shards[0].replace(shards[1])
    save_file({"other": torch.ones(1)}, shards[0])
    with pytest.raises(SlimLSTMError, match="is damaged: its SHA-256 is not the one in the index"):
        load_awd_lstm(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    del content["metadata"]  # as other programs write it
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SlimLSTMError, match=r"index and shards differ in .*other"):
        load_awd_lstm(tmp_path)


def test_a_new_model_replaces_the_shards_of_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"the user's")
    save_awd_lstm(make(), tmp_path, shard_bytes=10_250)
    before = {path.name for path in tmp_path.iterdir()}
    other = make()
    with torch.no_grad():
        other.embedding.weight.add_(1)
    save_awd_lstm(other, tmp_path)
    assert len({path.name for path in tmp_path.iterdir()} - before) == 1
    assert {path.name for path in tmp_path.iterdir()} & before == {
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert state_of(load_awd_lstm(tmp_path)).keys() == state_of(other, torch.float16).keys()


def published(model):
    """The tensors by the names of the published code."""
    return {
        re.sub(r"^lstms\.(\d+)\.", r"rnns.\1.module.", name).replace("embedding.", "encoder."): tensor
        for name, tensor in model.state_dict().items()
    }


def test_a_pickled_state_dict_is_read(tmp_path):
    model = make()
    torch.save(published(model), tmp_path / "model.pt")
    found = state_of(load_awd_lstm(tmp_path))
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in state_of(model).items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([make(), nn.CrossEntropyLoss()], r"pickled code, which slimlstm does not run.*model\.state_dict\(\)"),
        ([1, 2], "not a dictionary of tensors"),
        ({"epoch": 3}, "not a dictionary of tensors"),
        ({"a": torch.ones(1)}, "not the tensors of an AWD-LSTM"),
    ],
    ids=["modules", "numbers", "a number", "another model"],
)
def test_other_pickles_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(SlimLSTMError, match=message):
        load_awd_lstm(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_cut_pickle_is_refused(kept, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(published(make()), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SlimLSTMError, match="does not hold an AWD-LSTM"):
        load_awd_lstm(tmp_path)
