"""ELMo against the reference's own outputs, and compressed by every method."""

import json
from copy import deepcopy

import pytest
import torch
from paper_helpers import SENTENCES, tiny
from torch import nn

import slimlstm as sl
from paper.characters import characters_of
from paper.elmo import ClippedLSTM, ELMo
from paper.elmo_files import read_bilm
from slimlstm.modules.lstm import LowRankLSTM

h5py = pytest.importorskip("h5py")


@pytest.fixture
def fixture(data_folder):
    """The folder of the official tiny model and its expected embeddings."""
    return data_folder / "elmo_fixture"


def official(fixture):
    return read_bilm(fixture / "options.json", fixture / "lm_weights.hdf5")


def expected_embeddings(fixture):
    """By list and sentence, the last layer's activations [T, 2 P]."""
    found = []
    for k in range(3):
        with h5py.File(fixture / f"lm_embeddings_{k}.hdf5") as file:
            found.append([torch.cat(torch.from_numpy(file[str(i)][...]).unbind(), dim=-1) for i in range(10)])
    return found


@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 1, 2], [row % 3 for row in range(10)]], ids=str)
def test_activations_are_those_of_the_reference(rows, fixture):
    """The reference ran the three lists side by side, sentence by sentence, each from the state behind the last."""
    sentences = json.loads((fixture / "sentences.json").read_text(encoding="utf-8"))
    elmo, expected = ELMo(official(fixture), stateful=True).eval(), expected_embeddings(fixture)
    for index in range(10):
        batch = [sentences[row][index].split() for row in rows]
        last = elmo.activations(characters_of(batch))[-1]
        for found, row, tokens in zip(last, rows, batch, strict=True):
            torch.testing.assert_close(found[: len(tokens)], expected[row][index], rtol=0.0, atol=1e-5)


def test_token_embeddings_are_those_of_the_reference(fixture):
    words = (fixture / "vocab_test.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    with h5py.File(fixture / "elmo_token_embeddings.hdf5") as file:
        expected = torch.from_numpy(file["embedding"][...])
    model = official(fixture)
    places = [index for index, word in enumerate(words) if word not in ("<S>", "</S>")]
    found = model.tokens(characters_of([[words[place] for place in places]]))[0]
    torch.testing.assert_close(found, expected[places], rtol=0.0, atol=1e-5)
    marks = [words.index("<S>"), words.index("</S>")]
    torch.testing.assert_close(model.tokens(model.marks[None])[0], expected[marks], rtol=0.0, atol=1e-5)


def test_the_official_model_compressed(fixture, tmp_path):
    characters = characters_of([["One", "token", "more"], ["Two"]])
    dense = official(fixture)
    expected = dense(characters)[0]
    full = deepcopy(dense)
    for lstms in (full.forward_lstms, full.backward_lstms):
        for index, lstm in enumerate(lstms):
            factors = {
                name: (u * s, v)
                for name in ("weight_ih_l0", "weight_hh_l0")
                for u, s, v in [torch.linalg.svd(getattr(lstm, name).detach(), full_matrices=False)]
            }
            lstms[index] = LowRankLSTM.from_dense(lstm, factors)
    torch.testing.assert_close(full(characters)[0], expected, rtol=0.0, atol=1e-5)
    assert {(site.target, site.shape) for site in sl.find_sites(dense)} == {("ih", (256, 16)), ("hh", (256, 16))}
    # Above the break-even rank everything stays dense, and everything is the same.
    sl.compress_(dense, sl.LowRank("svd", rank=16, target="both"))
    torch.testing.assert_close(dense(characters)[0], expected, rtol=0.0, atol=1e-5)
    sl.compress_(dense, sl.LowRank("svd", rank=8, target="both"))
    assert (dense(characters)[0] - expected).abs().max() > 1e-3
    sl.save(dense, tmp_path / "small")
    loaded = sl.load(tmp_path / "small", official(fixture))
    assert torch.equal(loaded(characters)[0], dense(characters)[0])


def test_clips_in_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(ClippedLSTM(4, 10, 3, 0.2, 0.05)).eval()
    with torch.no_grad():
        model[0].weight_hr_l0.mul_(3.0)
    for path in ("dense", "small"):
        file, x = tmp_path / f"{path}.onnx", torch.randn(2, 6, 4)
        sl.export_onnx(model, x, file)
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        expected = model(x)[0]
        assert expected.abs().max() == 0.05
        torch.testing.assert_close(found, expected.detach())
        sl.compress_(model, sl.LowRank("svd", rank=2, target="both"))


def test_a_clipping_model_by_every_method(tmp_path):
    characters = characters_of(SENTENCES)
    head = nn.Linear(16, 2)

    def loss(model, batch):
        return nn.functional.cross_entropy(head(model(batch).mean(1)), torch.tensor([0, 1, 0, 1]), reduction="none")

    for config in (
        *(sl.LowRank(method, rank=3, target="both") for method in ("svd", "semi-nmf", "activation", "fisher")),
        sl.Prune(rank=3, target="both"),
    ):
        elmo = ELMo(tiny()).eval()
        before = elmo(characters)
        calibrated = isinstance(config, sl.LowRank) and config.method in ("activation", "fisher")
        sl.compress_(elmo, config, **({"batches": [characters], "loss": loss} if calibrated else {}))
        after = elmo(characters)
        assert after.isfinite().all()
        assert (after - before).abs().max() > 1e-6
        assert all(lstm.cell_clip == 0.3 and lstm.proj_clip == 0.1 for lstm in elmo.bilm.forward_lstms)
        sl.save(elmo, tmp_path / str(config))
        assert torch.equal(sl.load(tmp_path / str(config), ELMo(tiny()).eval())(characters), after)
