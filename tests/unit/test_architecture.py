"""Which room of the library may import which, read from the source, and the sizes that keep it readable."""

import ast
from pathlib import Path

import pytest

import slimlstm

SOURCE = Path(slimlstm.__file__).parent
ROOT = Path(__file__).parents[2]
FACE = "__init__"

ARROWS = {
    "errors": set(),
    "files": {"errors"},
    "provenance": set(),
    "methods": {"errors"},
    "ops": {"errors"},
    "modules": {"ops", "methods", "errors"},
    "calibration": {"modules", "methods", "ops", "files", "errors"},
    "pipeline": {"calibration", "modules", "methods", "ops", "errors"},
    "compress": {"pipeline", "calibration", "modules", "methods", "ops", "errors"},
    "folders": {"modules", "methods", "ops", "files", "errors"},
    "weight_files": {"folders", "onnx", "pipeline", "compress", "modules", "methods", "ops", "files", "errors"},
    "onnx": {"compress", "pipeline", "calibration", "modules", "methods", "ops", "files", "errors"},
    "search": {"compress", "calibration", "pipeline", "errors"},
    "tuning": {"modules", "files", "errors"},
    "evaluate": {"modules", "errors"},
    "bench": {"onnx", "pipeline", "modules", "ops", "provenance", "errors"},
    "demo": {
        *("compress", "bench", "evaluate", "pipeline", "calibration", "modules", "methods", "ops", "provenance", "files"),
        "errors",
    },
}
"""The rooms that each room may import; its own files it always may."""
ARROWS[FACE] = set(ARROWS)
ARROWS["cli"] = set(ARROWS)

MODULES = sorted(SOURCE.rglob("*.py"))
ROOMS = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())


def room_of(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def package_of(path):
    """The dotted name of the package that relative imports in a module start from."""
    return ".".join(("slimlstm", *path.relative_to(SOURCE).parent.parts))


def imported_rooms(source, package="slimlstm"):
    """The rooms that a module imports, at its top or inside functions; ``__init__`` for the public face."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" if module == "slimlstm" else module for alias in node.names]
    parts = [name.split(".") for name in names]
    inner = [part[1] if len(part) > 1 else FACE for part in parts if part[0] == "slimlstm"]
    return {room if room in ROOMS | set(ARROWS) else FACE for room in inner}


@pytest.mark.parametrize(
    ("source", "package", "rooms"),
    [
        ("import torch, math", "slimlstm", set()),
        ("import slimlstm.modules.lstm as n", "slimlstm", {"modules"}),
        ("from slimlstm import ops, errors", "slimlstm", {"ops", "errors"}),
        ("from slimlstm.ops.dense import rebuilt", "slimlstm", {"ops"}),
        ("def f():\n    from slimlstm.modules.sites import Site", "slimlstm", {"modules"}),
        ("from . import modules", "slimlstm", {"modules"}),
        ("from .modules import LowRankLSTM", "slimlstm", {"modules"}),
        ("from .. import methods", "slimlstm.ops", {"methods"}),
        ("from ..methods.rank import is_smaller", "slimlstm.ops", {"methods"}),
        ("from .weights import Matrix", "slimlstm.ops", {"ops"}),
        ("import slimlstm", "slimlstm", {FACE}),
        ("from slimlstm import compress_", "slimlstm", {FACE}),
        ("from slimlstm_extras import modules", "slimlstm", set()),
    ],
)
def test_imports_are_read_in_every_form(source, package, rooms):
    assert imported_rooms(source, package) == rooms


def test_the_modules_are_found():
    assert {"errors", "methods", "modules", "ops", "demo"} <= {room_of(path) for path in MODULES}


@every_module
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in ARROWS, f"the room {room} is not in ARROWS of {Path(__file__).name}: add it and what it may import"
    wrong = imported_rooms(path.read_text(encoding="utf-8"), package_of(path)) - ARROWS[room] - {room}
    assert not wrong, (
        f"{room} imports {', '.join(sorted(wrong))}; it may import {', '.join(sorted(ARROWS[room])) or 'none'}"
    )


def test_no_rooms_import_each_other():
    """The table itself has no circle: every room comes after all that it may import."""
    left = {room: allowed - {room} for room, allowed in ARROWS.items()}
    while left:
        free = {room for room, allowed in left.items() if not allowed & left.keys()}
        assert free, f"a circle among {', '.join(sorted(left))}"
        left = {room: allowed for room, allowed in left.items() if room not in free}


@every_module
def test_public_modules_say_what_they_are_for(path):
    private = path.stem.startswith("_") and path.stem != FACE
    assert private or ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@every_module
def test_modules_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def test_the_public_face_is_small():
    assert len(getattr(slimlstm, "__all__", [])) <= 15


RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem != FACE)


@pytest.mark.parametrize("name", ["recipes", *(f"recipes.{stem}" for stem in RECIPES)])
def test_recipes_cannot_be_imported(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ModuleNotFoundError, match="recipes are programs to run"):
        __import__(name)
