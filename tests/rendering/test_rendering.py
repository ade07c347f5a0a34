"""Tables as text, in a terminal and as HTML: what each rendering shows, and where it is chosen."""

from __future__ import annotations

import html.parser
import importlib.util
import io
import re
import sys

import pytest

from fastdp.rendering.blocks import Paragraph, Table
from fastdp.rendering.colors import COLORS
from fastdp.rendering.html import as_html
from fastdp.rendering.terminal import BAR, in_terminal, renderables
from fastdp.rendering.text import as_text

TIMES = Table(
    "Milliseconds",
    ["device", "rows", "compute", "wait"],
    [["cuda:0", "3", "1,500.00", "500.00"], ["cuda:1", "20", "0.00", "0.00"]],
    note="a note",
    parts=["compute", "wait"],
)
BLOCKS = [Paragraph("First."), TIMES, Paragraph("Too small.", warns=True)]


def test_text_has_words_on_the_left_and_numbers_on_the_right():
    assert as_text(BLOCKS) == (
        "First.\n\n"
        "Milliseconds\n"
        "  device  rows   compute    wait\n"
        "  cuda:0     3  1,500.00  500.00\n"
        "  cuda:1    20      0.00    0.00\n"
        "  a note\n\n"
        "Too small."
    )


def test_shares_are_of_the_parts_of_a_row():
    assert TIMES.shares(TIMES.rows[0]) == [0.75, 0.25]
    assert TIMES.shares(TIMES.rows[1]) == []


def test_a_table_without_rows_has_numbers_nowhere():
    assert as_text([Table("Empty", ["a", "b"], [])]) == "Empty\n  a  b"


def drawn(width: int) -> str:
    """What rich prints in a terminal of this width, without colors."""
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=width, color_system=None)
    console.print(*renderables(BLOCKS, width), sep="\n", highlight=False)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [16, 24, 32, 60, 80, 108])
def test_a_terminal_of_any_width_shows_every_cell(width):
    lines = drawn(width).splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(lines)
    for word in ("First.", "Milliseconds", "cuda:1", "1,500.00", "a note", "Too small."):
        assert word in text
    assert ("█" * BAR in text) == (width >= 80)


def test_sentences_wrap_between_words_and_numbers_never():
    why = "a sentence that is much too long for one line of this terminal"
    table = Table("How", ["how", "in seconds", "why"], [["eager", "12,345.67", why]])
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=40, color_system=None)
    console.print(*renderables([table], 40), sep="\n", highlight=False)
    lines = console.file.getvalue().splitlines()
    words = " ".join(lines).split()
    assert [word for word in words if word in why.split()] == why.split()
    assert {"eager", "12,345.67", "in", "seconds"} <= set(words)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_codes_for_colors_are_written_to_terminals_only(monkeypatch):
    pytest.importorskip("rich.console")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert in_terminal(BLOCKS) is None
    monkeypatch.setattr(sys, "stdout", Terminal())
    found = in_terminal(BLOCKS)
    assert "\x1b[" in found
    assert "1,500.00" in found
    assert not found.endswith("\n")
    monkeypatch.setenv("TERM", "dumb")
    assert in_terminal(BLOCKS) is None


def test_without_rich_a_terminal_gets_plain_text(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert in_terminal(BLOCKS) is None


class Page(html.parser.HTMLParser):
    """The text of a piece of HTML without its style; checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] != "style":
            self.words.append(data)


def test_html_shows_every_cell_and_loads_and_runs_nothing():
    text = as_html(BLOCKS)
    page = Page(text)
    for word in ("First.", "Milliseconds", "cuda:1", "1,500.00", "a note", "Too small."):
        assert word in page.words
    assert set(page.tags) <= {
        "div", "style", "p", "table", "caption", "thead", "tbody", "tr", "th", "td", "span",
    }  # fmt: skip
    assert not re.search(r"https?:|url\(|@import|javascript|\son\w+=", text)
    assert re.findall(r"width: ([\d.]+)%", text) == ["75.00", "25.00"]


def test_html_escapes_all_text():
    evil = "<script>&\"'"
    block = Table(evil, [evil, "n"], [[evil, "1"]], note=evil, parts=["n"])
    text = as_html([Paragraph(evil), Paragraph(evil, warns=True), block])
    assert "<script" not in text
    assert "".join(Page(text).words).count(evil) == 6


def test_html_takes_its_colors_of_text_from_the_page():
    style = as_html([]).split("<style>")[1].split("</style>")[0]
    colors = re.findall(r"(?<![-\w])color: ([^;]+);", style)
    assert colors
    assert set(colors) == {"inherit"}
    assert set(re.findall(r"background: ([^;]+);", style)) == {"transparent"}


def test_colors_of_parts_can_be_seen_on_white_and_on_black():
    for color in COLORS:
        red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (light + 0.05) >= 2.0, color
        assert (light + 0.05) / (0.012 + 0.05) >= 3.0, color  # a dark page: #1e1e1e
