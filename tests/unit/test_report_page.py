"""A report as a page: its content, its structure for keyboards and screen readers, and what is refused."""

import dataclasses
import hashlib
import json
import math
from html.parser import HTMLParser

import pytest
import torch
from reports import Characters, Tried, report_with_everything, trials
from torch import nn

import slimlstm as sl
from slimlstm.methods import shares_left_out, singular_values
from slimlstm.page import charts
from slimlstm.page.charts import Mark, frontier
from slimlstm.pipeline.report_page import size_in_words, time_in_words

VOID = {"meta", "link"}
TITLE = "Example <model> & co"


class Page(HTMLParser):
    """The elements of a page, each with its tag, attributes, text and parents' tags."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        found = {"tag": tag, "attributes": dict(attrs), "text": "", "parents": [one["tag"] for one in self._open]}
        self.elements.append(found)
        if tag not in VOID:
            self._open.append(found)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for one in self._open:
            one["text"] += data

    def all(self, tag, **attributes):
        wanted = attributes.items()
        return [one for one in self.elements if one["tag"] == tag and wanted <= one["attributes"].items()]

    def texts(self, tag, **attributes):
        return [one["text"] for one in self.all(tag, **attributes)]


def page_of(report, tmp_path, **options):
    report.to_html(tmp_path / "report.html", **options)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    return report_with_everything()[0]


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    times = {"PyTorch": 6e-3, "slimlstm compressed": 1.5e-3}
    return page_of(report, tmp_path_factory.mktemp("page"), title=TITLE, trials=trials(), latencies=times)


def test_every_section_is_there_and_linked(page):
    headings = page.texts("h2")
    assert headings == [
        "What was tried",
        "The matrices",
        "The loss, predicted and measured",
        "Speed beside other engines",
        "Load it",
        "Where it comes from",
    ]
    assert page.texts("h1") == [TITLE] == page.texts("title")[:1]
    assert [one["text"] for one in page.all("a") if "nav" in one["parents"]] == headings


def test_every_matrix_and_its_numbers(page, report):
    text = page.texts("table")[1]
    for site in report.sites:
        assert site.key in text
        assert f"{site.bytes_before:,}" in text
        assert f"{site.bytes_after:,}" in text
        assert f"{site.relative_error:.4f}" in text
        assert any(site.source_sha256 in one for one in page.texts("details"))
    assert page.texts("summary")[0].startswith(report.sites[0].key)


def test_every_plan_that_was_tried(page):
    table = page.texts("table")[0]
    for one in [trials().dense, *trials().trials]:
        assert one.label in table
        assert f"{one.bytes:,}" in table
    titles = page.texts("title")
    # A plan without a finite metric is in the table only; both pictures come in two widths.
    assert sum("svd <0.25>: perplexity 71" in title for title in titles) == 4
    assert not any("int3" in title for title in titles)
    kinds = [row[:2] for row in rows(page, 0)]
    assert kinds == [
        ["dense", "as it was"],
        ["fisher int8, keep 0.5", "chosen"],
        ["int8", "within the limit"],
        ["svd <0.25>", "beyond the limit"],
        ["int3", "beyond the limit"],
    ]


def rows(page, index):
    """The cells of a table's body, by row."""
    start = page.elements.index(page.all("table")[index])
    found = []
    for one in page.elements[start + 1 :]:
        if one["tag"] == "table":
            break
        if one["tag"] == "tr" and "tbody" in one["parents"]:
            found.append([])
        elif one["tag"] in ("td", "th") and "tbody" in one["parents"]:
            found[-1].append(one["text"])
    return found


def test_predicted_beside_measured_and_engines(page, report):
    assert rows(page, -2) == [["predicted", f"{report.predicted_rise:+.6f}"], ["measured", f"{report.measured_rise:+.6f}"]]
    assert rows(page, -1) == [["PyTorch", "6,000.0", "4.00x"], ["slimlstm compressed", "1,500.0", "1.00x"]]


def test_versions_and_hashes(page, report):
    facts = page.texts("dl")[-1]
    assert torch.__version__ in facts
    digest = hashlib.sha256(json.dumps(report.plan.to_dict(), sort_keys=True).encode()).hexdigest()
    assert digest in facts


def test_the_plan_on_the_page_runs(page, report):
    names = {"sl": sl, "model": Characters().eval()}
    code = page.texts("code")[-1]
    plan = code.partition("\nsl.compress_")[0]
    exec(plan, names)  # noqa: S102 (the page's own lines)
    assert names["plan"] == report.plan


def test_nothing_is_fetched_and_nothing_runs(page):
    assert not page.all("script")
    assert not page.all("img")
    for one in page.elements:
        attributes = one["attributes"]
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith(("#", "data:,"))
        assert "xlink:href" not in attributes
    style = page.texts("style")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["attributes"]["content"].startswith(
        "default-src 'none'"
    )


def test_links_lead_into_the_page(page):
    ids = [one["attributes"]["id"] for one in page.elements if "id" in one["attributes"]]
    assert len(ids) == len(set(ids))
    targets = {one["attributes"]["href"][1:] for one in page.all("a")}
    assert len(targets) > 10
    assert targets <= set(ids)


def test_screen_readers_find_their_way(page):
    assert page.all("html", lang="en")
    assert len(page.all("main")) == len(page.all("h1")) == 1
    assert page.all("a")[0]["attributes"]["href"] == "#content"
    for one in page.all("section"):
        assert one["attributes"]["aria-labelledby"]
    assert len(page.texts("caption")) == len(page.all("table"))
    for one in page.all("th"):
        assert one["attributes"]["scope"] in ("col", "row")
    charts_in_figures = [
        one for one in page.all("svg") if "figcaption" not in one["parents"] and "li" not in one["parents"]
    ]
    assert len(charts_in_figures) >= 10
    for one in charts_in_figures:
        assert one["parents"][-1] == "figure"
        assert one["attributes"]["role"] == "img"
        assert len(one["attributes"]["aria-label"]) > 20
    for one in page.all("figure"):
        assert one["text"]
    # A chart's points lead to rows of the table below, so they are no stops of the keyboard of their own.
    for one in page.all("a"):
        assert ("svg" in one["parents"]) == (one["attributes"].get("tabindex") == "-1")
    for one in page.all("div", **{"class": "scroll"}):
        assert one["attributes"]["tabindex"] == "0"
        assert one["attributes"]["aria-label"]


def test_a_plain_report_has_no_empty_sections(tmp_path):
    report = sl.compress_(nn.Sequential(nn.LSTM(8, 16)), sl.Quantize("int8"))
    page = page_of(report, tmp_path)
    assert page.texts("h2") == ["The matrices", "Load it", "Where it comes from"]
    assert any("No spectrum" in one for one in page.texts("details"))
    assert "sl.load" in page.texts("code")[0]


@pytest.mark.parametrize(("higher", "latency"), [(False, None), (True, 1e-3)])
def test_a_search_that_found_nothing(report, tmp_path, higher, latency):
    dense = Tried("dense", 100, 0.5, True, latency)
    found = trials(
        dense=dense, trials=[Tried("a", 50, 0.5, False, latency)], best=None, worst=None, higher_is_better=higher
    )
    page = page_of(report, tmp_path, trials=found)
    assert "Nothing smaller that was tried is within the limit" in page.texts("p", **{"class": "warning"})[0]
    directions = ["Higher" if higher else "Lower"] * (1 if latency is None else 2)
    captions = [text for text in page.texts("figcaption") if "against" in text]
    assert [text.split(". ")[1].split(" ")[0] for text in captions] == directions


def test_the_result_of_a_search_has_a_page(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(8, 16)), torch.randn(20, 4, 8)
    expected = model(x)[0].detach()

    def error(model):
        return float((model(x)[0].detach() - expected).norm() / expected.norm())

    found = sl.find_smallest(
        model, error, better="lower", at_most=0.02, evaluations=3, metric_name="error", output=tmp_path / "search.json"
    )
    assert found.worst == pytest.approx(0.02)
    page = page_of(found.report, tmp_path, trials=found)
    assert rows(page, 0)[0][:2] == [found.dense.label, "as it was"]
    assert [row[0] for row in rows(page, 0) if row[1] == "chosen"] == [found.best.label]
    assert "limit 0.02" in "".join(page.texts("text"))


def test_plans_without_a_time_are_not_in_its_picture(report, tmp_path):
    dense = Tried("dense", 100, 0.5, True, None)
    best = Tried("a", 50, 0.5, True, 2e-3)
    found = trials(dense=dense, trials=[best, Tried("b", 40, 0.7, False, 1e-3)], best=best)
    page = page_of(report, tmp_path, trials=found)
    labels = [one["attributes"]["aria-label"] for one in page.all("svg", role="img")[:4]]
    assert ["as it was" in label for label in labels] == [True, True, False, False]


def test_names_are_escaped(tmp_path):
    report = sl.compress_(nn.Sequential(nn.LSTM(8, 16)), sl.LowRank(rank=2))
    name = """a<b>&"c'</title>.weight_hh_l0"""
    sites = [dataclasses.replace(site, key=name, note="<i>") for site in report.sites]
    page = page_of(dataclasses.replace(report, sites=sites, notes=["<script>"]), tmp_path, title=name, usage="a < b")
    assert name in page.texts("table")[0]
    assert page.texts("h1") == [name]
    assert not page.all("script")
    assert not page.all("b")
    assert "a < b" in page.texts("code")


def test_files_are_listed_with_their_hashes(tmp_path, report):
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"1234")
    folder = tmp_path / "small"
    model = nn.Sequential(nn.LSTM(8, 16))
    sl.compress_(model, sl.LowRank(rank=2))
    sl.save(model, folder)
    facts = page_of(report, tmp_path, files=[weights, folder]).texts("dl")[-1]
    assert f"4 bytes, SHA-256 {hashlib.sha256(b'1234').hexdigest()}" in facts
    inside = next(folder.glob("*.safetensors")).read_bytes()
    assert hashlib.sha256(inside).hexdigest() in facts


def without_the_extra(monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("folder.html", {}, "no name of a file"),
        ("report", {}, "no name of a file"),
        ("report.html", {"files": ["nowhere.pt"]}, "name one that exists"),
    ],
)
def test_what_cannot_be_written_is_refused(report, tmp_path, path, options, message):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(sl.SlimLSTMError, match=message):
        report.to_html(tmp_path / path, **options)
    assert [one.name for one in tmp_path.iterdir()] == ["folder.html"]


def test_without_the_extra_a_page_is_refused_and_a_table_is_not(report, tmp_path, monkeypatch):
    without_the_extra(monkeypatch)
    old = tmp_path / "report.html"
    old.write_text("old")
    with pytest.raises(sl.SlimLSTMError, match=r"slimlstm\[report\]"):
        report.to_html(old)
    assert old.read_text() == "old"
    assert "<table>" in report._repr_html_()


def test_notebooks_show_a_table(report):
    page = Page(report._repr_html_())
    assert [row[0] for row in rows(page, 0)] == [site.key for site in report.sites]
    assert not page.all("script")
    assert not page.all("style")
    assert any(str(report.lstm) in text for text in page.texts("p"))


def test_the_frontier_has_no_point_that_another_betters():
    marks = [Mark(x, y, "", "") for x, y in ((3, 1), (1, 5), (2, 6), (2, 2), (3, 4))]
    assert [(mark.x, mark.y) for mark in frontier(marks, lower=True)] == [(1, 5), (2, 2), (3, 1)]
    assert [(mark.x, mark.y) for mark in frontier(marks, lower=False)] == [(1, 5), (2, 6)]


@pytest.mark.parametrize("method", ["svd", "fisher", "activation"])
def test_a_spectrum_is_the_share_that_a_rank_leaves_out(method):
    torch.manual_seed(0)
    model = Characters().eval()
    weight = model.lstm.weight_hh_l0.detach().clone()
    batches = [torch.randint(16, (5, 4)) for _ in range(3)]
    config = sl.LowRank(method, rank=3)
    report = sl.compress_(model, config, batches=batches, loss=lambda m, x: m(x).flatten(0, 1).square().mean(1))
    site = next(site for site in report.sites if site.key == "lstm.weight_hh_l0")
    ranks, shares = zip(*site.spectrum, strict=True)
    assert (ranks[0], ranks[-1], shares[0], shares[-1]) == (0, 24, 1.0, 0.0)
    assert 3 in ranks
    assert list(shares) == sorted(shares, reverse=True)
    if method == "svd":
        squares = singular_values(weight).square()
        assert dict(site.spectrum)[3] == pytest.approx(float(squares[3:].sum() / squares.sum()), rel=1e-6)
        assert math.sqrt(dict(site.spectrum)[3]) == pytest.approx(site.relative_error, rel=1e-3)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 1.0], ((0, 1.0), (1, 0.25), (2, 0.0))),
        ([0.0, 0.0], ((0, 0.0), (1, 0.0), (2, 0.0))),
    ],
)
def test_shares(losses, expected):
    assert shares_left_out(torch.tensor(losses), 1) == expected


def test_a_matrix_of_zeros_has_a_page(tmp_path):
    model = nn.Sequential(nn.LSTM(8, 16))
    nn.init.zeros_(model[0].weight_hh_l0)
    page = page_of(sl.compress_(model, sl.LowRank(rank=2)), tmp_path)
    assert sum("No spectrum" in one for one in page.texts("details")) == 1


def test_reports_outlive_json(report):
    assert sl.Report.from_dict(json.loads(report.to_json())) == report


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (2_620_000, "2.62 MB"), (3_000_000_000, "3 GB")]
)
def test_sizes_in_words(number, words):
    assert size_in_words(number) == words


@pytest.mark.parametrize(("seconds", "words"), [(2.0, "2 s"), (0.0015, "1.5 ms"), (0.000_25, "250 µs"), (0.99999, "1 s")])
def test_times_in_words(seconds, words):
    assert time_in_words(seconds) == words


def test_compress_writes_a_report(folder, tmp_path, run):
    page, small = tmp_path / "report.html", tmp_path / "small"
    file = folder / "model.safetensors"
    status, out, err = run("compress", file, "-o", small, "--rank", "2", "--storage", "int8", "--report", page)
    assert status == 0, err
    assert str(page) in out.replace("\n", "")
    found = Page(page.read_text(encoding="utf-8"))
    assert found.texts("h1") == ["model.safetensors, compressed"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() in found.texts("dl")[-1]
    assert f"sl.load({str(small)!r}, MyModel())" in found.texts("code")[0]


def test_bench_writes_a_report_with_the_engines(folder, tmp_path, run, monkeypatch):
    from slimlstm.bench import bench_layers

    monkeypatch.setitem(bench_layers.__kwdefaults__, "seconds", 0.002)
    page = tmp_path / "report.html"
    status, _, err = run("bench", folder / "model.safetensors", "--rank", "2", "--steps", "2", "--report", page)
    assert status == 0, err
    found = Page(page.read_text(encoding="utf-8"))
    assert "slimlstm compressed" in found.texts("table")[-1]
    assert "lstms.0 layer 0, weight_hh_l0" in found.texts("table")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "FILE", "-o", "OUT", "--rank", "2", "--report", "report.pdf"], "ends in .html"),
        (["compress", "FILE", "-o", "OUT", "--rank", "2", "--report", "old.html"], "add --force"),
        (["bench", "FILE", "--rank", "2", "--report", "old.html"], "add --force"),
        (["bench", "FILE", "--report", "new.html"], "say how to compress"),
    ],
)
def test_the_command_refuses_before_it_compresses(folder, tmp_path, run, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.html").write_text("old")
    before = sorted(tmp_path.iterdir())
    given = [{"FILE": folder / "model.safetensors", "OUT": "out"}.get(one, one) for one in arguments]
    status, _, err = run(*given)
    assert status == 1
    assert message in err
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.html").read_text() == "old"


def test_the_command_names_the_extra(folder, tmp_path, run, monkeypatch):
    without_the_extra(monkeypatch)
    file, page = folder / "model.safetensors", tmp_path / "report.html"
    status, _, err = run("compress", file, "-o", tmp_path / "small", "--rank", "2", "--report", page)
    assert status == 1
    assert "slimlstm[report]" in err
    assert not (tmp_path / "small").exists()
