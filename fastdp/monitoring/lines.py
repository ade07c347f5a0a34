"""A progress bar where there is no terminal: a line now and then on stderr, one that changes in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

NOTEBOOK = 0.5  # seconds after which the line in a notebook changes


class Lines:
    """A line every `every` seconds, and one at the end. In a notebook they are the same line, on stdout."""

    def __init__(self, every: float) -> None:
        self._in_notebook = "ipykernel" in sys.modules
        self._every = NOTEBOOK if self._in_notebook else every
        self._longest = 0

    def begin(self, description: str, total: int | None) -> Lines:
        """Begin a loop of `total` steps, if that is known."""
        self._prefix = f"{description}: " if description else ""
        self._total = total
        self._began = self._said = time.perf_counter()
        return self

    def show(self, steps: int, words: Callable[[], str]) -> None:
        """A step has been done: say so if it is time."""
        now = time.perf_counter()
        if now - self._said >= self._every:
            self._said = now
            left = (now - self._began) / steps * (self._total - steps) if self._total is not None else None
            self._say(steps, words() + (f", {clock(left)} left" if left is not None and left > 0 else ""))

    def end(self, steps: int, words: Callable[[], str]) -> None:
        """The loop is over, for whatever reason."""
        self._say(steps, f"{words()}, {clock(time.perf_counter() - self._began)} in all", ends=True)

    def _say(self, steps: int, words: str, *, ends: bool = False) -> None:
        of = f"/{self._total}" if self._total is not None else ""
        line = f"{self._prefix}{steps}{of} steps, {words}"
        stream = sys.stdout if self._in_notebook else sys.stderr  # notebooks show stderr in red
        if self._in_notebook:
            self._longest = max(self._longest, len(line))
            line = f"\r{line.ljust(self._longest)}"
        stream.write(line if self._in_notebook and not ends else f"{line}\n")
        stream.flush()


def clock(seconds: float) -> str:
    """A time as `0:01:05`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
