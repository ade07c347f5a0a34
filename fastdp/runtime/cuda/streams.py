"""Streams and events of a GPU, on which a worker issues work in the order of its queue.

An event is *issued* when the worker has recorded it, and *done* when the GPU has reached it. A stream's
`wait` holds back its queue until the event is issued, and then makes the GPU wait for it. A host thread
waits for a GPU only in `finish`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from threading import get_ident
from typing import Any

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.base import Work
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.events import pause_after
from fastdp.runtime.queue import QueueEvent, QueueStream
from fastdp.tracing.protocols import Timestamp

# Streams of closed devices that torch was given, by card and priority; the next device of the card takes them.
_kept: defaultdict[tuple[int, int], list[int]] = defaultdict(list)


class CudaEvent(QueueEvent):
    """A point in a stream of a GPU."""

    __slots__ = ("handle", "stream")

    def __init__(self, stream: CudaStream) -> None:
        super().__init__()
        self.stream = stream
        self.handle = 0  # until the worker records it

    @classmethod
    def issued_already(cls, stream: CudaStream, handle: int, error: BaseException | None) -> CudaEvent:
        """An event that the calling thread has just recorded: nobody can wait for it yet, so it needs no lock."""
        event = cls.__new__(cls)
        event._issued, event.error, event.parts = True, error, ()
        event.stream, event.handle = stream, handle
        return event

    def __del__(self) -> None:
        if self.handle and not sys.is_finalizing():
            self.stream.take_back(self.handle)

    def again(self) -> None:
        """Record an event of `CudaStream.reusable_event` behind what has been issued to its stream so far.

        Streams that wait for its last record still wait for that.
        """
        self.error = None
        cupy_api.event_record(self.handle, self.stream.handle)

    @property
    def done(self) -> bool:
        """True once the GPU has reached the event, or the work before it was skipped."""
        if not (self._issued and self.handle):
            return self._issued
        try:
            if _worker.has_context or _worker.find_context():  # of any card
                return cupy_api.event_done(self.handle)
            with cupy_api.on(self.stream.ordinal):
                return cupy_api.event_done(self.handle)
        except cupy_api.CudaError as error:
            self.error = self.error if self.error is not None else error
            return True

    def leaves(self) -> tuple[QueueEvent, ...]:
        """The event itself."""
        return (self,)

    def finish(self, timeout: float | None = None) -> None:
        """Block until done. A failure on the GPU becomes the event's error."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.wait_issued(timeout)
        began = time.monotonic()
        while not self.done:
            now = time.monotonic()
            if deadline is not None and now > deadline:
                raise DeviceTimeoutError(f"A GPU was not done with its work within timeout={timeout} seconds.")
            time.sleep(pause_after(now - began))


class CudaStream(QueueStream):
    """An ordered queue of work that a worker issues to one CUDA stream.

    Args:
        device: a CudaDevice.
        name: which of its streams.
        priority: CUDA's priority; lower numbers run first.
    """

    # The stream's own worker must record its events in the CUDA stream.
    inline = False
    timed_by_host = False

    def __init__(self, device: Any, name: str, priority: int = 0) -> None:
        super().__init__(device, name)
        self.device = device
        self.ordinal: int = device.ordinal
        self._kept = _kept[self.ordinal, priority]
        try:
            self.handle = self._kept.pop()
        except IndexError:
            self.handle = cupy_api.stream_create(self.ordinal, priority)
        self._torch_has_it = False
        self._waits: list[CudaEvent] = []
        self._for_cupy: AbstractContextManager[object] | None = None
        self._spare: list[int] = []  # events that nobody refers to any more

    def for_torch(self) -> int:
        """The CUDA stream's handle, for torch's operations.

        Torch records an event on each stream that used a tensor when the tensor's memory is freed, which may be long
        after the device was closed. So the CUDA stream then lives as long as the process.
        """
        self._torch_has_it = True
        return self.handle

    def destroy(self) -> None:
        """Destroy the CUDA stream, or keep it for the next device if torch has it. Idempotent."""
        handle, self.handle, self._for_cupy = self.handle, 0, None
        self._waits.clear()
        while self._spare:
            cupy_api.event_destroy(self._spare.pop())
        if handle and self._torch_has_it:
            self._kept.append(handle)
        elif handle:
            cupy_api.stream_destroy(handle)

    def timestamp(self) -> Timestamp | None:
        """The present point of the work issued to the CUDA stream; None while it is captured. From inside the work."""
        stamp: Timestamp | None = self.device.timeline.take(self.handle)
        return stamp

    def read_timestamps(self, seconds: float) -> str:
        """As `Timeline.read`, for all streams of the device."""
        return str(self.device.timeline.read(seconds))

    def now(self) -> CudaEvent:
        """An event at the current point of the work. Called on the worker."""
        event = super().now()
        assert isinstance(event, CudaEvent)
        return event

    def follow(self, event: QueueEvent, timeout: float | None = None) -> None:
        """Order the rest of the work after an event: the worker waits until it is issued, the GPU until it is done."""
        super().follow(event, timeout)
        self._passed(event)
        self._order()

    def _event(self) -> CudaEvent:
        return CudaEvent(self)

    def _passed(self, event: QueueEvent) -> None:
        """Keep the event for the worker, so that no CUDA call runs under the device's lock."""
        self._waits += [leaf for leaf in event.leaves() if isinstance(leaf, CudaEvent) and leaf.stream is not self]

    def _order(self) -> None:
        """Make the GPU wait for the events that the queue has passed."""
        waits, self._waits = self._waits, []
        for event in waits:
            if event.handle:
                cupy_api.stream_wait_event(self.handle, event.handle)

    # On a thread that has the device by `lent`, nothing is queued: the calls of CUDA are made at once.

    def enqueue(self, work: Work) -> None:
        """Run `work()` on the worker after everything enqueued before it."""
        if self.device.borrower == get_ident():
            self.issue(partial(self._with_cupy, work))
        else:
            super().enqueue(work)

    def issue(self, work: Callable[..., object], *given: Any) -> None:
        """As `enqueue` of `work(*given)`, without a current stream of CuPy's."""
        if self.device.borrower == get_ident():
            self.issue_here(work, *given)
        else:
            super().enqueue(partial(work, *given))

    def issue_here(self, work: Callable[..., object], *given: Any) -> BaseException | None:
        """As `issue`, on the thread that has the device by `lent`. Returns the stream's failure, if it has failed."""
        device = self.device
        if self._items or device.serving:
            super().enqueue(partial(work, *given))
            return self._error
        if self._error is not None:
            return self._error
        device.serving = True
        before, _worker.stream = _worker.stream, self
        try:
            cupy_api.switch_to(self.ordinal)
            if self._waits:
                self._order()
            work(*given)
        except BaseException as error:
            self._error = error
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
        finally:
            device.serving = False
            _worker.stream = before
        if device.left:
            device.serve()
        return self._error

    def record(self, again: QueueEvent | None = None) -> QueueEvent:
        """An event that is done when everything enqueued before it is.

        Args:
            again: an earlier result, for which nobody waits any more, from the thread that has the device by `lent`. It
                is recorded again if no queue is in the way.
        """
        device = self.device
        if self._items or device.serving or (again is None and device.borrower != get_ident()):
            return super().record()
        event = again if type(again) is CudaEvent else CudaEvent.issued_already(self, 0, None)
        try:
            if self._waits:
                self._order()
            if not event.handle:
                cupy_api.switch_to(self.ordinal)
                event.handle = self._unused_event()
            cupy_api.event_record(event.handle, self.handle)
        except BaseException as error:
            self._error = self._error if self._error is not None else error
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
        event.error = self._error
        return event

    def wait(self, event: QueueEvent) -> None:
        """Hold back everything enqueued from now on until `event` is done."""
        if self.device.borrower != get_ident() or self._items or not event.issued:
            super().wait(event)
        else:
            self._follow(event)

    def reusable_event(self) -> CudaEvent:
        """An event to be recorded by `again`, in each step anew. The stream's device must be current."""
        return CudaEvent.issued_already(self, self._unused_event(), None)

    def issued_so_far(self) -> CudaEvent:
        """An event behind what any thread has issued to the CUDA stream, past the queue. Its device must be current."""
        handle = self._unused_event()
        event = CudaEvent.issued_already(self, handle, None)
        cupy_api.event_record(handle, self.handle)
        return event

    def _unused_event(self) -> int:
        try:
            return self._spare.pop()
        except IndexError:
            return cupy_api.event_create()

    def take_back(self, event: int) -> None:
        """Keep a CUDA event for the next one that is recorded here. Streams that wait for it still do."""
        if self.handle:
            self._spare.append(event)
        else:
            cupy_api.event_destroy(event)

    def _perform(self, work: Work) -> None:
        if self.device.mine:
            cupy_api.switch_to(self.ordinal)
        if self._waits:
            self._order()
        before, _worker.stream = _worker.stream, self
        try:
            self._with_cupy(work)
        finally:
            _worker.stream = before

    def _with_cupy(self, work: Work) -> None:
        """Run work whose CuPy code runs on this stream. The stream's device is current."""
        if self._for_cupy is None:
            self._for_cupy = cupy_api.for_cupy(self.handle)
        with self._for_cupy:
            work()

    def _mark(self, event: QueueEvent) -> None:
        if self.device.mine:
            cupy_api.switch_to(self.ordinal)
        if self._waits:
            self._order()
        if isinstance(event, CudaEvent):
            event.handle = self._unused_event()
            cupy_api.event_record(event.handle, self.handle)


class _Worker(threading.local):
    """A thread that issues a stream's work."""

    stream: CudaStream | None = None
    has_context = False

    def find_context(self) -> bool:
        """Whether CUDA has a current context on this thread, of any card. Once it has, it stays so."""
        self.has_context = cupy_api.has_context()
        return self.has_context


_worker = _Worker()


def current_stream() -> CudaStream | None:
    """The stream whose work this thread is issuing, or None if it is not a worker at work."""
    return _worker.stream
