"""The pages: well-formed, self-contained, complete, and safe with whatever a result holds."""

from __future__ import annotations

import gzip
import html.parser
import json
import re

import benchmark_results
import pytest

from fastdp.benchmark.comparison import compare
from fastdp.benchmark.entries import entries_of
from fastdp.benchmark.figures import Spread
from fastdp.benchmark.html import Page, comparison_page, report_page
from fastdp.benchmark.html.charts import Series, nice_ticks, scaling
from fastdp.benchmark.html.elements import tag
from fastdp.benchmark.html.speed import series_of
from fastdp.benchmark.html.step_trace import read_step

VOID = {"meta", "br", "hr", "img", "input", "link"}
RESULTS = {
    "several": benchmark_results.result,
    "gpus": benchmark_results.gpu_result,
    "one": lambda: benchmark_results.result([benchmark_results.entry()]),
    "many": benchmark_results.many,
    "nothing": lambda: benchmark_results.result([]),
    "no figures": benchmark_results.without_figures,
    "all failed": lambda: benchmark_results.result([]) | {"failed": [{"name": "fastdp", "reason": "no device"}]},
    "hostile": benchmark_results.hostile,
    "named alike": lambda: benchmark_results.result([benchmark_results.entry(), benchmark_results.entry(devices=4)]),
}


class Checked(html.parser.HTMLParser):
    """Reads a page strictly: each element is closed in its order. Notes elements, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        assert len(attributes) == len(dict(attributes)), f"an attribute is there twice: {name} {attributes}"
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def words(self):
        return " ".join(" ".join(self.text).split())

    def named(self, name):
        return [attributes for found, attributes in self.elements if found == name]


@pytest.mark.parametrize("name", RESULTS)
def test_a_page_is_well_formed_and_loads_nothing(name):
    page = report_page(RESULTS[name]())
    found = Checked(page)
    assert {one for one, _ in found.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "div", "h1", "h2", "h3", "p"),
        *("b", "i", "span", "code", "pre", "ul", "li", "dl", "dt", "dd", "figure", "details", "summary"),
        *("table", "caption", "thead", "tbody", "tr", "th", "td", "svg", "line", "path", "text", "title"),
    }
    for element, attributes in found.elements:
        assert not {"src", "href", "srcset", "xlink:href", "action"} & set(attributes), element
        assert not [key for key in attributes if key.startswith("on")], element
        assert "url(" not in (attributes.get("style") or "")
    sheet = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in sheet
    assert "@import" not in sheet
    assert "//" not in sheet
    policy = next(one["content"] for one in found.named("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    page.encode("utf-8")


def test_hostile_text_stays_text():
    page = report_page(benchmark_results.hostile())
    found = Checked(page)
    assert "<script>alert('x')</script>" in found.words()
    assert not set(page) & set("\x1b\x07\r\u202e\ud800\u2028")


def test_the_page_has_every_section_and_figure():
    words = Checked(report_page(benchmark_results.gpu_result())).words()
    sections = ["Throughput", "Where the time goes", "One step", "Memory", "Before steps are fast", "Batch sizes"]
    places = [
        words.index(one) for one in [*sections, "1 way failed", "What was measured, and on what", "How to repeat"]
    ]
    assert places == sorted(places)
    for figure in ("18,700", "18,513 to 18,887", "97%", "230 mJ", "31.0 GB", "13.7", "820 ms", "1,109,386"):
        assert figure in words, figure
    assert "ModuleNotFoundError: no module named 'jax'" in words
    assert "fastdp bench mlp --virtual 1,2,4 --output 'a folder'" in words
    assert "torch 2.13.0" in words
    assert "GPUs 8 x NVIDIA H100 80GB HBM3, 85.0 GB, compute capability 9.0" in words


def test_times_on_gpus_are_said_to_be_the_hosts():
    assert "times of the host's threads" in Checked(report_page(benchmark_results.gpu_result())).words()
    assert "times of the host's threads" not in Checked(report_page(benchmark_results.result())).words()


def test_a_noisy_machine_is_said_before_the_figures():
    result = benchmark_results.result()
    result["noise"]["verdict"] = "noisy: other programs keep 1.7 of 2 cores busy"
    words = Checked(report_page(result)).words()
    assert words.index("noisy: other programs keep 1.7") < words.index("Throughput")


@pytest.mark.parametrize("name", ["several", "gpus", "many"])
def test_every_picture_has_words_or_a_table_beside_it(name):
    page = report_page(RESULTS[name]())
    found = Checked(page)
    for attributes in found.named("svg"):
        outer = "x" not in attributes and attributes.get("aria-hidden") != "true"
        assert not outer or (attributes["role"] == "img" and len(attributes["aria-label"]) > 40)
    for attributes in found.named("div"):
        if attributes.get("class") == "bars":
            assert attributes["aria-hidden"] == "true"  # so its figures are in a table:
    words = found.words()
    for entry in entries_of(RESULTS[name]()):
        for device in entry.per_device:
            assert f"{1e3 * device.seconds['compute']:.3g}" in words


def test_the_page_suits_dark_narrow_and_printed():
    page = report_page(benchmark_results.result())
    for query in ("prefers-color-scheme: dark", "max-width: 600px", "@media print"):
        assert query in page
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Checked(page).named("meta")


def _luminance(color):
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return sum(
        weight * (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4)
        for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )


def _contrast(one, other):
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(scheme):
    """4.5 for text and 3 for what pictures are made of (Web Content Accessibility Guidelines 2.1, 1.4.3 and 1.4.11)."""
    light, dark = re.findall(r":root \{(.*?)\}", report_page(benchmark_results.result([])), re.DOTALL)[:2]
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    if scheme == "dark":
        colors |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark))
    for text in ("text", "soft"):
        for back in ("page", "card"):
            assert _contrast(colors[text], colors[back]) >= 4.5, (text, back)
    for kind in ("good", "bad", "warn"):
        assert _contrast(colors[kind], colors[f"{kind}-back"]) >= 4.5, kind
    verbs = ("input", "scatter", "compute", "merge", "wait", "communication", "update", "other")
    for drawn in (*verbs, *(f"s{place}" for place in range(8))):
        assert _contrast(colors[drawn], colors["card"]) >= 3, drawn


def test_entries_that_differ_in_devices_alone_are_a_series():
    series = series_of(entries_of(benchmark_results.result()))
    assert [one.name for one in series] == ["fastdp, eager", "fastdp, compiled", "torch"]
    assert [devices for devices, _ in series[1].points] == [1, 2, 4]
    assert series[1].ideal(4) == pytest.approx(4 * 15_120)


def _lines(figure, kind):
    return [one.attrib for one in figure.iter("line") if one.get("class") == kind]


def test_the_ideal_line_begins_at_zero_and_goes_through_the_first_point():
    series = [Series("one", ((1, Spread(100, 100, 100)), (4, Spread(400, 400, 400))))]
    figure = scaling(series, "words")
    (ideal,) = _lines(figure, "ideal")
    (link,) = _lines(figure, "link")
    assert (ideal["x1"], ideal["y1"]) == ("0.00%", "100.00%")
    assert (ideal["x2"], ideal["y2"]) == (link["x2"], link["y2"])  # this series scales ideally


def test_of_many_series_the_fastest_that_begins_with_one_device_gets_the_ideal_line():
    def spread(value):
        return Spread(value, value, value)

    series = [
        Series("slow", ((1, spread(50)), (4, spread(150)))),
        Series("late", ((2, spread(300)), (4, spread(500)))),
        Series("fast", ((1, spread(40)), (4, spread(160)))),
    ]
    figure = scaling(series, "words")
    assert len(_lines(figure, "ideal")) == 1
    assert "ideal of fast: each device as fast as in the first point" in "".join(figure.itertext())


def test_an_ideal_far_above_the_figures_leaves_the_picture():
    figure = scaling([Series("one", ((1, Spread(100, 90, 110)), (8, Spread(120, 110, 130))))], "words")
    (ideal,) = _lines(figure, "ideal")
    assert ideal["y2"] == "0.00%"
    assert float(ideal["x2"].rstrip("%")) < 50


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [(38_450.0, [0, 10_000, 20_000, 30_000, 40_000]), (1.0, [0, 0.25, 0.5, 0.75, 1.0]), (0, [0, 1])],
)
def test_ticks_are_round_numbers(largest, ticks):
    assert nice_ticks(largest) == pytest.approx(ticks)


def test_text_and_elements_keep_their_order():
    element = tag("p", "one ", tag("b", "two"), " three", None, hidden=True, class_="a", title=None)
    assert "".join(element.itertext()) == "one two three"
    assert element.attrib == {"hidden": "", "class": "a"}


def _trace(step, lanes=("virtual:0 compute", "virtual:1 compute"), name="train step"):
    """A trace of two steps; the second, of number `step`, has a span that ends after it."""
    events = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "fastdp"}}]
    for tid, lane in enumerate(lanes):
        events.append({"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": lane}})
        events.append({"ph": "M", "pid": 1, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": -tid}})
    for number, begin in ((step - 1, 0), (step, 10_000)):
        args = {"step": number}
        events.append({"ph": "X", "pid": 1, "tid": 9, "name": name, "ts": begin, "dur": 5_000, "args": args})
        for tid in range(len(lanes)):
            event = {"ph": "X", "pid": 1, "tid": tid, "args": args}
            events.append({**event, "name": "scatter", "ts": begin, "dur": 500})
            events.append({**event, "name": "run", "ts": begin + 500, "dur": 6_500})
    return {"traceEvents": events}


def test_a_trace_is_the_timeline(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(_trace(2)), "utf-8")
    step = read_step(tmp_path / "t.json")
    assert step.seconds == pytest.approx(0.007)
    assert [lane for lane, _ in step.lanes] == ["virtual:1 compute", "virtual:0 compute"]  # by their places
    spans = step.lanes[0][1]
    assert [(one.name, one.color) for one in spans] == [("scatter", "var(--scatter)"), ("run", "var(--compute)")]
    assert [one.begin for one in spans] == pytest.approx([0, 0.0005])

    result = benchmark_results.result()
    result["entries"][0]["trace"] = "t.json"
    result["entries"][2]["trace"] = "elsewhere/t.json"  # the folder has moved since
    words = Checked(report_page(result, tmp_path)).words()
    fastest = "fastdp, 4 devices, eager. A recorded step of 7.00 ms; elsewhere/t.json opens in Perfetto."
    assert 0 < words.index(fastest) < words.index("fastdp, 1 device, eager. A recorded step")
    assert "not a recording" in Checked(report_page(result)).words()


def test_a_compressed_trace_is_read(tmp_path):
    with gzip.open(tmp_path / "t.json.gz", "wt") as file:
        json.dump(_trace(7), file)
    assert read_step(tmp_path / "t.json.gz").seconds == pytest.approx(0.007)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1, 2]", '{"traceEvents": [{"ph": "X", "ts": [], "pid": {}}]}', "\x00", "[["]
)
def test_a_file_that_is_no_trace_is_told(tmp_path, text):
    (tmp_path / "t.json").write_text(text, "utf-8")
    result = benchmark_results.result()
    result["entries"][0]["trace"] = "t.json"
    words = Checked(report_page(result, tmp_path)).words()
    assert "The trace was not read" in words
    assert "not a recording" in words


def test_a_trace_with_hostile_names_is_safe(tmp_path):
    hostile = benchmark_results.HOSTILE.replace("\ud800", "")
    trace = _trace(2, lanes=(hostile,))
    trace["traceEvents"] += [
        {"ph": "X", "pid": [], "tid": {"a": 1}, "name": hostile, "ts": 10_100, "dur": 5},
        {"ph": "X", "name": "negative", "ts": 10_100, "dur": -5},
        {"ph": "M", "name": "thread_name", "args": []},
    ]
    (tmp_path / "t.json").write_text(json.dumps(trace), "utf-8")
    result = benchmark_results.result()
    result["entries"][0]["trace"] = "t.json"
    page = report_page(result, tmp_path)
    assert "A recorded step" in Checked(page).words()
    assert "<script>alert" not in page


def test_a_notebook_shows_a_page_in_a_frame_of_its_own(tmp_path):
    page = Page(report_page(benchmark_results.result()))
    frame = Checked(page._repr_html_()).named("iframe")
    assert len(frame) == 1
    assert frame[0]["srcdoc"] == str(page)
    assert "sandbox" in frame[0]
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == str(page)


@pytest.mark.parametrize("name", RESULTS)
def test_a_page_of_a_comparison_is_well_formed(name):
    results = [benchmark_results.result(), RESULTS[name](), RESULTS[name]()]
    page = comparison_page(compare(results, ["a.json", benchmark_results.HOSTILE, "c.json"]))
    found = Checked(page)
    assert "script" not in {element for element, _ in found.elements}
    assert found.words().index("What differs") < found.words().index("over a.json")
