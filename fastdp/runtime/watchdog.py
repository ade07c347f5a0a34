"""A watchdog over waits that fastdp does not make itself, such as for a data set: it says where all threads are."""

from __future__ import annotations

import contextlib
import ctypes
import math
import queue
import signal
import sys
import threading
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime import forks
from fastdp.runtime.positions import report

T = TypeVar("T")
# Sent to the thread that waits, so that it leaves a call of the system. Nothing else in Python uses it, and programs
# that know nothing of it ignore it.
_SIGNAL = getattr(signal, "SIGURG", None)
_GRACE = 5.0  # seconds for a thread to leave its wait, before its stack is written to the error stream
NAME = "fastdp-watchdog"


class _Late(BaseException):
    """Raised in a thread whose wait has taken too long. No code that waits for data catches it."""


class Watchdog:
    """One thread for all waits of the process. It sleeps until the earliest deadline, so a wait costs it nothing."""

    def __init__(self) -> None:
        # A queue written in C: a Ctrl-C in the middle of Python's own conditions would leave their lock taken for good.
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._watches: set[Watched] = set()
        self._thread: threading.Thread | None = None
        self._wakes = math.inf
        forks.watch(self)

    def add(self, watch: Watched) -> None:
        """Begin to watch. The thread is woken only where it would be late."""
        self._watches.add(watch)  # before the look at `_wakes`: the thread changes that before it looks at the waits
        if self._thread is None:  # two threads at once may begin two: each is enough, and neither is in the other's way
            thread = threading.Thread(target=self._run, name=NAME, daemon=True)
            thread.start()
            self._thread = thread
        if watch.deadline < self._wakes:
            self._woken.put(None)

    def remove(self, watch: Watched) -> None:
        """The wait is over."""
        self._watches.discard(watch)

    def calls_main(self) -> bool:
        """Whether a wait of the main thread is to be given up."""
        return any(watch.in_main and watch.found is not None for watch in list(self._watches))

    def after_fork(self) -> None:
        """A forked child has neither the thread nor the waits."""
        self._woken, self._watches, self._thread = queue.SimpleQueue(), set(), None

    def _run(self) -> None:
        """The thread's main function."""
        while True:
            self._wakes, now = math.inf, time.monotonic()
            for watch in list(self._watches):
                if watch.deadline <= now:
                    self._too_late(watch)
            self._wakes = min((watch.deadline for watch in list(self._watches)), default=math.inf)
            left = self._wakes - time.monotonic()
            with contextlib.suppress(queue.Empty):
                self._woken.get(timeout=None if left == math.inf else min(max(0.0, left), threading.TIMEOUT_MAX))

    def _too_late(self, watch: Watched) -> None:
        """Wake the thread that waits; if it does not leave its wait, say where it is."""
        if watch.found is None:
            watch.found = report()
            watch.deadline = time.monotonic() + _GRACE
            if watch.in_main and _SIGNAL is not None:
                signal.pthread_kill(watch.ident, _SIGNAL)
            else:  # raised when the thread's wait ends
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(watch.ident), ctypes.py_object(_Late))
            return
        self._watches.discard(watch)
        if sys.stderr is not None:
            sys.stderr.write(f"fastdp: {watch.what} does not end, and cannot be interrupted.{watch.found}\n")


_watchdog = Watchdog()


class Watched(contextlib.AbstractContextManager[None]):
    """Gives up what the block does when it takes longer than so many seconds.

    A wait of the main thread is interrupted, as by Ctrl-C. On other threads the error comes when the wait ends; a
    report on the error stream comes first.

    Args:
        what: the wait, in words, for messages.
        seconds: that it may take.

    Raises:
        DeviceTimeoutError: it took too long. The message has the Python stack of every thread.

    Attributes:
        found: where all threads were when the time was over; None before.
    """

    def __init__(self, what: str, seconds: float) -> None:
        self.what, self.seconds = what, seconds
        self.ident = threading.get_ident()
        self.in_main = self.ident == threading.main_thread().ident
        self.deadline = math.inf
        self.found: str | None = None

    def __enter__(self) -> None:
        if self.in_main:
            _leaving.install()
        self.found = None
        self.deadline = time.monotonic() + self.seconds
        _watchdog.add(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            _watchdog.remove(self)
        except _Late:  # it came when the block was over
            _watchdog.remove(self)
        if isinstance(error, _Late):
            raise DeviceTimeoutError(
                f"{self.what} took longer than timeout={self.seconds} seconds.{self.found}"
            ) from None


class _Leaving:
    """The handler of the signal that wakes the main thread. It is set once, and passes other signals on."""

    def __init__(self) -> None:
        self._installed = False
        self._before: Any = None

    def install(self) -> None:
        """Set the handler, on the main thread."""
        if not self._installed and _SIGNAL is not None:
            self._installed = True
            self._before = signal.signal(_SIGNAL, self._came)

    def _came(self, number: int, frame: types.FrameType | None) -> None:
        if _watchdog.calls_main():
            # As `__exit__` begins the block is over, and nobody would catch the error.
            if frame is None or frame.f_code is not Watched.__exit__.__code__:
                raise _Late
            return
        if callable(self._before):
            self._before(number, frame)


_leaving = _Leaving()


def watch_data(batches: Iterable[T], timeout: float = 1800.0) -> Iterator[T]:
    """The same batches; one that does not come in time is an error that says where every thread is.

    For loops of your own. `fit` of a parallel model watches its data set by itself, with the model's `timeout`.

    Args:
        batches: anything that can be iterated over, such as a DataLoader.
        timeout: seconds that one batch may take.

    Raises:
        ValueError: a `timeout` that is not above 0.
        DeviceTimeoutError: a batch took longer. On threads other than the main one it comes when the wait ends, and a
            report on the error stream comes first.

    Example:
        >>> from fastdp.data import watch_data
        >>> [sum(batch) for batch in watch_data([[1, 2], [3]], timeout=60)]
        [3, 3]
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"`timeout` must be a number of seconds above 0. Received: timeout={timeout!r}")
    return _watched(iter(batches), timeout)


def _watched(batches: Iterator[T], timeout: float) -> Iterator[T]:
    end, watch = object(), Watched("The next batch of the data set", timeout)
    while True:
        with watch:
            batch: Any = next(batches, end)
        if batch is end:
            return
        yield batch
