"""Language models that the repository stores: small files, int8 rows, bfloat16 embedding, loaded by name."""

import argparse
import json

import pytest
import torch

from paper import stored_models
from paper.page.results import is_clean
from paper.stored_models import load_language_model, model_folder, save_language_model
from slimlstm import LowRank, SlimLSTMError, compress_, save
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig, save_awd_lstm
from slimlstm.demo.corpora import Vocabulary
from slimlstm.methods import rounded

VOCABULARY = Vocabulary(f"w{index}" for index in range(11))


@pytest.fixture
def model():
    return AWDLSTM(AWDLSTMConfig(11, embedding_size=8, hidden_size=12)).eval()


def test_matrices_come_back_as_int8_rows_and_the_embedding_in_bfloat16(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_language_model(model, VOCABULARY, tmp_path)
    found = load_language_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the model itself stays as it is"
        expected = tensor
        if name in ("embedding.weight", "decoder.weight"):
            expected = tensor.bfloat16().float()
        elif "weight" in name:
            expected = rounded(tensor, "int8")
        assert torch.equal(found.state_dict()[name], expected)
    assert found.decoder.weight is found.embedding.weight
    assert all(type(lstm) is torch.nn.LSTM for lstm in found.lstms)
    assert not found.training
    assert Vocabulary.read(tmp_path / "vocab.txt").words == VOCABULARY.words


def test_files_are_small_and_a_new_model_replaces_the_old_one(model, tmp_path):
    save_language_model(model, VOCABULARY, tmp_path, max_shard_bytes=1500)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert max(path.stat().st_size for path in shards) <= 1500
    first = load_language_model(tmp_path).state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    save_language_model(model, VOCABULARY, tmp_path)
    second = load_language_model(tmp_path).state_dict()
    assert torch.equal(second["decoder.bias"], 2.0 * first["decoder.bias"])
    assert not {path.name for path in shards} & {path.name for path in tmp_path.iterdir()}


def test_only_dense_models_are_loaded(model, tmp_path):
    compress_(model, LowRank(rank=1, target="hh"))
    save(model, tmp_path)
    with pytest.raises(SlimLSTMError, match=r"lstms\.0\.weight_hh_l0 is not dense"):
        load_language_model(tmp_path)


def test_models_are_found_by_name_or_folder(model, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_models, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match=r"no folder tiny.*stored models: none"):
        model_folder("tiny")
    save_language_model(model, VOCABULARY, tmp_path / "models" / "tiny")
    assert model_folder("tiny") == tmp_path / "models" / "tiny"
    assert json.loads((model_folder("tiny") / "config.json").read_text(encoding="utf-8"))["format"] == "slimlstm"
    save_awd_lstm(model, tmp_path / "plain")
    assert load_language_model(model_folder("plain")).config.hidden_size == 12


@pytest.mark.parametrize("folder", sorted(stored_models.MODELS.iterdir()), ids=lambda folder: folder.name)
def test_a_clean_commit_made_every_stored_model(folder):
    assert is_clean(json.loads((folder / "training.json").read_text(encoding="utf-8")))
