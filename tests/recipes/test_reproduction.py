"""The recipes that write the page about the paper and its heatmaps."""

import json
import shutil

from recipe_helpers import RECIPES, run_script

ROOT = RECIPES.parent
RECIPE = RECIPES / "reproduction.py"


def test_the_page_about_the_paper_says_what_the_results_do(tmp_path):
    assert not run_script(RECIPE, "--pictures", tmp_path / "paper", "--page", tmp_path / "reproduction.md")
    tables = [
        path.relative_to(ROOT / "docs") for ending in ("csv", "tex") for path in (ROOT / "docs/paper").glob(f"*.{ending}")
    ]
    assert len(tables) >= 10
    for name in ("reproduction.md", *tables):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "docs" / name).read_text(encoding="utf-8")
    page = (tmp_path / "reproduction.md").read_text(encoding="utf-8")
    for name in ("ptb-perplexity", "ptb-norms", "ptb-spectra", "wikitext2-perplexity", "elmo-norms", "elmo-spectra"):
        assert f"(paper/{name}.png)" in page
        for ending, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
            assert (tmp_path / "paper" / f"{name}.{ending}").read_bytes().startswith(start)


def test_a_new_result_that_no_clean_commit_made_is_refused(tmp_path):
    shutil.copytree(ROOT / "results" / "ptb_untuned", tmp_path / "results" / "ptb_untuned")
    shutil.copy(ROOT / "results" / "dirty.json", tmp_path / "results")
    path = tmp_path / "results" / "ptb_untuned" / "svd-hh-010.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    options = ("--results", tmp_path / "results", "--pictures", tmp_path / "paper", "--page", tmp_path / "page.md")
    for commit in ("0123456789ab-dirty", None):
        result["provenance"]["commit"] = commit
        path.write_text(json.dumps(result), encoding="utf-8")
        assert f"svd-hh-010.json names the commit {commit}, not a clean one" in run_script(RECIPE, *options)
        assert not (tmp_path / "page.md").exists()
    assert not run_script(RECIPE, *options, "--allow-dirty")
    assert f"| svd | hh | 10 | 13.14M | {result['perplexity']:.2f} † |" in (tmp_path / "page.md").read_text(
        encoding="utf-8"
    )


def test_heatmaps_are_drawn_from_a_trained_model(trained, tmp_path):
    assert not run_script(RECIPES / "heatmaps.py", "--model", trained, "--rank", "2", "--output", tmp_path)
    names = {f"heatmap-{target}.{ending}" for target in ("hh", "ih") for ending in ("png", "pdf")}
    assert {path.name for path in tmp_path.iterdir()} == names
