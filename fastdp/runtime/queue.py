"""Queues of work, one worker thread per device, with the ordering rules of CUDA streams.

The worker picks any stream of its device whose next item may run. An item that waits for an event that is not
issued holds back its own stream only. Host devices (runtime/host/device.py) run the work itself on the worker, so a
missing `wait` between two streams is a real race, and `QueueDevice.delay` lets a test widen it. CUDA devices (cuda/)
issue work to the GPU on the worker, and the GPU orders their events.

Waking threads dominates the cost of a step of small work, so a thread is woken only if it can make progress. A wait
registers with its event only once it is the head of its stream and the worker is about to look for other work. A
worker sleeps on a plain lock, which is released only when a head becomes ready. Waits and records alone wake no thread:
while a worker sleeps, the worker of another device that completes an event processes them. A thread that would only
wait for a device may act as its worker meanwhile (`QueueDevice.lend`), so that no thread is woken at all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.base import DeviceMemory, Work
from fastdp.runtime.events import QueueEvent, complete_all, here, joined

__all__ = ["QueueDevice", "QueueEvent", "QueueStream", "joined"]


class QueueStream:
    """An ordered queue of work for one device's worker.

    `inline`: an event of this stream is only a mark, and any worker may complete it.
    """

    inline = True

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

    def record(self) -> QueueEvent:
        """An event that is done when everything enqueued before it is."""
        event = self._event()
        self._device.push(self, event)
        return event

    def wait(self, event: QueueEvent) -> None:
        """Hold back everything enqueued from now on until `event` is done."""
        self._device.push(self, (event,))

    def recover(self) -> None:
        """Clear a failure."""
        self._error = None

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
            if self._error is None:
                self._error = event.error
            self._passed(event)
        return False

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


class QueueDevice(DeviceMemory):
    """A worker thread and four streams. Subclasses define the device's memory.

    Args:
        index: ordinal among the devices of its kind.
        name: shown in messages and in the worker thread's name.
        stream: makes a stream of this device from its name.

    The worker starts with the first work and ends with `close()`. `delay` is for tests: the worker calls it
    before each item it runs. `unsettled` and `settle` are for the engine: the caller of earlier work left before that
    work was done, so the streams may still hold the work or its failure; `settle()(timeout)` rolls it back,
    if that caller still exists.
    """

    def __init__(self, index: int, name: str, stream: Callable[[QueueDevice, str], QueueStream] = QueueStream) -> None:
        self.index = index
        self.name = name
        self.delay: Callable[[], None] | None = None
        self.unsettled = False
        self.settle: Callable[[], Callable[[float], None] | None] = lambda: None
        self._lock = threading.Lock()
        self._gate = threading.Lock()
        self._gate.acquire()
        self._asleep = False
        # Events that a worker has removed from streams and is about to complete.
        self.settled: list[tuple[QueueEvent, BaseException | None]] = []
        self._thread: threading.Thread | None = None
        self._borrower: int | None = None
        self._serving = False
        self._closed = False
        self.compute = stream(self, "compute")
        self.copy_in = stream(self, "copy_in")
        self.copy_out = stream(self, "copy_out")
        self.communication = stream(self, "communication")
        self._streams = (self.communication, self.copy_out, self.copy_in, self.compute)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def closed(self) -> bool:
        """Whether the device was closed: it takes no more work."""
        return self._closed

    @property
    def idle(self) -> bool:
        """Whether the worker sleeps at the time of the call."""
        return self._asleep

    def _worker_scope(self) -> AbstractContextManager[object]:
        """The context in which the worker runs for its whole life."""
        return nullcontext()

    def push(self, stream: QueueStream, item: Work | QueueEvent | tuple[QueueEvent]) -> None:
        """Append an item to one of the streams. Starts the worker if needed, and wakes it if the item can run.

        Raises:
            RuntimeError: the device is closed.
        """
        with self._lock:
            if self._closed:
                raise self._closed_error()
            if stream.inline and isinstance(item, QueueEvent) and not stream._items and not stream._running:
                item.complete(stream._error)  # no other thread knows the event yet
                return
            stream._items.append(item)
            borrowed = self._borrower is not None
            if borrowed:
                pass
            elif self._thread is None:
                self._start()
            # Behind another item no wake-up is needed: that item runs soon, or its event wakes the worker.
            elif self._asleep and len(stream._items) == 1 and stream._ready(False):
                self._rouse()
        if borrowed and self._borrower == threading.get_ident() and not self._serving:
            self._serve()

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Make the calling thread the worker: work that it enqueues runs on it, at once if nothing holds it back.

        Does nothing while the worker has work or a test delays it. Thread settings that the work changes persist in
        the calling thread, and a step that runs this way cannot be stopped by a time-out.
        """
        with self._lock:
            idle = self._asleep or self._thread is None
            mine = idle and self._borrower is None and self.delay is None and not any(s._items for s in self._streams)
            if mine and not self._closed:
                self._borrower, self._asleep = threading.get_ident(), False
        if not mine:
            yield
            return
        was_worker, here.worker = getattr(here, "worker", False), True
        try:
            yield
        finally:
            here.worker = was_worker
            with self._lock:
                self._borrower = None
                for stream in self._streams:
                    stream._running = False
                self._asleep = self._thread is not None
                if any(stream._items for stream in self._streams):  # they wait for other devices, or an interrupt came
                    if self._thread is None:
                        self._start()
                    self._rouse()

    def wake(self) -> None:
        """Check the streams again after an event was issued; wake the worker if it has work."""
        with self._lock:
            if not self._asleep:
                return
            if not getattr(here, "worker", False):
                self._rouse()
                return
            for stream in self._streams:
                if stream._items and stream._ready(True):
                    self._rouse()
            settled, self.settled = self.settled, []
        if settled:
            complete_all(settled)

    def synchronize(self, timeout: float | None = None) -> None:
        """Block until all streams are idle. Errors stay with their streams' events.

        Raises:
            DeviceTimeoutError: not idle within `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for event in [stream.record() for stream in self._streams]:
            try:
                event.finish(None if deadline is None else deadline - time.monotonic())
            except DeviceTimeoutError:
                raise DeviceTimeoutError(f"{self.name} was not idle within timeout={timeout} seconds.") from None

    def recover(self) -> None:
        """Clear failures on all streams."""
        for stream in self._streams:
            stream.recover()
        self.unsettled, self.settle = False, lambda: None

    def close(self, timeout: float = 60.0) -> None:
        """Let the worker finish all work that can still run, then stop it. Idempotent.

        The remaining items wait for events that may never complete. They are dropped, and their events carry a
        RuntimeError, so that no thread waits for them forever.

        Raises:
            DeviceTimeoutError: the worker was still busy after `timeout` seconds.
        """
        with self._lock:
            self._closed = True
            self._rouse()
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)
        if thread.is_alive():
            raise DeviceTimeoutError(f"The worker of {self.name} was still busy after timeout={timeout} seconds.")

    def _closed_error(self) -> RuntimeError:
        return RuntimeError(
            f"Device {self.name} is closed (set_virtual_devices was called again, or the "
            "interpreter is ending). Wrap the model again to use the new devices."
        )

    def _start(self) -> None:
        """Start the worker. Called with the lock held."""
        self._thread = threading.Thread(target=self._work, name=f"fastdp-{self.name}", daemon=True)
        self._thread.start()

    def _rouse(self) -> None:
        """Wake the worker if it sleeps. Called with the lock held."""
        if self._asleep:
            self._asleep = False
            self._gate.release()

    def _next(self) -> tuple[QueueStream, Work | QueueEvent | tuple[QueueEvent]] | None:
        """Remove a head that may run; returns its stream and the head. Called with the lock held."""
        for stream in self._streams:
            if stream._items and stream._ready(True):
                stream._running = True
                return stream, stream._items.popleft()
        return None

    def _work(self) -> None:
        """The worker thread's main function."""
        here.worker = True
        with self._worker_scope():
            self._loop()

    def _serve(self) -> None:
        """Run all items that may run, on the borrowing thread. KeyboardInterrupt and SystemExit are raised at once."""
        self._serving = True
        stream: QueueStream | None = None
        try:
            while True:
                with self._lock:
                    if stream is not None:
                        stream._running = False
                    found = self._next()
                    settled, self.settled = self.settled, []
                if settled:
                    complete_all(settled)
                if found is not None:
                    stream, item = found
                    stream._run(item)
                    del found, item
                    if isinstance(stream._error, (KeyboardInterrupt, SystemExit)):
                        raise stream._error
                elif not settled:
                    return
        finally:
            self._serving = False

    def _loop(self) -> None:
        """Run items that may run; sleep when there are none."""
        stream: QueueStream | None = None
        sleeps = False
        while True:
            with self._lock:
                if stream is not None:
                    stream._running = False
                found = self._next()
                settled, self.settled = self.settled, []
                if found is None:
                    if self._closed and not settled:
                        break
                    # Completing `settled` below may make an item of this device ready, which then opens the gate.
                    sleeps = self._asleep = not self._closed
            if settled:
                complete_all(settled)
            if found is None:
                stream = None
                if sleeps:
                    self._gate.acquire()
                continue
            if self.delay is not None:
                self.delay()
            stream, item = found
            stream._run(item)
            del found, item  # frees the objects that the work references before the worker sleeps
        error = self._closed_error()
        for stream in self._streams:
            for event in stream._drop(error):
                event.complete(stream._error)
