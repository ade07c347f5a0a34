"""Paragraphs and tables of a report, as all renderings get them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paragraph:
    """A sentence or a few. `warns`: it says what is wrong, and is shown so."""

    text: str
    warns: bool = False


@dataclass(frozen=True)
class Table:
    """A title, names of columns, rows of cells, and a note below them.

    `parts` are the names of columns whose numbers are parts of a whole in each row: renderings with colors add a bar.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    parts: Sequence[str] = ()

    def has_words(self, column: int) -> bool:
        """Whether a column holds anything but numbers: words go to the left, numbers to the right."""
        return any(not is_number(row[column]) for row in self.rows)

    def shares(self, row: Sequence[str]) -> list[float]:
        """The parts of a row as shares of their sum, from 0 to 1; empty if there are none."""
        numbers = [float(row[self.header.index(part)].replace(",", "")) for part in self.parts]
        total = sum(numbers)
        return [number / total for number in numbers] if total > 0 else []


Block = Paragraph | Table


def is_number(text: str) -> bool:
    """Whether a cell is empty or a number, such as `1,234.5` or `-3`."""
    return not text.strip("0123456789.,-")
