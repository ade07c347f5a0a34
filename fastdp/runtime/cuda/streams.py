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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.base import Work
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.queue import QueueEvent, QueueStream

# Seconds between two polls of an event: short at first, since a step may take only microseconds.
FIRST_PAUSE, LAST_PAUSE = 2e-5, 1e-3

_worker = threading.local()

# Streams of closed devices that torch was given, by card and priority; the next device of the card takes them.
_kept: defaultdict[tuple[int, int], list[int]] = defaultdict(list)


class CudaEvent(QueueEvent):
    """A point in a stream of a GPU."""

    __slots__ = ("handle", "stream")

    def __init__(self, stream: CudaStream) -> None:
        super().__init__()
        self.stream = stream
        self.handle = 0  # until the worker records it

    def __del__(self) -> None:
        if self.handle and not sys.is_finalizing():
            cupy_api.event_destroy(self.handle)

    @property
    def done(self) -> bool:
        """True once the GPU has reached the event, or the work before it was skipped."""
        return self._issued and (not self.handle or self._query())

    def leaves(self) -> tuple[QueueEvent, ...]:
        """The event itself."""
        return (self,)

    def finish(self, timeout: float | None = None) -> None:
        """Block until done. A failure on the GPU becomes the event's error."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.wait_issued(timeout)
        pause = FIRST_PAUSE
        while not self.done:
            if deadline is not None and time.monotonic() > deadline:
                raise DeviceTimeoutError(f"A GPU was not done with its work within timeout={timeout} seconds.")
            time.sleep(pause)
            pause = min(1.5 * pause, LAST_PAUSE)

    def _query(self) -> bool:
        """Query CUDA. An event on a failed GPU counts as done, with an error."""
        try:
            with cupy_api.on(self.stream.ordinal):
                return cupy_api.event_done(self.handle)
        except cupy_api.CudaError as error:
            self.error = self.error if self.error is not None else error
            return True


class CudaStream(QueueStream):
    """An ordered queue of work that a worker issues to one CUDA stream.

    Args:
        device: a CudaDevice.
        name: which of its streams.
        priority: CUDA's priority; lower numbers run first.
    """

    # The stream's own worker must record its events in the CUDA stream.
    inline = False

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

    def for_torch(self) -> int:
        """The CUDA stream's handle, for torch's operations.

        Torch records an event on each stream that used a tensor when the tensor's memory is freed, which may be long
        after the device was closed. So the CUDA stream then lives as long as the process.
        """
        self._torch_has_it = True
        return self.handle

    def destroy(self) -> None:
        """Destroy the CUDA stream, or keep it for the next device if torch has it. Idempotent."""
        handle, self.handle = self.handle, 0
        if handle and self._torch_has_it:
            self._kept.append(handle)
        elif handle:
            cupy_api.stream_destroy(handle)

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

    def _perform(self, work: Work) -> None:
        self._order()
        with _current(self), cupy_api.current_stream(self.ordinal, self.handle):
            work()

    def _mark(self, event: QueueEvent) -> None:
        self._order()
        if isinstance(event, CudaEvent):
            event.handle = cupy_api.event_create()
            cupy_api.event_record(event.handle, self.handle)


def current_stream() -> CudaStream | None:
    """The stream whose work this thread is issuing, or None if it is not a worker at work."""
    return getattr(_worker, "stream", None)


@contextmanager
def _current(stream: CudaStream) -> Iterator[None]:
    """Mark this thread as issuing a stream's work."""
    before = current_stream()
    _worker.stream = stream
    try:
        yield
    finally:
        _worker.stream = before
