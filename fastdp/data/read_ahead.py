"""Reads the next batches in a thread while the caller works on the present one."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from typing import Generic, TypeVar

from fastdp.runtime import forks
from fastdp.tracing.spans import span
from fastdp.warn import warn_user

T = TypeVar("T")

AHEAD = 2
SLOW_SECONDS = 60.0  # a batch that takes longer is told of once
MOST_SECONDS = 1800.0  # and after this it is an error


class ReadAhead(Generic[T]):
    """Batches by number, of which the next ones are read before they are asked for.

    Args:
        read: reads a batch; called in one thread, in the order of the numbers.
        count: how many batches are read ahead; 0 reads each when it is asked for, in the caller's thread.
        name: what is read, for messages.

    At most `count` batches wait, so memory is that of `count` batches, and those that the caller holds.
    """

    def __init__(self, read: Callable[[int], T], count: int, name: str) -> None:
        self._read, self.count, self._name = read, count, name
        self._waiting: dict[int, Future[T]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._slow = False
        self.waited = 0.0  # seconds that callers waited for batches
        self.taken = self.read_ahead = 0
        forks.watch(self)

    def take(self, number: int, last: int) -> T:
        """A batch; the next ones up to the one before `last` are read from now on.

        Raises:
            TimeoutError: it was not read in half an hour; the message names what is read.
        """
        began = time.perf_counter()
        try:
            with span("input"):
                if not self.count:
                    return self._read(number)
                with self._lock:
                    found = self._waiting.pop(number, None)
                    self.read_ahead += found is not None
                    if found is None:  # the caller jumps
                        self._drop()
                        found = self._begin(number)
                    for following in range(number + 1, min(number + 1 + self.count, last)):
                        if following not in self._waiting:
                            self._waiting[following] = self._begin(following)
                return self._result(found, number)
        finally:
            if number + 1 >= last:  # the end of an epoch: the thread need not wait for another
                self.close(wait=False)
            self.waited += time.perf_counter() - began
            self.taken += 1

    def forget(self) -> None:
        """Drop what was read ahead: the order is another one now."""
        with self._lock:
            self._drop()

    def close(self, *, wait: bool = True) -> None:
        """Drop what was read ahead, and end the thread. A later `take` begins anew."""
        with self._lock:
            self._drop()
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=wait)

    def after_fork(self) -> None:
        """A forked child has no such thread: begin anew."""
        self._lock = threading.Lock()
        self._waiting, self._pool = {}, None

    def _begin(self, number: int) -> Future[T]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "fastdp-ahead")
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        return self._pool.submit(self._read, number)

    def _drop(self) -> None:
        for future in self._waiting.values():
            future.cancel()
        self._waiting.clear()

    def _result(self, found: Future[T], number: int) -> T:
        began = time.monotonic()
        while True:
            try:
                return found.result(SLOW_SECONDS)
            except NotYetError:
                if found.done():  # reading itself raised a TimeoutError
                    raise
                waited = time.monotonic() - began
                if waited >= MOST_SECONDS:
                    raise TimeoutError(
                        f"Batch {number} of {self._name} was not read in {waited:,.0f} seconds: see whether its disk "
                        "or network answers."
                    ) from None
                if not self._slow:
                    self._slow = True
                    warn_user(f"fastdp: batch {number} of {self._name} has been read for {waited:,.0f} seconds by now.")
