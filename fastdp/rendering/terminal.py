"""Blocks in a terminal: tables of the library rich that fit its width, with bars of parts where there is room."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from fastdp.rendering.blocks import Block, Table
from fastdp.rendering.colors import color

BAR = 24  # characters
SENTENCE = 16  # the narrowest column in which a sentence can be read


def renderables(blocks: Sequence[Block], width: int) -> Iterator[Any]:
    """What rich prints for these blocks in a terminal of `width` columns. Needs rich."""
    text = importlib.import_module("rich.text").Text
    for number, block in enumerate(blocks):
        if number and not isinstance(blocks[number - 1], Table):  # rich ends a table by an empty line
            yield text()
        yield _fitted(block, width) if isinstance(block, Table) else text(block.text, "yellow" if block.warns else "")


def in_terminal(blocks: Sequence[Block]) -> str | None:
    """What a terminal shows, with its codes for colors; None if stdout is no terminal, or rich is not installed."""
    if importlib.util.find_spec("rich") is None or not sys.stdout.isatty():
        return None
    make = importlib.import_module("rich.console").Console
    terminal = make()
    if not terminal.is_terminal or terminal.is_dumb_terminal:
        return None
    console = make(
        file=io.StringIO(),
        force_terminal=True,
        color_system=terminal.color_system,
        width=terminal.width,
        no_color=terminal.no_color,
    )
    console.print(*renderables(blocks, terminal.width), sep="\n", highlight=False)
    return str(console.file.getvalue()).rstrip("\n")


def _fitted(table: Table, width: int) -> Any:
    """The table as wide as it likes, else with wrapped words, else with rows as columns, else one cell a line."""
    if _room(_natural(table), 3) <= width:
        return _drawn(table, _natural(table), 1, bar=_room([*_natural(table), BAR], 3) <= width)
    narrow = [min(wide, max(_word(table, column), SENTENCE)) for column, wide in enumerate(_narrow(table))]
    if _room(narrow, 1) <= width:
        return _drawn(table, _widened(narrow, _natural(table), width), 0)
    turned = _turned(table)
    if _room(_natural(turned), 3) <= width:
        return _drawn(turned, _natural(turned), 1)
    return _listed(table)


def _room(widths: Sequence[int], gap: int) -> int:
    """The width of a table with these columns."""
    return sum(widths) + gap * (len(widths) - 1) + 2


def _natural(table: Table) -> list[int]:
    """The width of each column without any wrapping."""
    return [max(map(len, cells)) for cells in zip(table.header, *table.rows, strict=True)]


def _narrow(table: Table) -> list[int]:
    """The width of each column with its title wrapped between words."""
    columns = zip(table.header, *table.rows, strict=True)
    return [max(map(len, (*name.split(), *cells)), default=0) for name, *cells in columns]


def _word(table: Table, column: int) -> int:
    """The longest word in a column and its title."""
    return max((len(word) for row in (table.header, *table.rows) for word in row[column].split()), default=0)


def _widened(narrow: list[int], natural: list[int], width: int) -> list[int]:
    """Narrow columns, with the room that is left given to those that want more, from the last to the first."""
    left = width - _room(narrow, 1)
    found = list(narrow)
    for column in reversed(range(len(found))):
        more = min(left, max(0, natural[column] - found[column]))
        found[column] += more
        left -= more
    return found


def _turned(table: Table) -> Table:
    """The same table with a column for each row."""
    first, *rest = zip(table.header, *table.rows, strict=True)
    return Table(table.title, first, rest, table.note)


def _listed(table: Table) -> Any:
    """Each cell on a line of its own, with the name of its column."""
    made = importlib.import_module("rich.text").Text(f"{table.title}\n", "bold")
    for row in table.rows:
        for number, (name, cell) in enumerate(zip(table.header, row, strict=True)):
            made.append(f"{'- ' if number == 0 else '  '}{name}: ", "not bold dim")
            made.append(f"{cell}\n", "not bold")
    if table.note:
        made.append(f"  {table.note}\n", "not bold dim")
    return made


def _drawn(table: Table, widths: Sequence[int], padding: int, *, bar: bool = False) -> Any:
    """A table of rich with columns of these widths."""
    box, text = importlib.import_module("rich.box"), importlib.import_module("rich.text").Text
    made = importlib.import_module("rich.table").Table(
        title=text(table.title, "bold"),
        title_justify="left",
        caption=text(table.note, "dim") if table.note else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, padding),
    )
    for column, (name, width) in enumerate(zip(table.header, widths, strict=True)):
        style = color(table.parts.index(name)) if name in table.parts else ""
        words = table.has_words(column)
        made.add_column(text(name, style), justify="left" if words else "right", overflow="fold", width=width)
    has_bar = bar and bool(table.parts)
    if has_bar:
        made.add_column("")
    for row in table.rows:
        made.add_row(*map(text, row), *([_bar(table.shares(row), text)] if has_bar else []))
    return made


def _bar(shares: Sequence[float], text: Any) -> Any:
    """A bar of `BAR` characters; each part has its share of them, to the nearest."""
    made, end, total = text(), 0, 0.0
    for index, share in enumerate(shares):
        total += share
        begin, end = end, round(BAR * total)
        made.append("█" * (end - begin), color(index))
    return made
