"""Shared settings: one thread, reproducible random numbers, and real data if SLIMLSTM_DATA names its folder."""

import math
import os
from collections import defaultdict
from pathlib import Path

# Workers run side by side, and PyTorch reads this once, when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from slimlstm.methods.semi_nmf import semi_nmf

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("quick", settings.get_profile("default"), max_examples=5)
settings.load_profile("default")

ITERATIONS = {"test_factorize": 100} | dict.fromkeys(("test_doctests", "test_real_data", "test_language_model"), 500)
"""The limit of semi-NMF's iterations in tests of it, 500 as in a recipe's process; 20 elsewhere, where any factors do."""


LARGE = 5
"""The number of cases of a test with several parameters beyond which ``--quick`` leaves some out."""


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="no slow tests, at most five cases of a grid, fewer examples")


def pytest_configure(config):
    if config.getoption("--quick"):
        settings.load_profile("quick")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        tests = defaultdict(list)
        for item in items:
            tests[item.function].append(item)
        chosen = {item for cases in tests.values() for item in part_of_grid(cases) if "slow" not in item.keywords}
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


def part_of_grid(cases):
    """At most five cases of a test with several parameters, spread over the values of each."""
    if len(cases) <= LARGE:
        return cases
    # One column of ids for every mark; a value's place in it is the number of the values before.
    columns = list(zip(*(case.callspec._idlist for case in cases), strict=True))
    if len(columns) < 2:
        return cases
    places = [{value: place for place, value in enumerate(dict.fromkeys(column))} for column in columns]
    step = min(LARGE, sorted(map(len, places))[-2])
    sums = (sum(place[value] for place, value in zip(places, row, strict=True)) for row in zip(*columns, strict=True))
    diagonals = [case for case, total in zip(cases, sums, strict=True) if total % step == 0]
    return diagonals[:: math.ceil(len(diagonals) / LARGE)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads():
    """Restores PyTorch's number of threads, which is a setting of the whole process."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def few_iterations(request, monkeypatch):
    """Stops semi-NMF early: an iteration takes as long for a tiny matrix as for a small one."""
    monkeypatch.setitem(semi_nmf.__kwdefaults__, "max_iterations", ITERATIONS.get(request.module.__name__, 20))


@pytest.fixture
def data_folder():
    """The folder of real data sets that SLIMLSTM_DATA names; without it the test is skipped."""
    folder = os.environ.get("SLIMLSTM_DATA")
    if not folder:
        pytest.skip("SLIMLSTM_DATA names no folder of data sets")
    return Path(folder)
