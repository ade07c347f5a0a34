"""What the commands print: one line of JSON for scripts, or sentences that fit the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any


def print_json(result: Any) -> None:
    """Print a result as one line of JSON. Numbers that JSON lacks, infinity and NaN, become null."""
    print(json.dumps(_plain(result), allow_nan=False))


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """While JSON is wanted, send what the work prints to the error stream, so that the result stands alone."""
    if not wanted:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_sentence(text: str) -> None:
    """Print a long line: filled to the width of a terminal, whole in a pipe or a file."""
    if sys.stdout.isatty():
        text = textwrap.fill(text, shutil.get_terminal_size().columns, break_on_hyphens=False, break_long_words=False)
    print(text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
