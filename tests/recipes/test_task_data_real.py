"""The published data sets, if SLIMLSTM_DATA names their folder."""

import pytest
import torch

from paper.metrics import answer_score
from paper.task_data import read_task
from paper.tasks import texts_of


@pytest.mark.parametrize(
    ("task", "split", "label", "count"),
    [
        ("sst5", "train", "complete: 8,544 sentences", [1092, 2218, 1624, 2322, 1288]),
        ("sst5", "dev", "complete: 1,101 sentences", [139, 289, 229, 279, 165]),
        ("sst5", "test", "complete: 2,210 sentences", [279, 633, 389, 510, 399]),
        ("snli", "dev", "complete: 9,842 pairs", [3329, 3235, 3278]),
        ("snli", "test", "complete: 9,824 pairs", [3368, 3219, 3237]),
        ("snli", "train", None, None),
        ("squad", "train", None, None),
        ("squad", "dev", "complete: 10,570 questions", None),
    ],
)
def test_real_data_has_the_published_counts(data_folder, task, split, label, count):
    if not (data_folder / task).is_dir():
        pytest.skip(f"{data_folder} has no {task}")
    found = read_task(task, split)
    if label is not None:
        assert found.label == label
    else:
        expected = {"snli": "19,999 of 549,367 pairs", "squad": "4,000 of 87,599 questions"}
        assert found.label in (f"subset: {expected[task]}", f"complete: {found.published:,} {found.unit}")
    assert all(tokens and all(tokens) for example in found.examples for tokens in texts_of(example))
    if count is not None:
        labels = torch.tensor([example.label for example in found.examples])
        assert labels.bincount().tolist() == count
    if task == "squad":
        asked = [(p, q) for p in found.examples for q in p.questions]
        exact = [
            answer_score(p.answer(*span), [answer]).exact_match
            for p, q in asked
            for answer, span in zip(q.answers, q.spans, strict=True)
        ]
        # The rest are parts of words, such as "gold" of "golden".
        assert sum(exact) > 0.985 * len(exact)
