"""Holds Ctrl-C back while an update must not be left half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """A SIGINT that comes meanwhile is handled at the end, as it would have been: usually by a KeyboardInterrupt.

    Signals reach the main thread alone, so elsewhere nothing is to be done. Where SIGINT is ignored, or handled by
    something else than Python, it goes its way.
    """
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    came: list[tuple[int, Any]] = []
    before: Any = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])
