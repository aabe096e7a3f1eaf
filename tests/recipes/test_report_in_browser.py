"""A report's page in a browser, from disk: every figure is drawn, text is legible, nothing is wider than the window."""

import html
import json
import re

import pytest
import torch
from browser import console, dump_dom, needs_chromium, run
from reports import report_with_everything

pytestmark = needs_chromium

# Windows have a least width, frames have none.
FRAME = """<!doctype html><title>frame</title><pre id="found"></pre>
<script>onmessage = event => { document.getElementById("found").textContent = event.data; };</script>
<iframe src="PAGE" style="border: 0; height: 900px; width: WIDTHpx"></iframe>"""
# Measures the page that it is part of, and sends the result to the frame.
PROBE = """<script>
const root = document.documentElement, style = getComputedStyle(root);
const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgb(color) {
  paint.clearRect(0, 0, 1, 1); paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
  return [...paint.getImageData(0, 0, 1, 1).data];
}
function luminance(color) {
  const [r, g, b] = rgb(color).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
const variable = name => style.getPropertyValue("--" + name).trim();
function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (rgb(color)[3] === 255) return color;
  }
  return "white";
}
const shown = element => element.checkVisibility({visibilityProperty: true, contentVisibilityAuto: true});
const texts = [...document.body.querySelectorAll("*")].filter(element => shown(element)
  && !["SCRIPT", "PRE"].includes(element.tagName) && !element.closest("title")
  && [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()));
const ratios = texts.map(element => {
  const inChart = element.closest("svg"), look = getComputedStyle(element);
  const grounds = inChart ? [variable("paper"), variable("band")] : [behind(element)];
  const ratio = Math.min(...grounds.map(ground => contrast(inChart ? look.fill : look.color, ground)));
  return {text: element.textContent.trim().slice(0, 40), ratio};
});
const marks = ["ink", "soft", "accent", "warn", "good"].flatMap(name =>
  ["paper", "band"].map(ground => ({name, ground, ratio: contrast(variable(name), variable(ground))})));
document.querySelectorAll("details").forEach(one => { one.open = true; });
const figures = [...document.querySelectorAll("figure")].map(figure => {
  const charts = [...figure.querySelectorAll(":scope > svg")].filter(shown);
  return {charts: charts.length, sizes: charts.map(chart => {
    const box = chart.getBoundingClientRect();
    return [box.width, box.height, chart.querySelectorAll("path[d], line").length, chart.querySelectorAll("text").length];
  }), label: charts.map(chart => chart.getAttribute("aria-label"))};
});
document.querySelectorAll("details").forEach(one => { one.open = false; });
const stops = [...document.querySelectorAll("a[href], summary, [tabindex]")].filter(shown).filter(one => one.tabIndex >= 0);
const keys = stops.map(stop => {
  stop.focus();
  const look = getComputedStyle(stop), box = stop.getBoundingClientRect();
  return {
    text: stop.textContent.trim().slice(0, 40), focused: document.activeElement === stop, order: stop.tabIndex,
    outline: look.outlineStyle === "none" ? 0 : parseFloat(look.outlineWidth), inside: box.right > 0 && box.bottom > 0,
    ratio: contrast(look.outlineColor, behind(stop)), name: stop.getAttribute("aria-label") || stop.textContent.trim(),
  };
});
document.activeElement.blur();
location.hash = "#matrix-2";
setTimeout(() => {
  parent.postMessage(JSON.stringify({
    width: innerWidth, content: root.scrollWidth, window: root.clientWidth, figures, ratios, marks, keys,
    dark: matchMedia("(prefers-color-scheme: dark)").matches, paper: variable("paper"),
    opened: [...document.querySelectorAll("details")].filter(one => one.open).map(one => one.innerText.split("\\n")[0]),
    nav: shown(document.querySelector("nav")),
  }), "*");
}, 200);
</script></body>"""
LIGHT, DARK = "--blink-settings=preferredColorScheme=1", "--blink-settings=preferredColorScheme=0"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The path of a page with every section."""
    torch.manual_seed(0)
    report, trials = report_with_everything()
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.to_html(path, title="Example <model> & co", trials=trials, latencies={"PyTorch": 6e-3, "slimlstm": 1.5e-3})
    return path


@pytest.fixture(scope="module")
def measured(page, tmp_path_factory):
    """Measures the page in a window of a width, in light or dark, or as it prints."""

    def measured(width, scheme, is_print=False):
        text = page.read_text(encoding="utf-8")
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", PROBE)
        if is_print:
            text = text.replace("@media print", "@media all")
        probed = page.with_name(f"{width}{scheme[-1]}{is_print}.html")
        probed.write_text(text, encoding="utf-8")
        frame = probed.with_name(f"frame-{probed.name}")
        frame.write_text(FRAME.replace("PAGE", probed.name).replace("WIDTH", str(width)), encoding="utf-8")
        dom, log = dump_dom(frame.as_uri(), tmp_path_factory.mktemp("profile"), scheme)
        found = re.search(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
        assert found, log
        assert console(log) == []
        return json.loads(html.unescape(found[1]))

    return measured


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_figure_is_drawn_and_legible(measured, width, scheme):
    found = measured(width, scheme)
    assert found["width"] == width
    assert found["dark"] == (scheme == DARK)
    assert found["content"] <= found["window"]
    assert len(found["figures"]) >= 7
    for figure in found["figures"]:
        assert figure["charts"] == 1
        assert figure["label"][0]
        wide, high, shapes, labels = figure["sizes"][0]
        assert 250 < wide <= width
        assert high > 80
        assert shapes >= 2
        assert labels >= 2
    assert len(found["ratios"]) > 100
    assert [text for text in found["ratios"] if text["ratio"] < 4.5] == []
    assert [mark for mark in found["marks"] if mark["ratio"] < 3.0] == []
    assert len(found["opened"]) == 1  # by the link to its content
    assert "weight_hh_l0" in found["opened"][0]


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_keys_reach_everything_and_show_where_they_are(measured, scheme):
    keys = measured(1280, scheme)["keys"]
    assert keys[0]["text"] == "Skip to the content"
    assert {"Load it", "The plan, to repeat or to edit"} <= {key["text"] for key in keys}
    # Links to sections and matrices, summaries, and the regions that scroll.
    assert len(keys) > 20
    wrong = [key for key in keys if not (key["focused"] and key["outline"] >= 2 and key["ratio"] >= 3 and key["inside"])]
    assert wrong == []
    assert all(key["order"] == 0 and key["name"] for key in keys)


def test_dark_is_dark(measured):
    assert measured(1280, LIGHT)["paper"] != measured(1280, DARK)["paper"]


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_print_is_on_white_and_without_navigation(measured, scheme):
    found = measured(800, scheme, is_print=True)
    assert found["paper"] == "#ffffff"
    assert not found["nav"]
    assert [text for text in found["ratios"] if text["ratio"] < 4.5] == []
    # Closed parts are printed too.
    assert any("rank 4" in text["text"] for text in found["ratios"])
    assert found["content"] <= found["window"]


def test_it_prints(page, tmp_path):
    printed = tmp_path / "report.pdf"
    run(page.as_uri(), tmp_path / "profile", f"--print-to-pdf={printed}")
    content = printed.read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) < 20


def test_the_page_itself_logs_nothing(page, tmp_path):
    dom, log = dump_dom(page.as_uri(), tmp_path / "profile")
    assert "Example &lt;model&gt; &amp; co" in dom
    assert console(log) == []
