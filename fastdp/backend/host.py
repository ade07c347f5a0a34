"""Virtual devices: NumPy memory, one worker thread per device, and the ordering rules of CUDA streams.

The worker takes, among its device's streams, any whose next item may run; an item behind an event that
is not done holds back its own stream only. So a missing `wait` between two streams is a real race here
as it is on a GPU, and `HostDevice.delay` lets a test widen it.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from fastdp.backend.base import Work
from fastdp.errors import DeviceTimeoutError

ALIGNMENT = 64
IDLE_SECONDS = 5.0


class HostEvent:
    """A point in a stream's work; done exactly once, with or without an error."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._wakes: list[Callable[[], None]] = []
        self.error: BaseException | None = None

    @property
    def done(self) -> bool:
        """True once all work before the event has run, or was skipped."""
        return self._done.is_set()

    def complete(self, error: BaseException | None = None) -> None:
        """Mark the event done and wake the devices that wait for it."""
        with self._lock:
            self.error = error
            self._done.set()
            wakes, self._wakes = self._wakes, []
        for wake in wakes:
            wake()

    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake()` when done: at once if it is already."""
        with self._lock:
            if not self._done.is_set():
                self._wakes.append(wake)
                return
        wake()

    def synchronize(self, timeout: float | None = None) -> None:
        """Block until done, then raise the error that the event carries, if any.

        Raises:
            DeviceTimeoutError: not done within `timeout` seconds.
        """
        self.finish(timeout)
        if self.error is not None:
            raise self.error

    def finish(self, timeout: float | None = None) -> None:
        """Block until done, and leave the error, if any, to the caller."""
        if not self._done.wait(timeout if timeout is None else max(0.0, timeout)):
            raise DeviceTimeoutError(f"A device was not done with its work within timeout={timeout} seconds.")


class HostStream:
    """An ordered queue of work for one device's worker."""

    def __init__(self, device: HostDevice, name: str) -> None:
        self.name = name
        self._device = device
        self._items: deque[Work | HostEvent | tuple[HostEvent]] = deque()
        self._error: BaseException | None = None

    def enqueue(self, work: Work) -> None:
        """Run `work()` on the worker after everything enqueued before it."""
        self._device.push(self, work)

    def record(self) -> HostEvent:
        """An event that is done when everything enqueued before it is."""
        event = HostEvent()
        self._device.push(self, event)
        return event

    def wait(self, event: HostEvent) -> None:
        """Hold back everything enqueued from now on until `event` is done."""
        self._device.push(self, (event,))
        event.notify(self._device.wake)

    def recover(self) -> None:
        """Forget a failure."""
        self._error = None

    def _ready(self) -> bool:
        """Whether the head of the queue may run now."""
        if not self._items:
            return False
        head = self._items[0]
        return not isinstance(head, tuple) or head[0].done

    def _run_head(self, item: Work | HostEvent | tuple[HostEvent]) -> None:
        """Run one item. A failure is kept: it skips the work behind it and marks the events behind it."""
        if isinstance(item, HostEvent):
            item.complete(self._error)
        elif isinstance(item, tuple):
            self._error = self._error or item[0].error
        elif self._error is None:
            try:
                item()
            # The worker hands every failure on, KeyboardInterrupt and SystemExit too, to the host
            # thread that synchronizes: swallowing one here would lose it, raising would kill the worker.
            except BaseException as error:  # noqa: BLE001
                self._error = error


class HostDevice:
    """One virtual device: a worker thread, four streams and NumPy memory.

    Args:
        index: ordinal among the virtual devices.

    The worker starts with the first work and ends with `close()`.
    """

    kind = "virtual"

    def __init__(self, index: int) -> None:
        self.index = index
        self.name = f"virtual:{index}"
        self.delay: Callable[[], None] | None = None
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.compute = HostStream(self, "compute")
        self.copy_in = HostStream(self, "copy_in")
        self.copy_out = HostStream(self, "copy_out")
        self.communication = HostStream(self, "communication")
        self._streams = (self.communication, self.copy_out, self.copy_in, self.compute)

    def __repr__(self) -> str:
        return f"HostDevice({self.name!r})"

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Uninitialized memory of `shape` and `dtype`, 64-byte aligned, owned by the array."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = np.empty(nbytes + ALIGNMENT, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        return raw[offset : offset + nbytes].view(dtype).reshape(shape)

    def push(self, stream: HostStream, item: Work | HostEvent | tuple[HostEvent]) -> None:
        """Append an item to one of the streams and see that the worker is there."""
        with self._wake:
            if self._closed:
                raise RuntimeError(
                    f"Device {self.name} is closed (set_virtual_devices was called again, or the "
                    "interpreter is ending). Wrap the model again to use the new devices."
                )
            stream._items.append(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"fastdp-{self.name}", daemon=True)
                self._thread.start()
            self._wake.notify()

    def wake(self) -> None:
        """Let the worker look at its streams again: an event became done."""
        with self._wake:
            self._wake.notify()

    def synchronize(self, timeout: float | None = None) -> None:
        """Block until all streams are idle. Errors stay with their streams' events."""
        for event in [stream.record() for stream in self._streams]:
            event.finish(timeout)

    def recover(self) -> None:
        """Forget failures on all streams."""
        for stream in self._streams:
            stream.recover()

    def close(self, timeout: float = 60.0) -> None:
        """Let the worker finish what can still run, and end it. Idempotent.

        Raises:
            DeviceTimeoutError: the worker was still busy after `timeout` seconds.
        """
        with self._wake:
            self._closed = True
            self._wake.notify()
            thread, self._thread = self._thread, None
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)
        if thread.is_alive():
            raise DeviceTimeoutError(f"The worker of {self.name} was still busy after timeout={timeout} seconds.")

    def _next(self) -> HostStream | None:
        """A stream whose head may run. Called with the lock held."""
        return next((stream for stream in self._streams if stream._ready()), None)

    def _work(self) -> None:
        """The worker's loop: run whatever may run, sleep otherwise."""
        for turn in itertools.count():
            with self._wake:
                while (stream := self._next()) is None:
                    if self._closed:
                        return
                    self._wake.wait(IDLE_SECONDS)
                item = stream._items.popleft()
            if self.delay is not None and turn:
                self.delay()
            stream._run_head(item)
            del item
