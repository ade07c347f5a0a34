"""Rows of numbers in a CSV file that is whole after each row, and goes on where another run has ended."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CsvLog:
    """Appends rows to a CSV file with a line of names. Nothing stays open between two rows.

    Args:
        path: the file. Its folder is made if need be.
        append: keep the rows that are there already.

    A column that comes later is added to the file: earlier rows have no value there. A last line that a killed run has
    left unfinished is dropped.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool) -> None:
        self._path = Path(path)
        self._append = append
        self._columns: list[str] = []

    def begin(self) -> int:
        """Begin, or go on after another `fit`. Returns the step of the last row, 0 without one.

        Raises:
            ValueError: the file to append to has no steps, so it is another one's. It stays as it is.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._append:
            self._path.write_bytes(b"")
            self._append = True
            return 0
        rows, whole = self._rows()
        if self._columns and "step" not in self._columns:
            raise self._not_ours(f"the columns {self._columns}")
        if not whole:
            self._write_all(rows)
        try:
            return max((int(float(row["step"])) for row in rows if row["step"]), default=0)
        except (ValueError, OverflowError) as error:
            raise self._not_ours(f"steps that are no numbers ({error})") from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        new = [name for name in row if name not in self._columns]
        if new:
            rows = self._rows()[0] if self._columns else []
            self._columns += new
            self._write_all(rows)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)

    def close(self) -> None:
        """Nothing is open."""

    def _rows(self) -> tuple[list[dict[str, str]], bool]:
        """The rows of the file, which has their columns, without an unfinished last one; and whether there was none."""
        if not self._path.exists():
            return [], True
        try:
            text = self._path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise self._not_ours(f"bytes that are no UTF-8 text ({error.reason})") from error
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        rows = [{name: value or "" for name, value in row.items() if name} for row in reader]
        self._columns = list(reader.fieldnames or [])
        return rows, whole == text

    def _not_ours(self, has: str) -> ValueError:
        """The error for a file that no Monitor has written."""
        return ValueError(
            f"Monitor(append=True) goes on in a file that a Monitor has written. Received: {self._path} with {has}. "
            "Choose another file, or append=False to overwrite it."
        )

    def _write_all(self, rows: list[dict[str, str]]) -> None:
        """Write the file anew with all columns, and put it in place of the old one at once."""
        new = self._path.with_name(f"{self._path.name}.new")
        with new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        new.replace(self._path)
