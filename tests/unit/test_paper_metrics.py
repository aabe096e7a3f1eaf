"""Accuracy, and the measures of SQuAD."""

import pytest
import torch

from paper.metrics import AnswerScore, accuracy, answer_score
from slimlstm import SlimLSTMError


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Broncos!", ["broncos"], 1.0, 1.0),
        ("a  Denver\tBroncos", ["Denver Broncos", "Broncos"], 1.0, 1.0),
        ("Denver", ["Denver Broncos"], 0.0, 2 / 3),
        ("the the cat", ["cat cat"], 0.0, 2 / 3),
        ("cat cat cat", ["cat cat dog"], 0.0, 2 / 3),
        ("1,000 m", ["1000 m", "one"], 1.0, 1.0),
        ("24–10", ["24-10"], 0.0, 0.0),  # only ASCII punctuation goes
        ("theatre", ["atre"], 0.0, 0.0),
        ("x", ["y"], 0.0, 0.0),
        ("the", ["a"], 1.0, 0.0),  # nothing is left of either: equal, and no word is shared
        ("ab cd", ["cd", "ab cd ef gh"], 0.0, 2 / 3),
    ],
)
def test_answers_are_scored_as_by_the_official_script(answer, references, exact, f1):
    assert answer_score(answer, references) == AnswerScore(exact, pytest.approx(f1))


def test_scores_refuse_what_cannot_be_compared():
    with pytest.raises(SlimLSTMError, match="reference"):
        answer_score("x", [])
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 0])) == 0.5
    for labels in (torch.tensor([1]), torch.tensor([])):
        with pytest.raises(SlimLSTMError, match="compared"):
            accuracy(torch.tensor([1, 2])[: len(labels) * 2], labels)
