"""ELMo: its files, characters, padding, states and clips.

Dimensions: B sentences, T tokens, P projection size, H cells.
"""

import json
from copy import deepcopy

import pytest
import torch
from paper_helpers import SENTENCES, TINY, tiny
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import slimlstm as sl
from paper.characters import characters_of
from paper.elmo import BiLM, ClippedLSTM, ELMo
from paper.elmo_files import load_bilm, save_bilm
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.ops import native

h5py = pytest.importorskip("h5py")

needs_kernel = pytest.mark.skipif(native.missing is not None, reason="the kernel is not built")


def test_the_official_format_is_written_as_it_is_read(tmp_path):
    model, characters = tiny(), characters_of(SENTENCES)
    save_bilm(model, tmp_path / "elmo")
    loaded = load_bilm(tmp_path / "elmo")
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(characters)[0], model(characters)[0])
    sl.compress_(model, sl.LowRank("svd", rank=2))
    with pytest.raises(sl.SlimLSTMError, match=r"holds dense matrices; write a compressed model with slimlstm.save"):
        save_bilm(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_files_refused(tmp_path):
    with pytest.raises(sl.SlimLSTMError, match=r"has 0 files \*options.json and 0 files"):
        load_bilm(tmp_path)
    save_bilm(tiny(), tmp_path)
    options = json.loads((tmp_path / "options.json").read_text(encoding="utf-8"))
    for change, message in (
        ({"lstm": {**options["lstm"], "dim": 25}}, r"is \[16, 96\]; .* imply \[16, 100\]"),
        ({"lstm": {}}, "these are not the options of an ELMo: KeyError 'dim'"),
        ({"char_cnn": {**options["char_cnn"], "activation": "gelu"}}, "no activation 'gelu' is known"),
    ):
        (tmp_path / "options.json").write_text(json.dumps(options | change), encoding="utf-8")
        with pytest.raises(sl.SlimLSTMError, match=message):
            load_bilm(tmp_path)
    (tmp_path / "options.json").write_text("{", encoding="utf-8")
    with pytest.raises(sl.SlimLSTMError, match="cannot be read"):
        load_bilm(tmp_path)
    (tmp_path / "options.json").write_text(json.dumps(options), encoding="utf-8")
    (tmp_path / "weights.hdf5").write_bytes(b"not an HDF5 file")
    with pytest.raises(sl.SlimLSTMError, match="does not hold the weights of an ELMo"):
        load_bilm(tmp_path)


def test_characters_are_the_bytes_of_the_official_scheme():
    characters = characters_of([["né", "x" * 60], ["a"]])
    assert characters.shape == (2, 2, 50)
    # Begin of word, the bytes, end of word, no character; each one higher.
    assert characters[0, 0].tolist() == [259, ord("n") + 1, 0xC3 + 1, 0xA9 + 1, 260, *[261] * 45]
    assert characters[0, 1].tolist() == [259, *[ord("x") + 1] * 48, 260]
    assert not characters[1, 1].any()
    with pytest.raises(sl.SlimLSTMError, match=r"have to be \[B, T, 50\], not \[2, 2\]"):
        tiny()(characters[..., 0])


@pytest.mark.parametrize("make", [tiny, lambda: sl.compress_(model := tiny(), sl.LowRank(rank=2)) and model])
def test_padding_changes_nothing(make):
    model = make()
    together, states = model(characters_of(SENTENCES))
    for row, sentence in enumerate(SENTENCES):
        alone, state = model(characters_of([sentence]))
        assert not together[:, row, len(sentence) :].any()
        torch.testing.assert_close(together[:, row, : len(sentence)], alone[:, 0])
        for pairs, pairs_alone in zip(states, state, strict=True):
            for (h, c), (h_alone, c_alone) in zip(pairs, pairs_alone, strict=True):
                torch.testing.assert_close(h[:, row], h_alone[:, 0])
                torch.testing.assert_close(c[:, row], c_alone[:, 0])


def test_a_stateful_model_keeps_rows_that_a_smaller_batch_leaves_out():
    model = tiny()
    elmo, first, second = ELMo(model, stateful=True).eval(), characters_of(SENTENCES), characters_of([["Then", "this"]])
    elmo.activations(first)
    elmo.activations(second)
    third = elmo.activations(first)
    _, state = model(first)
    _, state_of_first_row = model(second, [[(h[:, :1], c[:, :1]) for h, c in pairs] for pairs in state])
    mixed = [
        [(torch.cat([a, h[:, 1:]], 1), torch.cat([b, c[:, 1:]], 1)) for (a, b), (h, c) in zip(new, old, strict=True)]
        for new, old in zip(state_of_first_row, state, strict=True)
    ]
    torch.testing.assert_close(third, model(first, mixed)[0])
    elmo.reset_state()
    torch.testing.assert_close(elmo.activations(first), model(first)[0])


def test_without_clips_a_layer_is_pytorchs():
    lstm = ClippedLSTM(5, 12, 4, None, None)
    plain = nn.LSTM(5, 12, proj_size=4, batch_first=True)
    plain.load_state_dict(lstm.state_dict())
    x = torch.randn(2, 6, 5)
    assert torch.equal(lstm(x)[0], plain(x)[0])
    unbound = ClippedLSTM(5, 12, 4, 1e9, 1e9)
    unbound.load_state_dict(lstm.state_dict())
    torch.testing.assert_close(unbound(x)[0], plain(x)[0])
    ours, theirs = nn.Sequential(lstm), nn.Sequential(plain)
    for model in (ours, theirs):
        sl.compress_(model, sl.LowRank(rank=2))
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@needs_kernel
@pytest.mark.parametrize("bounds", [(0.3, 0.05), (None, 0.05), (0.3, None)], ids=str)
@pytest.mark.parametrize("rank", [None, 3], ids=["dense", "low rank"])
@pytest.mark.parametrize("threads", [1, -2])
def test_clips_of_every_backend(bounds, rank, threads, monkeypatch):
    """Packed in any order, from given states, against the model's own loop."""
    lstm = ClippedLSTM(9, 50, 21, *bounds)
    with torch.no_grad():
        lstm.weight_hr_l0.mul_(3.0)
    factors = {}
    if rank:
        for name in ("weight_ih_l0", "weight_hh_l0"):
            factors[name] = torch.randn(200, rank), torch.randn(rank, getattr(lstm, name).shape[1]) / 3
            getattr(lstm, name).data = factors[name][0] @ factors[name][1]
    packed = pack_padded_sequence(torch.randn(4, 7, 9), torch.tensor([3, 7, 1, 7]), True, enforce_sorted=False)
    states = torch.randn(1, 4, 21), torch.randn(1, 4, 50)
    module = LowRankLSTM.from_dense(lstm, factors)
    assert (module.cell_clip, module.proj_clip) == bounds
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.no_grad():
        expected, (h, c) = lstm(packed, states)
        assert expected.data.abs().max() == 0.05 or bounds[1] is None
        assert bool(c.abs().max() <= 0.3) == (bounds[0] is not None)
        for backend in ("fused", "reference"):
            module.backend = backend
            found, (h_found, c_found) = module(packed, states)
            torch.testing.assert_close(found.data, expected.data)
            torch.testing.assert_close((h_found, c_found), (h, c))
        module.backend = "dense"
        with pytest.raises(sl.SlimLSTMError, match="PyTorch's LSTM cannot clip"):
            module(packed, states)


@needs_kernel
def test_a_clip_that_is_changed_is_seen():
    module = LowRankLSTM(3, 8, proj_size=2, cell_clip=0.01)
    x = torch.randn(5, 1, 3)
    with torch.no_grad():
        tight = module(x)[1][1]
        module.cell_clip = None
        wide = module(x)[1][1]
    assert tight.abs().max() <= 0.01 < wide.abs().max()


def test_clips_refused():
    for settings, message in (
        ({"cell_clip": 0.0}, "cell_clip is a bound above zero, or None for no bound, not 0.0"),
        ({"proj_clip": 1.0}, "proj_clip bounds projected outputs, but proj_size is 0"),
    ):
        with pytest.raises(sl.SlimLSTMError, match=message):
            LowRankLSTM(3, 8, **settings)
    with pytest.raises(sl.SlimLSTMError, match=r"nn.LSTM does not clip cells or projections"):
        LowRankLSTM(3, 8, cell_clip=1.0).to_dense()


def test_gradients_go_through_clips_and_factors():
    lstm = ClippedLSTM(4, 10, 3, 0.2, 0.1).double()
    u, v = torch.randn(40, 2).double(), torch.randn(2, 3).double()
    lstm.weight_hh_l0.data = u @ v
    module = LowRankLSTM.from_dense(deepcopy(lstm), {"weight_hh_l0": (u, v)})
    x = torch.randn(2, 5, 4).double()
    lstm(x)[0].square().sum().backward()
    module(x)[0].square().sum().backward()
    torch.testing.assert_close(module.weight_hh_l0_u.grad, lstm.weight_hh_l0.grad @ v.t())
    torch.testing.assert_close(module.weight_hh_l0_v.grad, u.t() @ lstm.weight_hh_l0.grad)
    torch.testing.assert_close(module.weight_hr_l0.grad, lstm.weight_hr_l0.grad)


def test_a_frozen_language_model_stays_in_evaluation_mode():
    elmo = ELMo(BiLM(TINY)).train()
    assert elmo.training
    assert not elmo.bilm.training
    assert {name for name, parameter in elmo.named_parameters() if parameter.requires_grad} == {"weights", "gamma"}
    elmo.bilm.requires_grad_(True)
    assert elmo.train().bilm.training


def test_the_mix_of_the_layers():
    elmo, characters = ELMo(tiny(), dropout=0.0).eval(), characters_of(SENTENCES)
    with torch.no_grad():
        elmo.weights.copy_(torch.tensor([0.0, 1.0, 2.0]))
        elmo.gamma.fill_(3.0)
    parts = torch.tensor([0.0, 1.0, 2.0]).exp()
    expected = 3.0 * (elmo.activations(characters) * (parts / parts.sum())[:, None, None, None]).sum(0)
    torch.testing.assert_close(elmo(characters), expected)


@needs_kernel
def test_clips_in_exported_programs():
    model, x = nn.Sequential(LowRankLSTM(4, 10, proj_size=3, cell_clip=0.2, proj_clip=0.05)).eval(), torch.randn(6, 2, 4)
    with torch.no_grad():
        model[0].weight_hr_l0.mul_(3.0)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x)[0], model(x)[0])
        assert model(x)[0].abs().max() == 0.05
