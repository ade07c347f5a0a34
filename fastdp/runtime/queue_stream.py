"""`QueueStream`: a stream of a device with a queue, which the device's worker runs in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fastdp.runtime.base import Work
from fastdp.runtime.events import QueueEvent
from fastdp.tracing.protocols import Timestamp

if TYPE_CHECKING:
    from fastdp.runtime.queue import QueueDevice


class QueueStream:
    """An ordered queue of work for one device's worker.

    `inline`: an event of this stream is only a mark, and any worker may complete it. `timed_by_host`: see
    `fastdp.tracing.protocols.Stream`.
    """

    inline = True
    timed_by_host = True

    def __init__(self, device: QueueDevice, name: str) -> None:
        self.name = name
        self._device = device
        self._items: deque[Work | QueueEvent | tuple[QueueEvent]] = deque()
        self._error: BaseException | None = None
        self._watched: QueueEvent | None = None
        self._running = False

    def enqueue(self, work: Work) -> None:
        """Run `work()` on the worker after everything enqueued before it."""
        self._device.push(self, work)

    def issue(self, work: Callable[..., object], *given: Any) -> None:
        """As `enqueue` of `work(*given)`, which only makes calls of CUDA on this stream: it has no current stream of
        CuPy's."""
        self.enqueue(partial(work, *given))

    def issue_here(self, work: Callable[..., object], *given: Any) -> BaseException | None:
        """As `issue`, on the thread that has the device by `lent`. Returns the stream's failure, if it has failed."""
        device = self._device
        if device.serving or device.has_work:
            self.issue(work, *given)
            return self._error
        if self._error is not None:
            return self._error
        # What others enqueue meanwhile waits, as behind an item of the queue.
        device.serving = self._running = True
        try:
            work(*given)
        except BaseException as error:
            self._error = error
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
        finally:
            device.serving = self._running = False
        if device.left:
            device.serve()
        return self._error

    def record(self, again: QueueEvent | None = None) -> QueueEvent:
        """An event that is done when everything enqueued before it is.

        Args:
            again: an earlier result, for which nobody waits any more. GPUs may use it again.
        """
        event = self._event()
        self._device.push(self, event)
        return event

    def mark(self) -> QueueEvent:
        """An event that is done when the worker has come to it, wherever a GPU is; it carries the stream's failure."""
        event = QueueEvent()
        self._device.push(self, event)
        return event

    def wait(self, event: QueueEvent) -> None:
        """Hold back everything enqueued from now on until `event` is done."""
        self._device.push(self, (event,))

    @property
    def failure(self) -> BaseException | None:
        """The error of the work that has run so far, or of what it has waited for."""
        return self._error

    def recover(self) -> None:
        """Clear a failure."""
        self._error = None

    def position(self) -> str:
        """What the stream does or waits for at the time of the call, in words; empty where it is idle."""
        items = list(self._items)
        then = f", {len(items)} more items wait" if items else ""
        if self._running:
            return f"{self.name} is at work{then}"
        if not items:
            return ""
        what = "waits for another stream or device" if isinstance(items[0], tuple) else "is to be run"
        return f"{self.name} {what}{then}"

    # For traces: see `fastdp.tracing.protocols.Stream`.

    @property
    def lane(self) -> tuple[int, str, str]:
        """The index and the name of its device, and its own name."""
        return self._device.index, self._device.name, self.name

    def timestamp(self) -> Timestamp | None:
        """None: the worker's clock tells the time."""
        return None

    def read_timestamps(self, seconds: float) -> str:
        """There are none to wait for."""
        return "the clock of the worker"

    # Called from inside the work that the worker is running.

    def now(self) -> QueueEvent:
        """An event at this point of the work: issued on return, done when all work issued so far is."""
        event = self._event()
        self._mark(event)
        event.complete()
        return event

    def follow(self, event: QueueEvent, timeout: float | None = None) -> None:
        """Order the rest of the work after an event of another stream. Blocks until the event is issued.

        Does not raise the error the event may carry.

        Raises:
            DeviceTimeoutError: not issued within `timeout` seconds.
        """
        event.wait_issued(timeout)

    # Overridden by devices whose worker issues work to a GPU.

    def _event(self) -> QueueEvent:
        """A new event for this stream."""
        return QueueEvent()

    def _passed(self, event: QueueEvent) -> None:
        """Order the next items after this event, which is issued. Called with the device's lock held."""

    def _perform(self, work: Work) -> None:
        """Run one work item on the worker."""
        work()

    def _mark(self, event: QueueEvent) -> None:
        """Called when the worker has reached an event of this stream and is about to complete it."""

    # The queue.

    def _ready(self, on_worker: bool) -> bool:
        """Whether the head is an item for the worker to run now. Removes waits whose event is issued.

        Called with the device's lock held, while the worker runs nothing. A wait that holds the stream back registers
        the device to be woken: once, and only here. A worker, also one of another device, removes events too and
        completes them after it has released the lock. The host thread does not, because an interrupt could come
        between the two.
        """
        while self._items:
            head = self._items[0]
            if not isinstance(head, tuple):
                if not (on_worker and self.inline and isinstance(head, QueueEvent)):
                    return True
                self._items.popleft()
                self._device.settled.append((head, self._error))
                continue
            (event,) = head
            if not event.issued and (event is self._watched or event.notify(self._device.wake)):
                self._watched = event
                return False
            self._watched = None
            self._items.popleft()
            self._follow(event)
        return False

    def _follow(self, event: QueueEvent) -> None:
        """Go on after an event that is issued: the stream takes over its failure."""
        if self._error is None:
            self._error = event.error
        self._passed(event)

    def _run(self, item: Work | QueueEvent | tuple[QueueEvent]) -> None:
        """Run one item. The stream keeps a failure: later work is skipped, and later events carry it."""
        if isinstance(item, QueueEvent):
            try:
                self._mark(item)
            except BaseException as error:  # noqa: BLE001, as below
                self._error = self._error if self._error is not None else error
            item.complete(self._error)
        elif self._error is None:
            assert not isinstance(item, tuple)
            try:
                self._perform(item)
            # The worker passes every failure, including KeyboardInterrupt and SystemExit, to the host
            # thread that synchronizes. Swallowing it here would lose it; raising would kill the worker.
            except BaseException as error:  # noqa: BLE001
                self._error = error

    def _drop(self, error: BaseException) -> list[QueueEvent]:
        """Empty the queue; returns its events, which must carry `error` or an earlier one."""
        events = [item for item in self._items if isinstance(item, QueueEvent)]
        self._items.clear()
        self._error = self._error if self._error is not None else error
        return events
