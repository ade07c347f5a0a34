"""A progress bar where there is no terminal: a line now and then, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Lines:
    """A line every `every` seconds, and one at the end."""

    def __init__(self, every: float) -> None:
        self._every = every

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
        self._say(steps, f"{words()}, {clock(time.perf_counter() - self._began)} in all")

    def _say(self, steps: int, words: str) -> None:
        of = f"/{self._total}" if self._total is not None else ""
        sys.stderr.write(f"{self._prefix}{steps}{of} steps, {words}\n")
        sys.stderr.flush()


def clock(seconds: float) -> str:
    """A time as `0:01:05`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
