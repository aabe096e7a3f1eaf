"""README and docs: every block runs, every name exists, and numbers are the stored ones."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from recipe_helpers import run_script

import slimlstm as sl
from slimlstm import cli
from slimlstm.bench import bench_layers

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def prose(page):
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    own = [code for code in blocks(page, "python") if "--8<--" not in code]
    if not own:
        pytest.skip("no code of its own")
    if any("import lightning" in code for code in own):
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    tables = sl.methods.METHODS, sl.methods.STORAGES
    known = [dict(table) for table in tables]
    names = {}
    try:
        for code in own:
            exec(code, names)  # noqa: S102 (the page's own lines)
    finally:
        for table, rows in zip(tables, known, strict=True):
            table.clear()
            table.update(rows)


def test_the_readme_ends_with_the_compressed_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(README, "python"):
        exec(code, names)  # noqa: S102
    assert names["report"].lstm.bytes_after < 0.2 * names["report"].lstm.bytes_before
    assert (tmp_path / "small.onnx").exists()
    assert all(site.storage == "int8" for site in sl.find_sites(names["model"]))


COMMANDS = [(page, line) for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]


@pytest.mark.parametrize(
    "line", dict.fromkeys(line.partition("#")[0].strip() for _, line in COMMANDS if line.startswith("slimlstm"))
)
def test_commands_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks(README, "python")[0], names)  # noqa: S102
    torch.save(names["dense"].state_dict(), "model.pt")
    torch.save({"state_dict": names["dense"].state_dict(), "epoch": 3}, "last.ckpt")
    from safetensors.torch import save_file

    save_file(names["dense"].state_dict(), "model.safetensors")
    if "model.onnx" in line:
        sl.export_onnx(names["dense"], torch.randint(64, (4, 2)), "model.onnx")
    brief = bench_layers.__kwdefaults__ | {"seconds": 0.002}
    monkeypatch.setattr(bench_layers, "__kwdefaults__", brief)
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert re.search(r"lstm\w*(\.weight_hh_l0| layer 0)", capsys.readouterr().out)


@every_page
def test_names_in_prose_exist(page):
    for name in re.findall(r"`((?:sl|slimlstm)\.[\w.]+)", prose(page)):
        first, *rest = name.split(".")
        found = sl if first in ("sl", "slimlstm") else importlib.import_module(first)
        for part in rest:
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(f"{found.__name__}.{part}")


@every_page
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https://)([^)#]+)[^)]*\)", prose(page)):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_is_short():
    assert len(re.findall(r"[\w'.%-]*\w[\w'.%-]*", prose(README))) <= 700


@every_page
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in re.findall(r"`make (\w+)`", prose(page)))


def test_numbers_are_the_stored_ones():
    assert not run_script(ROOT / "recipes" / "readme.py", "--check")
