"""A short run of the fuzzer in tests/fuzz.py; ``python tests/fuzz.py --files 20000`` is the long one."""

import random

import pytest
from fuzz import DOORS, Door, damaged_bytes, fuzz, outcome

from slimlstm import SlimLSTMError


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_damaged_files_are_read_or_refused(name):
    outcomes, faults = fuzz(name, seed=7, first=0, count=40)
    assert not faults
    assert sum(outcomes.values()) == 40
    assert outcomes["refused"] > 10


FAULTS = {
    "another class of error": (ValueError("raw"), "raw"),
    "an unprintable message": (None, "an unprintable error"),
}


class RawError(SlimLSTMError):
    def __str__(self):
        return "\x1b[31m"


@pytest.mark.parametrize(("error", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_seen(error, message, tmp_path):
    def read(path, place):
        raise error or RawError("")

    (tmp_path / "intact").write_bytes(bytes(100))
    with pytest.raises((AssertionError, ValueError), match=message):
        outcome(Door(lambda path: None, read), tmp_path / "intact", [], tmp_path, random.Random(0))  # noqa: S311


def test_every_damage_changes_something():
    content = bytes(range(200))
    made = [damaged_bytes(content, random.Random(seed)) for seed in range(200)]  # noqa: S311
    assert sum(one != content for one in made) > 190
