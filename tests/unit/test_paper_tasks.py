"""The three task models: padding, gradients, learning, answers; batches and remembered language models."""

import pytest
import torch
from paper_helpers import MODELS, bilm, examples, made

from paper.bidaf import best_spans
from paper.characters import characters_of
from paper.task_data import Sentence
from paper.tasks import Batches, Remembering, losses, vocabulary_of

every_task = pytest.mark.parametrize("task", MODELS)
with_and_without_elmo = pytest.mark.parametrize("has_elmo", [False, True], ids=["plain", "elmo"])


@every_task
@with_and_without_elmo
def test_padding_changes_nothing(task, has_elmo):
    """Every example alone has the logits that it has in a batch of longer ones."""
    model, batches = made(task, has_elmo)
    (together,) = batches(examples(task), 1000)
    with torch.no_grad():
        logits = model(*together.inputs)
        alone = [model(*batch.inputs) for one in examples(task) for batch in batches([one], 1)]
    keys = [id_of(example) for example in together.examples]
    for one, found in zip(examples(task), alone, strict=True):
        for row, example in zip(found, batches([one], 1)[0].examples, strict=True):
            expected = logits[keys.index(id_of(example))]
            torch.testing.assert_close(row, expected[: len(row)] if task == "squad" else expected)
            assert not torch.isfinite(expected[len(row) :]).any() or task != "squad"


def id_of(example):
    return example[1].id if isinstance(example, tuple) else repr(example)


@every_task
def test_gradients_come_from_every_parameter_and_padding_sends_none(task):
    model, batches = made(task, has_elmo=True)
    (batch,) = batches(examples(task), 1000)
    losses(model.train(), batch).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without
    assert not model.embedder.words.weight.grad[0].any()
    assert not any(parameter.requires_grad for parameter in model.embedder.elmo.bilm.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_paragraph_is_encoded_once_for_all_its_questions():
    model, batches = made("squad", has_elmo=True)
    (batch,) = batches(examples("squad"), 1000)
    paragraph, question, places = batch.inputs
    seen = []
    model.encoder.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    with torch.no_grad():
        once = model(paragraph, question, places)
        repeated = model(tuple(part[places] for part in paragraph), question)
    torch.testing.assert_close(once, repeated)
    assert seen == [5, 10, 10, 10]


def test_the_best_span_is_that_of_a_search_over_all():
    torch.manual_seed(1)
    logits = torch.randn(20, 9, 2)
    logits[:, 7:] = -torch.inf
    starts, ends = logits.softmax(dim=1).unbind(dim=2)
    for limit in (1, 3, 20):
        for row, found in enumerate(best_spans(logits, limit).tolist()):
            spans = [(i, j) for i in range(9) for j in range(i, min(9, i + limit))]
            assert tuple(found) == max(spans, key=lambda span: float(starts[row, span[0]] * ends[row, span[1]]))


def test_batches_hold_every_example_once_and_like_lengths_together():
    given = [Sentence(["it"] * (1 + index % 7), 0) for index in range(23)]
    batches = Batches(["it"], vocabulary_of(given), with_characters=False)(given, 5)
    sizes = [len(batch.examples) for batch in batches]
    assert sizes == [5, 5, 5, 5, 3]
    assert sorted(len(example.tokens) for batch in batches for example in batch.examples) == sorted(map(size_of_one, given))
    assert all(batch.inputs[0][1] is None for batch in batches)


def size_of_one(example):
    return len(example.tokens)


def test_a_remembering_model_gives_the_same_and_computes_once():
    inner, calls = bilm(), []
    inner.register_forward_hook(lambda *_: calls.append(1))
    one, other = characters_of([["it", "was"]]), characters_of([["a", "film"]])
    expected = [inner(characters)[0].detach() for characters in (one, other)]
    size = expected[0].numel() * 4
    remembering = Remembering(inner, gigabytes=1.5 * size / 1e9)
    calls.clear()
    for _ in range(3):
        found = [remembering(characters)[0] for characters in (one, other)]
        assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True, True]
    assert len(calls) == 1 + 3  # there is room for the first only
