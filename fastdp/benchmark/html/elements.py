"""Builds HTML from nested calls; text and attributes are escaped when it is written: no value becomes markup."""

from __future__ import annotations

from collections.abc import Container, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from fastdp.benchmark.figures import plain

# Characters of a title and a figure that fit beside another pair on a narrow screen.
_HALF_LINE = 16

Child = Element | str | int | None


def tag(name: str, /, *children: Child, **attributes: object) -> Element:
    """An element. Children that are None are left out; others that are no elements become text.

    Attributes lose a trailing underscore (`class_`), have dashes for underscores, and are left out where None or False.
    """
    element = Element(name)
    for key, value in attributes.items():
        if value is not None and value is not False:
            element.set(key.rstrip("_").replace("_", "-"), "" if value is True else plain(value))
    for child in children:
        append(element, child)
    return element


def append(parent: Element, child: Child) -> None:
    """Add a child, or text after the children that are there."""
    if child is None:
        return
    if isinstance(child, Element):
        parent.append(child)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + plain_text(child)
    else:
        parent.text = (parent.text or "") + plain_text(child)


def plain_text(value: object) -> str:
    """Safe text that keeps a space at its ends, where it meets an element."""
    text = str(value)
    inner = plain(text.strip())
    return f"{' ' * text[:1].isspace()}{inner}{' ' * text[-1:].isspace()}" if inner else " " * bool(text)


def document(title: str, style: str, *children: Child) -> str:
    """A whole page with its style sheet inside."""
    sheet = Element("style")
    sheet.text = style  # written as it is: a constant of this package
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", title),
        sheet,
    )
    page = tag("html", head, tag("body", tag("main", *children)), lang="en")
    return "<!doctype html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[Child]], *, words: Container[int] = (0,)
) -> Element:
    """A table; on a narrow screen each row is a block of labelled figures.

    Args:
        caption: said above it.
        header: the titles of the columns.
        rows: cells; the first of each row is its header.
        words: the numbers of the columns of words; the others are figures, to the right.
    """
    kind = ["word" if place in words else "figure" for place in range(len(header))]
    wide = [_is_wide(header, rows, place) for place in range(1, len(header))]
    if 2 * sum(wide) >= len(wide):  # halves between whole lines look torn
        wide = [True] * len(wide)
    kind = [kind[0], *(f"{one} wide" if alone else one for one, alone in zip(kind[1:], wide, strict=True))]
    head = [
        tag("th", title, scope="col", role="columnheader", class_=kind[place]) for place, title in enumerate(header)
    ]
    body = []
    for row in rows:
        first = tag("th", row[0], scope="row", role="rowheader", class_="word")
        others = [
            tag("td", cell, role="cell", class_=kind[place], data_label=header[place])
            for place, cell in enumerate(row)
            if place
        ]
        body.append(tag("tr", first, *others, role="row"))
    # The roles stay what they are where the style sheet shows each row as a block.
    inner = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *head, role="row"), role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        role="table",
    )
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _is_wide(header: Sequence[str], rows: Sequence[Sequence[Child]], place: int) -> bool:
    """Whether a column's title and figures take a line of their own on a narrow screen."""
    cells = [row[place] for row in rows]
    return any(isinstance(cell, Element) or len(header[place]) + len(str(cell)) > _HALF_LINE for cell in cells)
