"""Holds Ctrl-C back while an update must not be left half done."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from fastdp.runtime.events import here

# `signal` looks each handler up among its enums, which takes longer than the calls of `_signal` behind it.
_SIGINT = int(signal.SIGINT)
_held: list[_Holding] = []  # not empty while a block of the main thread holds interrupts back
_nothing = contextlib.nullcontext()


def interrupts_wait() -> contextlib.AbstractContextManager[None]:
    """Defer SIGINT to the end of the block, where its usual handler runs (mostly a KeyboardInterrupt).

    Only the main thread receives signals, so on other threads this does nothing. It also does nothing where SIGINT is
    ignored or not handled in Python.
    """
    serving = getattr(here, "interrupts", None)
    if serving is not None:
        held: contextlib.AbstractContextManager[None] = serving.hold()
        return held
    if _held:  # by the main thread, for this block too, or another thread has nothing to hold back
        return _nothing
    on_main = threading.current_thread() is threading.main_thread()
    return _Holding() if on_main and callable(_signal.getsignal(_SIGINT)) else _nothing


class _Holding(contextlib.AbstractContextManager[None]):
    """Keeps signals until its end. It may be paused."""

    def __init__(self) -> None:
        self._came: list[tuple[int, Any]] = []
        self._before: Any = None

    def __enter__(self) -> None:
        self._before = _signal.signal(_SIGINT, lambda number, frame: self._came.append((number, frame)))
        _held.append(self)

    def __exit__(self, *error: object) -> None:
        if self not in _held:  # an interrupt has ended a pause
            return
        _held.clear()
        _signal.signal(_SIGINT, self._before)
        came, self._came = self._came, []
        if came:
            self._before(*came[0])


@contextlib.contextmanager
def interrupts_come() -> Iterator[None]:
    """Let interrupts come in the middle of a block of `interrupts_wait`: those that came before, and later ones."""
    holding = _held[0] if _held and threading.current_thread() is threading.main_thread() else None
    if holding is None:
        yield
        return
    holding.__exit__()
    yield
    holding.__enter__()
