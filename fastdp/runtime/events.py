"""Events of queues: points in a stream's work, and the threads that wait for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from fastdp.errors import DeviceTimeoutError


class QueueEvent:
    """A point in a stream's work; issued exactly once, with or without an error.

    An event is issued when the worker has reached it. If the worker also runs the work, the event is then done. If the
    worker only issues work to a GPU, the device uses its own event class, which tells the two apart.
    """

    __slots__ = ("_issued", "_lock", "_wakes", "error", "parts")

    def __init__(self) -> None:
        self._issued = False
        self._lock = threading.Lock()
        self._wakes: list[Callable[[], object]] = []
        self.error: BaseException | None = None
        # For joint events: GPU events that may still be pending after this event is issued.
        self.parts: tuple[QueueEvent, ...] = ()

    @property
    def issued(self) -> bool:
        """True once the worker has reached the event."""
        return self._issued

    @property
    def done(self) -> bool:
        """True once all work before the event has run, or was skipped."""
        return self._issued and all(part.done for part in self.parts)

    def leaves(self) -> tuple[QueueEvent, ...]:
        """The GPU events that this one combines."""
        return self.parts

    def complete(self, error: BaseException | None = None) -> None:
        """Mark the event issued and wake its waiters. Only the first call counts."""
        with self._lock:
            if self._issued:
                return
            self.error = error
            self._issued = True
            wakes, self._wakes = self._wakes, []
        for wake in wakes:
            wake()

    def notify(self, wake: Callable[[], object]) -> bool:
        """Have the thread that completes the event call `wake()`. Returns False, without a call, if already issued."""
        if self._issued:
            return False
        with self._lock:
            if not self._issued:
                self._wakes.append(wake)
            return not self._issued

    def synchronize(self, timeout: float | None = None) -> None:
        """Block until done, then raise the error the event carries, if any.

        Raises:
            DeviceTimeoutError: not done within `timeout` seconds.
        """
        self.finish(timeout)
        if self.error is not None:
            raise self.error

    def finish(self, timeout: float | None = None) -> None:
        """Block until done, without raising the error the event may carry."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.wait_issued(timeout)
        for part in self.parts:
            part.finish(None if deadline is None else deadline - time.monotonic())

    def wait_issued(self, timeout: float | None = None) -> None:
        """Block until the worker has reached the event."""
        if self._issued:
            return
        wait = getattr(here, "wait", None)
        if wait is not None:
            wait(self, timeout)
            return
        gate = threading.Lock()
        gate.acquire()
        if not self.notify(gate.release):
            return
        seconds = -1.0 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)
        if not gate.acquire(timeout=seconds) and not self._issued:
            raise DeviceTimeoutError(f"A device was not done with its work within timeout={timeout} seconds.")


def first_done(events: Sequence[QueueEvent], timeout: float) -> int | None:
    """Block until all events are done, or until one that carries an error is.

    Returns:
        The place of that one; None if none has an error.

    Raises:
        DeviceTimeoutError: not done within `timeout` seconds.
    """
    began = time.monotonic()
    waiting = list(enumerate(events))
    while True:
        left = []
        for place, event in waiting:
            if not event.done:
                left.append((place, event))
            elif event.error is not None:
                return place
        waiting = left
        if not waiting:
            return None
        waited = time.monotonic() - began
        if waited > timeout:
            raise DeviceTimeoutError(f"A device was not done with its work within timeout={timeout} seconds.")
        time.sleep(pause_after(waited))


def pause_after(waited: float) -> float:
    """Seconds until the next look at an event that is not done after so many.

    Short at first, since a step may take only microseconds; then a part of the time, so that the host is late by no
    more than that.
    """
    return min(max(2e-5, 0.05 * waited), 1e-3)


# Thread state: `pending`, the events that this thread is completing; `worker`, whether it is a worker; `wait`, how it
# waits for an event if it has work of its own meanwhile, `serving`, whether it does that, and `interrupts`, which
# come to it then (`host_worker`).
here = threading.local()


def complete_all(events: list[tuple[QueueEvent, BaseException | None]]) -> None:
    """Complete events in a loop, including those that become ready by it, so that a long chain does not recurse."""
    pending = getattr(here, "pending", None)
    if pending is not None:
        pending.extend(events)
        return
    here.pending = pending = deque(events)
    try:
        while pending:
            event, error = pending.popleft()
            event.complete(error)
    finally:
        here.pending = None


def joined(events: Sequence[QueueEvent]) -> QueueEvent:
    """An event that is issued and done when all of `events` are, and carries the first error in their order.

    N streams that wait for N others wait for one joint event: N + N links instead of N x N.
    """
    joint = QueueEvent()
    joint.parts = tuple([leaf for event in events for leaf in event.leaves()])
    left = [None] * (len(events) + 1)

    def arrive() -> None:
        left.pop()  # no lock needed: two threads may both find `left` empty, but only the first `complete` counts
        if not left:
            joint.complete(next((event.error for event in events if event.error is not None), None))

    for event in events:
        if not event.notify(arrive):
            arrive()
    arrive()
    return joint
