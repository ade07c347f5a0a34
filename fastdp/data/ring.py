"""A ring of batches: one thread takes the next items of an iterator, in order, while the caller works."""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

from fastdp.data.thread_settings import ThreadSettings
from fastdp.runtime import forks
from fastdp.runtime.watchdog import Watched
from fastdp.tracing.spans import span
from fastdp.warn import warn_user

T = TypeVar("T")
Outcome = tuple[Any, "BaseException | None"]

SLOW_SECONDS = 60.0  # a batch that takes longer is told of once
LOOK_SECONDS = 1.0  # between two looks at whether the thread is alive
# A thread costs about a millisecond a batch, by which it and the caller hold up each other (measured on two cores). So
# reading ahead pays where each of a few batches in a row has taken longer than that, clearly.
WORTH_SECONDS = 0.002
WORTH_BATCHES = 3
LEAVE_SECONDS = 5.0  # for the thread to end its present item before the caller goes on
NAME = "fastdp-ahead"


class Ring(Generic[T]):
    """Items of an iterator in their order, of which the next ones are taken in a thread before they are asked for.

    Args:
        items: the iterator. While the ring has a thread, nobody else may touch it.
        count: at most so many items wait, or are in the making, besides the caller's.
        name: where they come from, for messages: "the data set (a generator)".
        timeout: seconds that one item may take.
        scope: makes a context in which items are taken, in whichever thread.

    The thread begins when an item is ordered that nobody has asked for yet, and ends with the last such item. `take`
    says how far to read on, so the caller decides where an epoch ends: nothing is taken beyond it.
    """

    def __init__(
        self,
        items: Iterator[T],
        count: int,
        name: str,
        timeout: float,
        scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._items, self._count, self._scope = items, count, scope
        self._watch = Watched(f"The next batch of {name}", timeout)
        self._name, self._slow = name, False
        self._line: _Line | None = None
        self._ended = self._forked = False
        self.waited = 0.0  # seconds that the caller waited
        self.taken = 0
        self.read_ahead = 0  # how many of them the thread took
        self._made: deque[float] = deque(maxlen=WORTH_BATCHES)  # seconds that the latest items took without a thread
        forks.watch(self)

    def take(self, further: Callable[[], int]) -> T:
        """The next item. A thread takes the ones behind it from now on.

        Args:
            further: how many more items may be taken ahead; asked when this item is there.

        Raises:
            StopIteration: there is none.
            DeviceTimeoutError: it took longer than `timeout`; the message names the source and says where threads are.
            RuntimeError: the process is a forked child, which does not have the thread.

        What the iterator raises is raised here, with its own traceback, in place of the item.
        """
        if self._forked:
            raise RuntimeError(
                f"This process was forked while a thread read {self._name} ahead, and has no such thread. Begin to "
                "iterate in the child, or fork before."
            )
        began = time.perf_counter()
        if self._watch.ident != threading.get_ident():
            self._watch = Watched(self._watch.what, self._watch.seconds)
        try:
            with span("input"):
                item = self._next()
        finally:
            self.waited += time.perf_counter() - began
        self.taken += 1
        self._order(min(self._count, further()))
        return item

    def _next(self) -> T:
        line = self._line
        if line is None or not line.ordered:
            began = time.perf_counter()
            with self._scope(), self._watch:
                item = next(self._items)
            self._made.append(time.perf_counter() - began)
            return item
        item, error = self._wait(line)
        line.ordered -= 1
        self.read_ahead += 1
        if error is None:
            return item
        self.close()
        self._ended = True
        try:
            raise error
        finally:
            del error  # it holds this frame

    @property
    def worth(self) -> bool:
        """Whether items take so long that a thread for them pays, as far as is known by now."""
        return len(self._made) == WORTH_BATCHES and min(self._made) >= WORTH_SECONDS

    def _order(self, count: int) -> None:
        """Have the thread take items until so many wait."""
        line = self._line
        if count <= 0 or self._ended:
            if line is not None and not line.ordered:  # the end of an epoch: no thread waits for the next one
                self.close()
            return
        if line is None:
            line = self._line = _Line(self._items, ThreadSettings(self._scope).applied)
            weakref.finalize(self, line.stop)
        while line.ordered < count:
            line.ordered += 1
            line.orders.put(True)

    def _wait(self, line: _Line) -> Outcome:
        """The oldest item that was ordered."""
        with contextlib.suppress(queue.Empty):
            return line.ready.get_nowait()
        began = time.monotonic()
        with self._watch:
            while True:
                with contextlib.suppress(queue.Empty):
                    return line.ready.get(timeout=min(LOOK_SECONDS, SLOW_SECONDS))
                if not line.thread.is_alive() and line.ready.empty():
                    raise RuntimeError(f"The thread that reads {self._name} ahead is dead, and left no error.")
                waited = time.monotonic() - began
                if waited >= SLOW_SECONDS and not self._slow:
                    self._slow = True
                    warn_user(f"fastdp: the next batch of {self._name} has been made for {waited:,.0f} seconds by now.")

    def close(self) -> None:
        """End the thread: it ends its present item, and is waited for, for a few seconds. A `take` begins another."""
        line, self._line = self._line, None
        if line is not None:
            line.stop()
            line.thread.join(LEAVE_SECONDS)

    def leave(self) -> Iterator[T] | None:
        """End the thread; returns an iterator over the items that it took and nobody has got; None without any."""
        line = self._line
        self.close()
        self._ended = True
        return line.left(self._watch) if line is not None and line.ordered else None

    def after_fork(self) -> None:
        """A forked child has no such thread, and may have half of an item."""
        self._forked, self._line = self._line is not None, None


class _Line:
    """A thread, what is ordered from it, and what is ready. It knows nothing of the ring, which may be dropped."""

    def __init__(self, items: Iterator[Any], scope: Callable[[], AbstractContextManager[Any]]) -> None:
        # Queues written in C: a Ctrl-C in the middle of Python's own conditions would leave their lock taken.
        self.orders: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.ordered = 0  # of these the caller has not got so many yet
        self._stopped = False
        context = contextvars.copy_context()
        self.thread = threading.Thread(target=context.run, args=(self._run, items, scope), name=NAME, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Let the thread end after its present item."""
        self._stopped = True
        self.orders.put(False)

    def left(self, watch: Watched) -> Iterator[Any]:
        """What is ready, once the thread has ended."""
        with watch:
            while self.thread.is_alive():
                self.thread.join(LOOK_SECONDS)
        while not self.ready.empty():
            item, error = self.ready.get()
            if error is not None:
                if isinstance(error, StopIteration):
                    return
                raise error
            yield item

    def _run(self, items: Iterator[Any], scope: Callable[[], AbstractContextManager[Any]]) -> None:
        """The thread's main function."""
        try:
            with scope():
                while self.orders.get() and not self._stopped:
                    self.ready.put((next(items), None))
        # Any error is the caller's, in place of the item.
        except BaseException as error:  # noqa: BLE001
            self.ready.put((None, error))
