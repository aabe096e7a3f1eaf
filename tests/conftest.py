"""Shared settings: reproducible random numbers, and real data where SLIMLSTM_DATA names it."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def data_folder():
    """The folder of real data sets that SLIMLSTM_DATA names; without it the test is skipped."""
    folder = os.environ.get("SLIMLSTM_DATA")
    if not folder:
        pytest.skip("SLIMLSTM_DATA names no folder of data sets")
    return Path(folder)
