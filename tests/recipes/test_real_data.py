"""The published corpora, and a model that was trained on one of them."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimlstm.demo.awd_lstm import load_awd_lstm
from slimlstm.demo.corpora import CORPORA, EOS, Vocabulary, read_words
from slimlstm.evaluate import perplexity
from slimlstm.methods import semi_nmf, singular_values


@pytest.fixture
def trained(data_folder):
    """The folder of an AWD-LSTM trained on Penn Treebank, beside the data sets; without it the test is skipped."""
    folder = data_folder.parent / "checkpoints" / "awd_lstm_ptb"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.parent.name}/{folder.name} beside the data sets")
    return folder


@pytest.mark.parametrize(
    ("name", "tokens", "vocab_size"),
    [
        ("ptb", {"train": 929_589, "valid": 73_760, "test": 82_430}, 10_000),
        ("wikitext-2", {"train": 2_088_628, "valid": 217_646, "test": 245_569}, 33_278),
    ],
)
def test_the_corpora_are_as_published(data_folder, name, tokens, vocab_size):
    assert data_folder.is_dir()
    words = {split: read_words(name, split) for split in CORPORA[name].splits}
    assert {split: len(found) for split, found in words.items()} == tokens
    vocabulary = Vocabulary(words["train"])
    assert len(vocabulary) == vocab_size == CORPORA[name].vocab_size
    assert EOS in vocabulary.words
    assert all(set(found) <= set(vocabulary.words) for found in words.values())


@pytest.mark.slow
def test_a_trained_model_loses_what_plain_lstms_lose(trained):
    tokens = Vocabulary.read(trained / "vocab.txt").encode(read_words("ptb", "test"))[:10_000]
    result = perplexity(load_awd_lstm(trained), tokens)
    assert result.predictions == 9_990
    assert result.loss == pytest.approx(plain_loss(load_file(trained / "model.safetensors"), tokens), rel=1e-5)


@torch.no_grad()
def plain_loss(weights: dict[str, Tensor], tokens: Tensor) -> float:
    """The mean loss of three plain LSTMs on ten streams that are read in one go."""
    text = tokens.view(10, -1).T
    x = weights["embedding.weight"].float()[text[:-1]]
    for layer in range(3):
        own = {name.rpartition(".")[2]: value for name, value in weights.items() if name.startswith(f"lstms.{layer}.")}
        lstm = nn.LSTM(x.shape[-1], own["weight_hh_l0"].shape[1])
        lstm.load_state_dict(own)
        x, _ = lstm(x)
    logits = x @ weights["embedding.weight"].float().T + weights["decoder.bias"]
    return float(-logits.log_softmax(-1).gather(2, text[1:, :, None]).double().mean())


@pytest.mark.slow
def test_semi_nmf_of_trained_matrices_is_as_good_as_the_svd_of_one_rank_less(trained):
    weights = {name: w.float() for name, w in load_file(trained / "model.safetensors").items() if ".weight_" in name}
    assert len(weights) == 6
    for name, matrix in weights.items():
        values = singular_values(matrix)
        for rank in (10, 50, 200):
            residual = semi_nmf(matrix, rank).residual
            assert residual <= float(values[rank - 1 :].norm() / values.norm()), (name, rank)
