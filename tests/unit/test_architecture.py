"""Imports run one way between the packages of the library, and files and functions stay short."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

import slimlstm

SOURCE = Path(slimlstm.__file__).parent
ROOT = Path(__file__).parents[2]
FACE = "__init__"
MOST_LINES, MOST_CODE_LINES = 450, 60
CODE = {tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP}

ARROWS = {
    "errors": set(),
    "files": {"errors"},
    "provenance": set(),
    "progress": set(),
    "tables": set(),
    "page": {"errors"},
    "methods": {"ops", "errors"},
    "ops": {"errors"},
    "modules": {"ops", "methods", "errors"},
    "calibration": {"progress", "modules", "methods", "ops", "files", "errors"},
    "pipeline": {"progress", "page", "calibration", "modules", "methods", "ops", "tables", "provenance", "files", "errors"},
    "module_source": {"pipeline", "modules", "methods", "ops", "errors"},
    "compress": {"module_source", "progress", "pipeline", "calibration", "modules", "methods", "errors"},
    "shards": {"errors"},
    "card": {"methods", "files", "errors"},
    "folders": {"card", "modules", "methods", "ops", "shards", "files", "errors"},
    "loading": {"folders", "modules", "methods", "files", "errors"},
    "weight_files": {
        "progress",
        "folders",
        "onnx",
        "pipeline",
        "compress",
        "calibration",
        "modules",
        "methods",
        "ops",
        "files",
        "errors",
    },
    "onnx": {"progress", "compress", "pipeline", "calibration", "modules", "methods", "ops", "files", "errors"},
    "search": {
        *("compress", "module_source", "onnx", "bench", "calibration", "pipeline", "modules", "methods", "files", "tables"),
        *("progress", "errors"),
    },
    "tuning": {"progress", "methods", "modules", "files", "errors"},
    "evaluate": {"modules", "errors"},
    "bench": {"progress", "onnx", "pipeline", "modules", "methods", "ops", "provenance", "tables", "errors"},
    "demo": {
        *("compress", "bench", "evaluate", "pipeline", "calibration", "modules", "methods", "ops", "provenance", "shards"),
        *("files", "tables", "errors"),
    },
}
"""The packages that each package may import; its own files it always may."""
ARROWS[FACE] = set(ARROWS)
ARROWS["cli"] = set(ARROWS)
ARROWS["__main__"] = {"cli"}

MODULES, PAPER = sorted(SOURCE.rglob("*.py")), sorted((ROOT / "paper").glob("*.py"))
PACKAGES = {
    path.stem if path.is_file() else path.name for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()
}
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())


def top_package_of(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def dotted_package_of(path):
    """The dotted name of the package that relative imports in a module start from."""
    return ".".join(("slimlstm", *path.relative_to(SOURCE).parent.parts))


def imported_packages(source, package="slimlstm"):
    """The packages that a module imports, at its top or inside functions; ``__init__`` for the public face."""
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
    return {package if package in PACKAGES | set(ARROWS) else FACE for package in inner}


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import torch, math", "slimlstm", set()),
        ("import slimlstm.modules.lstm as n", "slimlstm", {"modules"}),
        ("from slimlstm import ops, errors", "slimlstm", {"ops", "errors"}),
        ("from slimlstm.ops.weights import rebuilt", "slimlstm", {"ops"}),
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
def test_imports_are_read_in_every_form(source, package, expected):
    assert imported_packages(source, package) == expected


def test_the_modules_are_found():
    assert {"errors", "methods", "modules", "ops", "demo"} <= {top_package_of(path) for path in MODULES}


@every_module
def test_imports_run_one_way(path):
    package = top_package_of(path)
    assert package in ARROWS, (
        f"the package {package} is not in ARROWS of {Path(__file__).name}: add it and what it may import"
    )
    wrong = imported_packages(path.read_text(encoding="utf-8"), dotted_package_of(path)) - ARROWS[package] - {package}
    assert not wrong, (
        f"{package} imports {', '.join(sorted(wrong))}; it may import {', '.join(sorted(ARROWS[package])) or 'none'}"
    )


def test_no_packages_import_each_other():
    """The table itself has no circle: every package comes after all that it may import."""
    left = {package: allowed - {package} for package, allowed in ARROWS.items()}
    while left:
        free = {package for package, allowed in left.items() if not allowed & left.keys()}
        assert free, f"a circle among {', '.join(sorted(left))}"
        left = {package: allowed for package, allowed in left.items() if package not in free}


@every_module
def test_public_modules_say_what_they_are_for(path):
    private = path.stem.startswith("_") and path.stem != FACE
    assert private or ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@every_module
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def lines_of_code(source):
    """The numbers of the lines that hold code or documentation, and not just comments or nothing."""
    tokens = (token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type in CODE)
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}


def without_docstring(function):
    """The numbers of a function's lines, from its first decorator on, except its docstring."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    lines = set(range(first, function.end_lineno + 1))
    documentation = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    return lines - set(range(documentation.lineno, documentation.end_lineno + 1)) if documentation else lines


def long_functions(source, most=MOST_CODE_LINES):
    code = lines_of_code(source)
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    counted = ((function.name, len(code & without_docstring(function))) for function in functions)
    return {name: count for name, count in counted if count > most}


FUNCTION = '''
@decorated
def f(
    x,
):
    """A docstring

    of three lines."""
    # a comment

    y = """a text
    in two lines"""
    return g(
        y
    )
'''


def test_lines_of_code_are_counted():
    assert long_functions(FUNCTION, most=0) == {"f": 9}
    assert long_functions(FUNCTION, most=9) == {}


@pytest.mark.parametrize("path", [*MODULES, *PAPER], ids=lambda path: "/".join(path.parts[-2:]))
def test_functions_are_short(path):
    assert long_functions(path.read_text(encoding="utf-8")) == {}


def test_the_public_face_is_small():
    assert len(slimlstm.__all__) <= 30


RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem != FACE)


@pytest.mark.parametrize("name", ["recipes", *(f"recipes.{stem}" for stem in RECIPES)])
def test_recipes_cannot_be_imported(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ModuleNotFoundError, match="recipes are programs to run"):
        __import__(name)
