"""Checks a built site without a browser: links, anchors, pictures, ids, headings, tables for phones, no network.

python tests/shared/site_check.py build/site
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a page loads by itself: element and attribute. A link that a reader clicks may lead out of the site.
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("use", "href")}
REMOTE = re.compile(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//")


class Page(HTMLParser):
    """What one page holds, as far as it is checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.wrong: list[str] = []
        self._titles = 0
        self._styled = False
        self._in: list[str] = []
        self._table: list[bool] = []
        self.feed(text)
        if self._titles != 1:
            self.wrong.append(f"{self._titles} headings of the first level")

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note ids, links and what is loaded; find pictures without words and cells without a title."""
        given = {name: value or "" for name, value in attributes}
        if "id" in given:
            self.ids[given["id"]] += 1
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
            if not given["href"]:
                self.wrong.append("a link without a target")
        self.loaded += [
            value for name, value in given.items() if (tag, name) in LOADED and given.get("rel") != "canonical"
        ]
        if tag == "img" and not given.get("alt", "").strip():
            self.wrong.append(f"no words for the picture {given.get('src')}")
        self._titles += tag == "h1"
        if tag in {"p", "code"}:
            self._in.append(tag)
        self._styled = tag == "style"
        if tag == "table":
            self._table.append("class" not in given)
        if tag == "td" and self._table and self._table[-1] and "data-label" not in given:
            self.wrong.append("a cell without its column's title: on a phone the table scrolls sideways")

    def handle_endtag(self, tag: str) -> None:
        """Leave a table, a style, a paragraph or code."""
        if self._in and self._in[-1] == tag:
            self._in.pop()
        if tag == "table" and self._table:
            self._table.pop()
        self._styled = self._styled and tag != "style"

    def handle_data(self, data: str) -> None:
        """Look for what a style loads from the network, and for tables that are none."""
        if self._in == ["p"] and data.startswith("| "):
            self.wrong.append(f"rows of a table that stand outside of it: {data[:40]!r}")
        if self._table and self._in[-1:] == ["code"] and "\\|" in data:
            self.wrong.append(f"a stroke that its backslash is shown with: {data[:40]!r}")
        if self._styled and REMOTE.search(data):
            self.wrong.append("a style loads from the network")


def problems(site: Path) -> Iterator[str]:
    """Each fault of a site: the page, and what is wrong."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site}: no pages"
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        twice = [f"two elements with the id {one!r}" for one, count in page.ids.items() if count > 1]
        for wrong in [*page.wrong, *twice]:
            yield f"{name}: {wrong}"
        for target in page.loaded:
            if urlsplit(target).netloc:
                yield f"{name}: loads {target} from the network"
        for target in dict.fromkeys(page.links + page.loaded):
            if (wrong := _leads_nowhere(target, path, site, pages)) is not None:
                yield f"{name}: {wrong}"
    for path in sorted(site.rglob("*.css")):
        if REMOTE.search(path.read_text("utf-8")):
            yield f"{path.relative_to(site).as_posix()}: loads from the network"


def _leads_nowhere(target: str, path: Path, site: Path, pages: dict[Path, Page]) -> str | None:
    """Why a link of a page leads nowhere; None if it does lead somewhere, or out of the site."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return None
    folder = site if parts.path.startswith("/") else path.parent  # the page for what is not found counts from the root
    there = (folder / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
    if there.is_dir():
        there = there / "index.html"
    if not there.exists():
        return f"{target} is not there"
    if parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].ids:
        return f"{target}: the page has no such place"
    return None


def main() -> int:
    """Print the faults; their number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    found = list(problems(parser.parse_args().site.resolve()))
    for one in found:
        print(one)  # noqa: T201
    return min(len(found), 100)


if __name__ == "__main__":
    sys.exit(main())
