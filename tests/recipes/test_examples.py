"""Every example runs, and those with real models keep what they promise."""

import json
from pathlib import Path

import pytest
from browser import CHROMIUM, console, dump_dom
from recipe_helpers import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBERED = sorted(EXAMPLES.glob("0*.py"))
REAL = sorted(path for path in (EXAMPLES / "real").glob("*.py") if path.stem != "registry")


def run(path, *arguments):
    """Run an example; one that says what it lacks is skipped."""
    code = run_script(path, *arguments)
    if code:
        assert isinstance(code, str), code
        pytest.skip(code)


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_numbered(path, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    run(path)
    assert capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_the_documentation_shows_it(path):
    pages = (EXAMPLES.parent / "docs").glob("*.md")
    assert any(f'\n--8<-- "examples/{path.name}"\n' in page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.slow
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_models_keep_their_quality_in_half_the_bytes(path, tmp_path):
    run(path, "--seconds", 0.05, "--brief", "--output", tmp_path)
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
