"""Happens-before: vector clocks of streams and host threads, and Python's locks that carry them.

A clock says, for each actor (a stream, a graph's node, a host thread), up to which of its steps everything is known to
have happened. An access at step t of actor A lies before whatever has a clock with clock[A] >= t.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Hashable, Iterator

import pytest

Clock = dict[Hashable, int]


def join(clock: Clock, other: Clock) -> None:
    """Let `clock` know what `other` knows."""
    # A list, taken in one go: another thread may extend a lock's clock meanwhile.
    for actor, time in list(other.items()):
        if clock.get(actor, 0) < time:
            clock[actor] = time


def tick(clock: Clock, actor: Hashable) -> int:
    """The actor's next step."""
    clock[actor] = clock.get(actor, 0) + 1
    return clock[actor]


class HostClocks:
    """What each host thread knows. Locks, started and joined threads hand it on."""

    def __init__(self) -> None:
        # Not by Thread objects: a thread that is just starting takes locks before it has one.
        self._local = threading.local()
        self._last: weakref.WeakKeyDictionary[threading.Thread, Clock] = weakref.WeakKeyDictionary()

    def own(self) -> Clock:
        """This thread's clock."""
        if not hasattr(self._local, "clock"):
            self._local.clock = {}
        return self._local.clock

    def start(self, thread: threading.Thread) -> None:
        """Have a thread that is about to start know what this one knows, and leave behind what it knows at its end."""
        known, run = dict(self.own()), thread.run

        def run_knowing() -> None:
            join(self.own(), known)
            try:
                run()
            finally:
                self._last[thread] = self.own()

        thread.run = run_knowing

    def finished(self, thread: threading.Thread) -> None:
        """This thread has joined another one."""
        join(self.own(), self._last.get(thread, {}))

    @contextlib.contextmanager
    def carried_by_locks(self) -> Iterator[None]:
        """While it lasts, Python's new locks and threads carry clocks."""
        start, wait = threading.Thread.start, threading.Thread.join

        def start_thread(thread: threading.Thread) -> None:
            self.start(thread)
            start(thread)

        def join_thread(thread: threading.Thread, timeout: float | None = None) -> None:
            wait(thread, timeout)
            if not thread.is_alive():
                self.finished(thread)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "Lock", lambda: ClockedLock(self))
            patch.setattr(threading, "RLock", lambda: ClockedRLock(self))
            patch.setattr(threading.Thread, "start", start_thread)
            patch.setattr(threading.Thread, "join", join_thread)
            yield


_allocate_lock = threading.Lock


class ClockedLock:
    """A threading.Lock: who acquires it knows what those knew who released it."""

    def __init__(self, clocks: HostClocks) -> None:
        self._lock = _allocate_lock()
        self._clocks = clocks
        self._known: Clock = {}

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            join(self._clocks.own(), self._known)
        return taken

    def release(self) -> None:
        join(self._known, self._clocks.own())
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class ClockedRLock(threading._PyRLock):
    """A threading.RLock that does the same, inside a Condition too."""

    def __init__(self, clocks: HostClocks) -> None:
        super().__init__()
        self._clocks = clocks
        self._known: Clock = {}

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = super().acquire(blocking, timeout)
        if taken:
            join(self._clocks.own(), self._known)
        return taken

    __enter__ = acquire

    def release(self) -> None:
        join(self._known, self._clocks.own())
        super().release()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _release_save(self):
        join(self._known, self._clocks.own())
        return super()._release_save()

    def _acquire_restore(self, state) -> None:
        super()._acquire_restore(state)
        join(self._clocks.own(), self._known)
