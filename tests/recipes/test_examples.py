"""Every example runs, and those with real models keep what they promise."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, console, dump_dom

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBERED = sorted(EXAMPLES.glob("0*.py"))
REAL = sorted(path for path in (EXAMPLES / "real").glob("*.py") if path.stem != "registry")


def run(path, monkeypatch, *arguments):
    """Runs a script as ``python path arguments`` would; one that says what it lacks is skipped."""
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        assert isinstance(stop.code, str), stop.code
        pytest.skip(stop.code)


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_numbered(path, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    run(path, monkeypatch)
    assert capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_the_documentation_shows_it(path):
    pages = (EXAMPLES.parent / "docs").glob("*.md")
    assert any(f'\n--8<-- "examples/{path.name}"\n' in page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.slow
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_models_keep_their_quality_in_half_the_bytes(path, monkeypatch, tmp_path):
    run(path, monkeypatch, "--seconds", 0.05, "--brief", "--output", tmp_path)
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text(encoding="utf-8"))
    ours = [row for row in result["rows"] if "PyTorch" not in row["variant"]]
    assert any(row["kept"] <= 0.5 and row["quality"] > 0.99 for row in ours), ours
    assert result["provenance"]["torch"]
    pages = list(tmp_path.glob("*.html"))
    assert pages
    for page in pages if CHROMIUM else []:
        dom, log = dump_dom(page.as_uri(), tmp_path / "profile")
        assert "What was tried" in dom
        assert console(log) == []
