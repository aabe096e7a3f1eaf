"""Which room of the library may import which, read from the source, and the sizes that keep it readable."""

import ast
from pathlib import Path

import pytest

import slimlstm

SOURCE = Path(slimlstm.__file__).parent
ROOT = Path(__file__).parents[1]
FACE = "__init__"

ARROWS = {
    "errors": set(),
    "provenance": set(),
    "data": {"errors"},
    "task_data": {"data", "errors"},
    "models": {"errors"},
    "factorize": {"errors"},
    "prune": {"errors"},
    "ops": {"errors"},
    "rank": {"factorize", "errors"},
    "nn": {"ops", "errors"},
    "sites": {"nn", "ops", "prune", "errors"},
    "plan": {"sites", "ops", "rank", "factorize", "prune", "errors"},
    "report": {"plan", "errors"},
    "search": {"calibrate", "observe", "compress", "plan", "errors"},
    "compress": {
        *("plan", "report", "rank", "factorize", "prune", "calibrate", "refit", "observe", "sites", "nn", "ops", "errors")
    },
    "checkpoint": {"sites", "compress", "factorize", "nn", "onnx_graph", "persist", "ops", "plan", "report", "errors"},
    "observe": {"sites", "nn", "ops", "errors"},
    "calibrate": {"observe", "errors"},
    "refit": {"observe", "factorize", "sites", "ops", "errors"},
    "finetune": {"errors"},
    "evaluate": {"errors"},
    "tasks": {"task_data", "data", "models", "evaluate", "errors"},
    "explain": {"nn", "ops", "report", "errors"},
    "onnx_graph": {"ops", "errors"},
    "onnx_calibrate": {"calibrate", "onnx_graph", "errors"},
    "onnx_models": {
        *("onnx_calibrate", "onnx_graph", "calibrate", "compress", "factorize", "plan", "report", "sites", "ops", "errors")
    },
    "onnx_layers": {"ops", "errors"},
    "engines": {"nn", "ops", "onnx_layers", "errors"},
    "bench": {"engines", "nn", "ops", "provenance", "errors"},
    "analysis": {"factorize", "errors"},
    "plots": {"analysis", "errors"},
    "persist": {"nn", "ops", "sites", "errors"},
    "export": {"nn", "sites", "observe", "onnx_layers", "ops", "errors"},
    "demo": {"bench", "calibrate", "compress", "evaluate", "models", "nn", "plan", "provenance", "sites", "errors"},
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
        ("import slimlstm.nn as n", "slimlstm", {"nn"}),
        ("from slimlstm import ops, errors", "slimlstm", {"ops", "errors"}),
        ("from slimlstm.ops.dense import rebuilt", "slimlstm", {"ops"}),
        ("def f():\n    from slimlstm.sites import Site", "slimlstm", {"sites"}),
        ("from . import nn", "slimlstm", {"nn"}),
        ("from .nn import LowRankLSTM", "slimlstm", {"nn"}),
        ("from .. import factorize", "slimlstm.ops", {"factorize"}),
        ("from ..rank import saves", "slimlstm.ops", {"rank"}),
        ("from .weights import Matrix", "slimlstm.ops", {"ops"}),
        ("import slimlstm", "slimlstm", {FACE}),
        ("from slimlstm import compress_", "slimlstm", {FACE}),
        ("from slimlstm_extras import nn", "slimlstm", set()),
    ],
)
def test_imports_are_read_in_every_form(source, package, rooms):
    assert imported_rooms(source, package) == rooms


def test_the_modules_are_found():
    assert {"errors", "factorize", "nn", "ops", "models"} <= {room_of(path) for path in MODULES}


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
