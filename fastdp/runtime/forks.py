"""What devices do in a forked child: it has their memory, and none of their threads."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forked(Protocol):
    """Something with threads."""

    def after_fork(self) -> None:
        """Called in a forked child, which has one thread: the one that forked."""


_known: weakref.WeakSet[Forked] = weakref.WeakSet()


def watch(one: Forked) -> None:
    """Have `after_fork` called in children of this process, as long as the object lives."""
    _known.add(one)


class LongLock:
    """A re-entrant lock that threads hold for long. A forked child finds it free, unless its own thread has it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        watch(self)

    def acquire(self, *, blocking: bool = True, timeout: float = -1) -> bool:
        """As that of `threading.RLock`."""
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        """As that of `threading.RLock`."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def after_fork(self) -> None:
        """The thread that had it may be gone."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


def _in_child() -> None:
    for one in list(_known):
        one.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_in_child)
