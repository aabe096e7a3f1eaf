"""The documentation site in a browser: it builds without a warning, fits narrow and wide windows, and logs no error."""

import functools
import html
import http.server
import importlib.util
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from browser import console, dump_dom, needs_chromium

ROOT = Path(__file__).parents[2]
WIDTHS = (390, 1280)
needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml")),
    reason='mkdocs is missing: pip install -c constraints.txt -e ".[docs]"',
)

# Loads every page in frames of both widths, and writes what it measured into its own document.
HARNESS = """<!doctype html><title>pages</title><pre id="found"></pre><script>
const errors = [], found = [];
function load(path, width) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
    frame.onload = () => setTimeout(() => {
      const page = frame.contentDocument, root = page.documentElement;
      const broken = [...page.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src);
      found.push({path, width, content: root.scrollWidth, window: root.clientWidth, broken, title: page.title,
        formulas: page.querySelectorAll("math").length, tex: page.querySelectorAll(".arithmatex").length});
      frame.remove(); done();
    }, 300);
    frame.src = path;
    document.body.append(frame);
  });
}
(async () => {
  for (const path of PATHS) for (const width of WIDTHS) await load(path, width);
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def visit(site, tmp_path_factory):
    """Return every page's measurements at both widths, and the browser's log."""
    paths = [f"/{page.relative_to(site).parent.as_posix()}/".replace("/./", "/") for page in site.rglob("index.html")]
    script = HARNESS.replace("PATHS", json.dumps(sorted(paths))).replace("WIDTHS", json.dumps(WIDTHS))
    (site / "harness.html").write_text(script, encoding="utf-8")
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        profile = tmp_path_factory.mktemp("profile")
        address = f"http://127.0.0.1:{server.server_port}/harness.html"
        dom, log = dump_dom(address, profile)
        server.shutdown()
    found = re.search(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1])), log


@needs_mkdocs
def test_every_public_name_is_on_the_api_page(site):
    import slimlstm as sl

    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    public = [name for name in sl.__all__ if callable(getattr(sl, name))]
    assert len(public) > 20
    assert [name for name in public if not re.search(rf'id="slimlstm\.(\w+\.)*{name}"', page)] == []


@needs_mkdocs
def test_every_example_on_the_api_page_is_a_block(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert page.count("&gt;&gt;&gt;") > 10
    assert "Example:" not in page
    assert re.findall(r":(?:func|class|meth|mod|data|attr|exc):", page) == []


@needs_mkdocs
@needs_chromium
def test_no_page_is_wider_than_its_window(visit):
    pages, _ = visit
    assert len(pages) > 20
    assert [page for page in pages if page["content"] > page["window"]] == []


@needs_mkdocs
@needs_chromium
def test_formulas_are_rendered_and_pictures_load(visit):
    pages, _ = visit
    assert sum(page["formulas"] for page in pages) > 20
    assert [page for page in pages if page["tex"] or page["broken"]] == []


@needs_mkdocs
@needs_chromium
def test_the_console_stays_empty(visit):
    _, log = visit
    assert console(log) == []
