"""Perplexity against values worked out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from slimlstm import SlimLSTMError
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig
from slimlstm.evaluate import NextTokens, Perplexity, perplexity, pieces

V = 7


class Bigrams(nn.Module):
    """A table of logits [V, V]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor, state: None) -> tuple[Tensor, None]:
        return self.logits[tokens], state


class Sums(nn.Module):
    """Predicts the sum of all tokens so far modulo V, at a cost of 200 nats for every unit it is wrong by.

    So a loss is a whole number, whatever the order in which float32 adds it up, and wrong wherever a state is lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Dropout()

    def forward(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        assert not self.training
        assert not self.child.training
        assert not torch.is_grad_enabled()
        sums = tokens.cumsum(0) + (0 if state is None else state)
        return -200.0 * (torch.arange(V) - sums[..., None] % V).abs(), sums[-1]


def nats(tokens: list[int]) -> int:
    """What ``Sums`` loses on one stream."""
    return sum(200 * abs(tokens[t] - sum(tokens[:t]) % V) for t in range(1, len(tokens)))


def test_the_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary():
    result = perplexity(Bigrams(torch.zeros(V, V)), torch.randint(V, (50,)))
    assert result.perplexity == pytest.approx(V, rel=1e-6)
    assert result.predictions == 40


@pytest.mark.parametrize(
    ("streams", "probabilities"),
    [(1, [0.75, 0.25, 0.5, 0.75]), (2, [0.75, 0.5])],
    ids=["one stream", "two streams, the last token dropped"],
)
def test_bigrams_by_hand(streams, probabilities):
    table, text = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.tensor([0, 0, 1, 0, 0])
    result = perplexity(Bigrams(table), text, streams=streams)
    assert result.predictions == len(probabilities)
    assert result.loss == pytest.approx(-sum(map(math.log, probabilities)) / len(probabilities), rel=1e-6)
    assert result.perplexity == pytest.approx(math.prod(probabilities) ** (-1 / len(probabilities)), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 11, 12, 70])
@pytest.mark.parametrize("streams", [1, 2, 3, 10])
def test_the_state_is_carried_and_the_length_of_a_call_does_not_matter(streams, steps):
    tokens = torch.randint(V, (37,))
    length = 37 // streams
    by_hand = [nats(tokens[start : start + length].tolist()) for start in range(0, length * streams, length)]
    result = perplexity(Sums(), tokens, streams=streams, steps=steps)
    assert result.predictions == (length - 1) * streams
    assert result.loss == sum(by_hand) / result.predictions


def test_a_language_model_reads_a_text_in_calls_as_it_does_at_once():
    model, tokens = AWDLSTM(AWDLSTMConfig(V, 5, 6, 2)), torch.randint(V, (60,))
    model.eval()
    with torch.no_grad():
        logits, _ = model(tokens[:-1, None])
    expected = -logits[:, 0].double().log_softmax(-1).gather(1, tokens[1:, None]).mean()
    for steps in (1, 7, 59):
        assert perplexity(model.train(), tokens, streams=1, steps=steps).loss == pytest.approx(float(expected), rel=1e-6)


def test_the_losses_of_the_pieces_of_a_text_are_those_of_the_whole():
    model, tokens = AWDLSTM(AWDLSTMConfig(V, 5, 6, 2)).eval(), torch.randint(V, (62,))
    whole, parts = NextTokens(), NextTokens()
    with torch.no_grad():
        (one,) = pieces(tokens, streams=3, steps=19)
        losses = [parts(model, piece) for piece in pieces(tokens, streams=3, steps=7)]
        assert [len(entry) for entry in losses] == [21, 21, 15]
        torch.testing.assert_close(torch.cat(losses), whole(model, one))
    assert float(torch.cat(losses).mean()) == pytest.approx(perplexity(model, tokens, streams=3).loss, rel=1e-6)


def test_the_state_between_pieces_can_be_kept_and_given_back():
    model, (first, second) = AWDLSTM(AWDLSTMConfig(V, 5, 6, 2)).eval(), pieces(torch.randint(V, (30,)), streams=2, steps=7)
    loss = NextTokens()
    loss(model, first)
    kept = loss.state_dict()
    expected = loss(model, second)
    assert not torch.equal(loss(model, second), expected)
    loss.load_state_dict(kept)
    assert torch.equal(loss(model, second), expected)


@pytest.mark.parametrize(("streams", "steps"), [(0, 1), (1, 0), (9, 5)])
def test_pieces_that_cannot_be_are_refused(streams, steps):
    with pytest.raises(SlimLSTMError, match="10 tokens cannot be read"):
        pieces(torch.arange(10), streams=streams, steps=steps)


def test_a_loss_beyond_all_bounds_is_still_a_number():
    assert Perplexity(1e6, 1).perplexity == math.exp(700)


class Fails(Sums):
    """Stops working at its second call."""

    def forward(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is not None:
            raise RuntimeError("out of memory")
        return super().forward(tokens, state)


@pytest.mark.parametrize("modes", [(True, True), (False, False), (True, False)])
def test_the_training_mode_comes_back(modes):
    for model in (Sums(), Fails()):
        model.training, model.child.training = modes
        if isinstance(model, Fails):
            with pytest.raises(RuntimeError, match="out of memory"):
                perplexity(model, torch.zeros(9, dtype=torch.int64), streams=1, steps=4)
        else:
            perplexity(model, torch.zeros(9, dtype=torch.int64), streams=1, steps=4)
        assert (model.training, model.child.training) == modes
    assert torch.is_grad_enabled()


def test_progress_goes_up_to_one():
    seen: list[float] = []
    perplexity(Sums(), torch.zeros(21, dtype=torch.int64), streams=2, steps=4, progress=seen.append)
    assert seen == [4 / 9, 8 / 9, 1.0]


@pytest.mark.parametrize(
    ("count", "streams", "steps"), [(0, 1, 5), (1, 1, 5), (19, 10, 5), (50, 0, 5), (50, -1, 5), (50, 1, 0), (50, 1, -1)]
)
def test_what_cannot_be_read_is_refused(count, streams, steps):
    message = f"{count} tokens cannot be read as {streams} streams of {steps} tokens a call"
    with pytest.raises(SlimLSTMError, match=message):
        perplexity(Sums(), torch.zeros(count, dtype=torch.int64), streams=streams, steps=steps)
