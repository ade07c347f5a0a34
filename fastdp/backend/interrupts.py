"""Ctrl-C waits for what must not be left in the middle."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """A SIGINT that comes meanwhile is handled at the end, as it would have been: usually by a KeyboardInterrupt.

    Signals reach the main thread alone, so elsewhere nothing is to be done. Where the handler is not Python's to
    change, the signal goes its way.
    """
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(before):
        yield
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])
