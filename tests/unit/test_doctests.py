"""Every example in a docstring runs and prints what it says, in the library and in the paper's code."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import slimlstm

ROOT = Path(__file__).parents[2]
FOLDERS = {"slimlstm": Path(slimlstm.__file__).parent, "paper": ROOT / "paper"}


def module_names(package, folder):
    paths = sorted(path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    dotted = (".".join((package, *path.parts)).removesuffix(".__init__") for path in paths)
    return [name for name in dotted if not name.endswith("__main__")]


SLOW = ("slimlstm.onnx.export", "slimlstm.search.module")
MODULES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for package, folder in FOLDERS.items()
    for name in module_names(package, folder)
]


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """Examples print the same everywhere, and write only into a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.syspath_prepend(ROOT)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, quiet):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL, verbose=False)
    assert failed == 0


def test_sections_are_named_as_the_site_renders_them():
    """A section "Example:" would be a paragraph, whose brackets read as links."""

    files = [path for folder in ("src", "paper") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [
        path.name for path in files if re.search(r"^\s+Example:$", path.read_text(encoding="utf-8"), re.MULTILINE)
    ] == []
