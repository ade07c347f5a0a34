"""Progress bars in a terminal by the library rich; nested loops share one display."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

REFRESH = 0.2  # seconds between two pictures
WIDE = 90  # columns of a terminal from which on the bar is a long one

_lock = threading.Lock()


class _Display:
    """rich's display of all bars that are open now."""

    def __init__(self) -> None:
        self.open = 0
        self._shown: Any = None

    def add(self, description: str, total: int | None) -> tuple[Any, Any]:
        """Add a bar. Returns the display and the bar's number in it."""
        with _lock:
            if not self.open:
                self._shown = _made()
                self._shown.start()
            self.open += 1
            return self._shown, self._shown.add_task(description, total=total, words="")

    def remove(self, task: Any) -> None:
        """A bar is done. With the last one the display ends, and leaves its last picture; others leave it."""
        with _lock:
            self.open -= 1
            if self.open:
                self._shown.remove_task(task)
            else:
                shown, self._shown = self._shown, None
                shown.stop()


_display = _Display()


class RichBar:
    """One bar. Pictures are drawn by the thread of the loop: rich starts none."""

    def begin(self, description: str, total: int | None) -> RichBar:
        """Begin a loop of `total` steps, if that is known."""
        self._shown, self._task = _display.add(description, total)
        self._drawn = float("-inf")
        return self

    def show(self, steps: int, words: Callable[[], str]) -> None:
        """A step has been done: draw if it is time."""
        now = time.perf_counter()
        if now - self._drawn >= REFRESH:
            self._drawn = now
            self._shown.update(self._task, completed=steps, words=words(), refresh=True)

    def end(self, steps: int, words: Callable[[], str]) -> None:
        """The loop is over, for whatever reason."""
        try:
            self._shown.update(self._task, completed=steps, words=words(), refresh=True)
            self._shown.stop_task(self._task)
        finally:
            _display.remove(self._task)


def rich_bars() -> RichBar | None:
    """A bar, if stderr is a terminal that can show one and rich is installed."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        return None
    console = importlib.import_module("rich.console").Console(stderr=True)
    return None if console.is_dumb_terminal or console.is_jupyter else RichBar()


def _made() -> Any:
    """rich's display, without a thread of its own."""
    rich, column = importlib.import_module("rich.progress"), importlib.import_module("rich.table").Column
    console = importlib.import_module("rich.console").Console(stderr=True)
    rest = column(no_wrap=True, overflow="ellipsis", ratio=1)  # what does not fit is cut off at its end
    return rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=20 if console.width >= WIDE else 8),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        rich.TextColumn("{task.fields[words]}", table_column=rest, markup=False),
        console=console,
        auto_refresh=False,
        expand=True,
    )
