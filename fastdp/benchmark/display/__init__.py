"""Shows a benchmark while it runs and prints its result: live in a terminal, in plain lines elsewhere."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TextIO

from fastdp.benchmark.display.comparison import comparison_blocks
from fastdp.benchmark.display.lines import Lines
from fastdp.benchmark.display.output import console_of, write_blocks
from fastdp.benchmark.display.result import result_blocks
from fastdp.rendering.blocks import Block

__all__ = ["Display", "comparison_blocks", "open_display", "result_blocks", "write"]


_NOTEBOOK = "JPY_PARENT_PID"  # Jupyter sets it for kernels and what they start


class Display(AbstractContextManager[Any], Protocol):
    """Shows the events of a benchmark (`fastdp.benchmark.run`), each as it happens."""

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event.

        Raises:
            ValueError: an event of no known kind.
        """


def open_display(
    stream: TextIO | None = None, *, width: int | None = None, environ: Mapping[str, str] = os.environ
) -> Display:
    """The display that suits a stream: a context manager that is called with each event of a benchmark.

    A terminal gets a live picture. A pipe, a file, a notebook, a terminal with `TERM=dumb`, any stream under
    `NO_COLOR`, and a terminal without the library rich get one plain line for each event. All end with the same tables.

    Args:
        stream: where to write; standard output by default. It stays open.
        width: columns; None for those of the terminal, of `COLUMNS`, or 80.
        environ: where `NO_COLOR`, `TERM` and `COLUMNS` are looked up.

    Example:
        with open_display() as display:
            result = run(settings, display)
    """
    stream = sys.stdout if stream is None else stream
    console = console_of(stream, environ, width)
    if console is None:
        return Lines(stream, None)
    # FORCE_COLOR makes a terminal of any stream for rich, and a notebook's `!command` runs on one that cannot go back.
    terminal = stream.isatty() and console.is_terminal and _NOTEBOOK not in environ
    if terminal and not (console.is_dumb_terminal or console.no_color):
        live: Display = importlib.import_module("fastdp.benchmark.display.live").LiveDisplay(stream, console)
        return live
    return Lines(stream, console)


def write(blocks: Sequence[Block], stream: TextIO | None = None, *, width: int | None = None) -> None:
    """Write paragraphs and tables so that they fit the stream's width.

    Args:
        stream: where to; standard output by default. It stays open.
        width: columns; None for those of the terminal, of `COLUMNS`, or 80.
    """
    stream = sys.stdout if stream is None else stream
    write_blocks(blocks, stream, console_of(stream, os.environ, width))
