"""The clock of a GPU during a trace: CUDA events in its streams, as times of the host's clock.

A *base* is an event whose time on the host's clock is known. The first one is recorded on a stream with nothing else
on it, between two looks at the host's clock. All other times are CUDA's own elapsed times since a base, so that the
order and the lengths of spans are the GPU's. Elapsed times are 32-bit floats of milliseconds: a base that lies seconds
back is replaced by a later event, or they would get coarse.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque

from fastdp.runtime.cuda import cupy_api, cupy_timing
from fastdp.runtime.events import pause_after
from fastdp.tracing import spans

# Timestamps that wait to be read. Beyond so many, each new one has some old ones read.
MOST_WAITING, READ_AT_ONCE = 1024, 4
# The age of a base at which the next one is chosen. Two are kept, since streams are read out of order.
BASE_NANOSECONDS = 2_000_000_000
# Attempts to find the host's time of an event. One of so few nanoseconds is good enough, one of so many has failed.
ATTEMPTS, GOOD, FAILED = 20, 20_000, 1_000_000_000


class CudaTimestamp:
    """A point in a stream of a GPU. `nanoseconds`: as in `fastdp.tracing.protocols.Timestamp`."""

    __slots__ = ("event", "nanoseconds")

    def __init__(self, event: int) -> None:
        self.event = event
        self.nanoseconds: int | None = None


class Timeline:
    """Takes timestamps in a device's streams, and reads them when the GPU has passed them. Any thread may do either.

    Args:
        ordinal: of the card.
        name: of the device, for messages.
    """

    def __init__(self, ordinal: int, name: str) -> None:
        self._ordinal, self._name = ordinal, name
        self._lock = threading.Lock()
        self._spare: list[int] = []
        self._waiting: deque[CudaTimestamp] = deque()
        self._bases: deque[tuple[int, int]] = deque()  # events, and their times in nanoseconds
        self._epoch = -1
        self._uncertain = 0

    def take(self, stream: int) -> CudaTimestamp | None:
        """A timestamp behind the work that has been issued to a CUDA stream. The GPU's time, not the host's.

        Returns:
            None while the stream is being captured, which an event would become a part of, and if the GPU has failed.
        """
        try:
            if cupy_timing.is_capturing(stream):
                return None
            with self._lock:
                self._begin()
                stamp = CudaTimestamp(self._event())
                cupy_api.event_record(stamp.event, stream)
                self._waiting.append(stamp)
                if len(self._waiting) > MOST_WAITING:
                    self._read(READ_AT_ONCE)
                return stamp
        except cupy_api.CudaError:  # the work itself will fail with it, and says so
            return None

    def read(self, seconds: float) -> str:
        """Read all timestamps, and wait for the GPU for at most so long. Returns how well its clock is known."""
        began = time.monotonic()
        while True:
            with self._lock:
                try:
                    self._read(len(self._waiting))
                except cupy_api.CudaError as error:
                    return f"the GPU has failed: {error}"
                if not self._waiting:
                    return f"CUDA events, on the host's clock within {self._uncertain / 1e3:.1f} microseconds"
            waited = time.monotonic() - began
            if waited > seconds:
                return "the GPU was not done with its work in time"
            time.sleep(pause_after(waited))

    def close(self) -> None:
        """Read what can be read, and destroy all events."""
        with self._lock:
            with contextlib.suppress(cupy_api.CudaError):  # what is not known stays unknown
                self._read(len(self._waiting))
            events = [*self._spare, *(stamp.event for stamp in self._waiting), *(event for event, _ in self._bases)]
            self._spare.clear()
            self._waiting.clear()
            self._bases.clear()
            self._epoch = -1
            for event in events:
                cupy_api.event_destroy(event)

    # With the lock held.

    def _begin(self) -> None:
        """Find the first base of a recording."""
        if self._epoch == spans.now.epoch:
            return
        self._epoch = spans.now.epoch
        while self._bases:
            self._spare.append(self._bases.popleft()[0])
        stream = cupy_api.stream_create(self._ordinal)
        try:
            self._bases.append(self._anchored(stream))
        finally:
            cupy_api.stream_destroy(stream)

    def _anchored(self, stream: int) -> tuple[int, int]:
        """An event that an idle stream has passed, and when that was: in the middle of the quickest two looks."""
        best, found, at = FAILED, 0, 0
        for _ in range(ATTEMPTS):
            event = self._event()
            before = after = time.perf_counter_ns()
            cupy_api.event_record(event, stream)
            while not self._is_done(event) and after - before < FAILED:
                after = time.perf_counter_ns()
            taken = time.perf_counter_ns() - before
            if found and taken >= best:
                self._spare.append(event)
                continue
            if found:
                self._spare.append(found)
            best, found, at = taken, event, before + taken // 2
            if not GOOD < taken < FAILED:
                break
        self._uncertain = best // 2
        return found, at

    def _read(self, most: int) -> None:
        """Read the oldest timestamps, as far as the GPU has passed them."""
        while self._waiting and most > 0 and self._is_done(self._waiting[0].event):
            stamp = self._waiting.popleft()
            most -= 1
            base, zero = self._bases[0]
            stamp.nanoseconds = zero + round(1e6 * cupy_timing.event_elapsed(base, stamp.event))
            if stamp.nanoseconds - self._bases[-1][1] > BASE_NANOSECONDS:
                self._bases.append((stamp.event, stamp.nanoseconds))
                if len(self._bases) > 2:
                    self._spare.append(self._bases.popleft()[0])
            else:
                self._spare.append(stamp.event)

    def _is_done(self, event: int) -> bool:
        with cupy_api.on(self._ordinal):
            return cupy_api.event_done(event)

    def _event(self) -> int:
        """An event of the device that is not in use."""
        if self._spare:
            return self._spare.pop()
        with cupy_api.on(self._ordinal):
            return cupy_timing.timed_event_create()
