"""What the commands' arguments share: help with examples, numbers within limits, and no abbreviated options."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastdp.cli.status import PIPE_CLOSED, WrongUseError, drop_stdout

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# "  0    it worked": a name, and what it means in a column of its own.
_ENTRY = re.compile(r" +\S+  +(?=\S)")


class Parser(argparse.ArgumentParser):
    """An argument parser whose help may go to a pipe that is closed, and whose options are written out in scripts."""

    def __init__(self, **options: object) -> None:
        options = {"formatter_class": HelpFormatter, "allow_abbrev": False, **options}
        super().__init__(**options)  # type: ignore[arg-type]

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help. A closed pipe is no error here, as in Python 3.11's own method: `exit` finds it."""
        with contextlib.suppress(BrokenPipeError):
            super().print_help(file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Print what was found wrong, if anything, and end the process."""
        try:
            super().exit(self._after(status), message)
        except UnicodeEncodeError:  # an argument that is no text, on a stream that escapes nothing
            super().exit(status, ascii(message) + "\n")

    def _after(self, status: int) -> int:
        """The status once all is written."""
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            drop_stdout()
            return PIPE_CLOSED
        return status


class HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs, and leaves the lines of an indented one, such as an example, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(self._fill(part, width, indent) for part in textwrap.dedent(text).strip().split("\n\n"))

    def _fill(self, paragraph: str, width: int, indent: str) -> str:
        lines, prose = [], []
        for line in paragraph.split("\n"):
            if not line.startswith(" "):
                prose.append(line)
                continue
            entry = _ENTRY.match(line)
            column = entry.end() if entry else 0
            lines.append(
                textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent + " " * column)
                if column
                else indent + line
            )
        filled = textwrap.fill(" ".join(prose), width, initial_indent=indent, subsequent_indent=indent)
        return "\n".join([*([filled] if prose else []), *lines])


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """An argument type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {shown(text)}")
        return value

    return parse


def positive(what: str, *, zero: bool = False, most: float = math.inf) -> Callable[[str], float]:
    """An argument type: a finite number above 0 (or from 0 on) up to `most`, such as 25.6e6; `what` is its unit."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value <= most and (value > 0 or (zero and value == 0))):
            limits = ("of 0 or more" if zero else "above 0") + (f" and up to {most:g}" if math.isfinite(most) else "")
            raise argparse.ArgumentTypeError(f"must be a number of {what} {limits}, got {shown(text)}")
        return value

    return parse


def number(what: str, least: float, most: float) -> Callable[[str], float]:
    """An argument type: a number from `least` to `most`; `what` is its unit."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"must be a number of {what} from {least:g} to {most:g}, got {shown(text)}"
            )
        return value

    return parse


def counts(most: int) -> Callable[[str], list[int]]:
    """An argument type: whole numbers from 1 to `most` such as 1,2,4, sorted, each once."""

    def parse(text: str) -> list[int]:
        try:
            return sorted({whole_number(1, most)(part) for part in text.split(",")})
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"must be whole numbers from 1 to {most}, such as 1,2,4, got {shown(text)}"
            ) from None

    return parse


def check_folder(argument: str, folder: Path) -> None:
    """Try the folder of what a command writes, before libraries are loaded and anything is computed. Leaves nothing.

    Raises:
        WrongUseError: it cannot be made, or not be written to.
    """
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for one in new:
            one.rmdir()
    except OSError as error:
        raise WrongUseError(
            f"argument {argument}: must be a folder that can be written to, or a path where one can be made. "
            f"Received: {str(folder)!r} ({error.strerror})"
        ) from error


def shown(text: str) -> str:
    """An argument as it stands in a message: cut where it is long."""
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON, and nothing else")
