"""Holds Ctrl-C back while an update must not be left half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_held: list[None] = []  # not empty while a block of the main thread holds interrupts back


_nothing = contextlib.nullcontext()


def interrupts_wait() -> contextlib.AbstractContextManager[None]:
    """Defer SIGINT to the end of the block, where its usual handler runs (mostly a KeyboardInterrupt).

    Only the main thread receives signals, so on other threads this does nothing. It also does nothing where SIGINT is
    ignored or not handled in Python.
    """
    on_main = threading.current_thread() is threading.main_thread()
    holds = on_main and not _held and callable(signal.getsignal(signal.SIGINT))
    return _holding() if holds else _nothing


@contextlib.contextmanager
def _holding() -> Iterator[None]:
    came: list[tuple[int, Any]] = []
    before: Any = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    _held.append(None)
    try:
        yield
    finally:
        _held.clear()
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])
