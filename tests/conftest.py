"""Shared settings: one thread, reproducible random numbers, and real data if SLIMLSTM_DATA names its folder."""

import os
from pathlib import Path

# Workers run side by side, and PyTorch reads this once, when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from slimlstm.methods.semi_nmf import semi_nmf

settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("quick", settings.get_profile("default"), max_examples=15)
settings.load_profile("default")

ITERATIONS = {"test_factorize": 100, "test_doctests": 500, "test_real_data": 500}
"""The limit of semi-NMF's iterations in tests of it; 20 elsewhere, where any factors will do."""


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
