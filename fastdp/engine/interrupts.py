"""Holds Ctrl-C back while an update must not be left half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Defer SIGINT to the end of the block, where its usual handler runs (mostly a KeyboardInterrupt).

    Only the main thread receives signals, so on other threads this does nothing. It also does nothing where SIGINT is
    ignored or not handled in Python.
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
