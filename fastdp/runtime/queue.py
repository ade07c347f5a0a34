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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from fastdp.errors import DeviceLostError, DeviceTimeoutError
from fastdp.runtime import forks
from fastdp.runtime.base import DeviceMemory, Work
from fastdp.runtime.events import QueueEvent, complete_all, first_done, here, joined
from fastdp.runtime.lending import lent
from fastdp.runtime.queue_stream import QueueStream

__all__ = ["QueueDevice", "QueueEvent", "QueueStream", "first_done", "joined", "lent"]


class QueueDevice(DeviceMemory):
    """A worker thread and four streams. Subclasses define the device's memory.

    Args:
        index: ordinal among the devices of its kind.
        name: shown in messages and in the worker thread's name.
        stream: makes a stream of this device from its name.

    The worker starts with the first work and ends with `close()`. `delay` is for tests: the worker calls it
    before each item it runs. `unsettled` and `settle` are for the engine: the caller of earlier work left before that
    work was done, so the streams may still hold the work or its failure; `settle()(timeout)` rolls it back,
    if that caller still exists. `part_of`: the device whose shards this one runs; None for a device of its own.
    `parts`: such devices of this one, which close with it. `closed`: the device takes no more work. `cut_short`:
    because a fork has ended its worker in the middle of its work. `lost`: why it is lost; empty if it is not.
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
        self.borrower: int | None = None
        self.serving = False
        self.left = False  # whether items may be left that the borrowing thread has not run
        self.part_of: QueueDevice | None = None
        self.parts: list[QueueDevice] = []
        self._at_once = True
        self._wake_borrower: Callable[[], object] | None = None  # while that thread sleeps in the worker's place
        self.closed = False
        self.cut_short = False
        self.lost = ""
        forks.watch(self)
        self.compute = stream(self, "compute")
        self.copy_in = stream(self, "copy_in")
        self.copy_out = stream(self, "copy_out")
        self.communication = stream(self, "communication")
        self._streams = (self.communication, self.copy_out, self.copy_in, self.compute)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def idle(self) -> bool:
        """Whether the worker sleeps at the time of the call."""
        return self._asleep

    @property
    def at_rest(self) -> bool:
        """Whether the worker sleeps and nothing is enqueued. It stays so as long as nobody enqueues anything."""
        return (self._asleep or self._thread is None or self.mine) and not self.has_work

    @property
    def runs(self) -> bool:
        """Whether an item of a stream is running at the time of the call."""
        return any(stream._running for stream in self._streams)

    def position(self) -> str:
        """What the streams do or wait for at the time of the call, in words."""
        return "; ".join(filter(None, (stream.position() for stream in self._streams))) or "idle"

    @property
    def has_work(self) -> bool:
        """Whether anything is enqueued."""
        return bool(self.compute._items or self.copy_in._items or self.copy_out._items or self.communication._items)

    def part(self, name: str) -> QueueDevice:
        """Make another device on this one's memory or card, with a worker and streams of its own."""
        raise NotImplementedError

    def _worker_scope(self) -> AbstractContextManager[object]:
        """The context in which the worker runs for its whole life."""
        return nullcontext()

    def lent_scope(self) -> AbstractContextManager[object]:
        """The context in which a thread runs the work of devices of this kind that it has by `lent`."""
        return nullcontext()

    def push(self, stream: QueueStream, item: Work | QueueEvent | tuple[QueueEvent]) -> None:
        """Append an item to one of the streams. Starts the worker if needed, and wakes it if the item can run.

        Raises:
            RuntimeError: the device is closed.
        """
        with self._lock:
            if self.closed:
                raise self._closed_error()
            if stream.inline and isinstance(item, QueueEvent) and not stream._items and not stream._running:
                item.complete(stream._error)  # no other thread knows the event yet
                return
            stream._items.append(item)
            borrowed = self.borrower is not None
            self.left = self.left or borrowed
            if self._thread is None and not borrowed:
                self._start()
            # Behind another item no wake-up is needed: that item runs soon, or its event wakes the worker.
            elif self._asleep and len(stream._items) == 1 and stream._ready(False):
                self._rouse()
        if borrowed and self._at_once and self.mine and not self.serving:
            self.serve()

    def lend(self) -> AbstractContextManager[bool]:
        """Make the calling thread the worker: work that it enqueues runs on it, at once if nothing holds it back.

        Does nothing while the worker has work or a test delays it. Thread settings that the work changes persist in
        the calling thread, and a step that runs this way cannot be stopped by a time-out.
        """
        return lent([self])

    @property
    def mine(self) -> bool:
        """Whether the calling thread is the worker by `lent`."""
        return self.borrower == threading.get_ident()

    def take(self, *, at_once: bool = True) -> bool:
        """Make the calling thread the worker, if the worker is idle. Returns whether it is; see `lent`.

        `at_once`: what it enqueues runs at once if nothing holds it back, not when it waits (`host_worker`).
        """
        with self._lock:
            rests = self._asleep or self._thread is None
            if self.compute._items or self.copy_in._items or self.copy_out._items or self.communication._items:
                return False
            if rests and self.borrower is None and self.delay is None and not self.closed:
                self.borrower, self._asleep, self.left = threading.get_ident(), False, False
                self._at_once = at_once
                return True
        return False

    def give_back(self) -> None:
        """End what `take` began. The worker goes on with work that is left."""
        with self._lock:
            self.borrower = self._wake_borrower = None
            self.compute._running = self.copy_in._running = self.copy_out._running = False
            self.communication._running = False
            self._asleep = self._thread is not None
            if self.left and self.has_work:  # it waits for other devices, or an interrupt came
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

    def begin_close(self) -> None:
        """Refuse further work, and let the worker end when it is done. Does not wait."""
        for part in self.parts:
            part.begin_close()
        with self._lock:
            self.closed = True
            self._rouse()

    def drop_work(self, error: BaseException) -> None:
        """Drop what is enqueued and has not begun. Whoever waits for it gets the error. For a worker that hangs."""
        for part in self.parts:
            part.drop_work(error)
        with self._lock:
            dropped = [(event, stream) for stream in self._streams for event in stream._drop(error)]
        for event, stream in dropped:
            event.complete(stream._error)

    def close(self, timeout: float = 60.0) -> None:
        """Let the worker finish all work that can still run, then stop it. Idempotent.

        The remaining items wait for events that may never complete. They are dropped, and their events carry a
        RuntimeError, so that no thread waits for them forever.

        Raises:
            DeviceTimeoutError: the worker was still busy after `timeout` seconds.
        """
        self.begin_close()
        deadline = time.monotonic() + timeout
        for part in self.parts:
            part.close(timeout)
            timeout = max(0.0, deadline - time.monotonic())
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)
        if thread.is_alive():
            raise DeviceTimeoutError(f"The worker of {self.name} was still busy after timeout={timeout} seconds.")

    def after_fork(self) -> None:
        """In a forked child: start a worker anew with the next work. Refuse work if the fork has cut some short."""
        self.cut_short = self.on_gpu or any(stream._items or stream._running for stream in self._streams)
        self.closed = self.closed or self.cut_short
        self._lock, self._gate = threading.Lock(), threading.Lock()  # which another thread may have held
        self._gate.acquire()
        self._thread, self._asleep = None, False
        self.borrower, self.serving, self.settled = None, False, []
        self._wake_borrower = None

    def answers(self) -> bool:
        """Whether another device may take the place of this one, which was lost. Default: no, as for a card."""
        return False

    def _closed_error(self) -> RuntimeError:
        lost = self.lost or (self.part_of.lost if self.part_of is not None else "")
        if lost:
            remedy = 'Wrap the model again on the others, or with on_device_loss="continue".'
            return DeviceLostError(f"Device {self.name} was lost: {lost}. {remedy}")
        if self.cut_short:
            return RuntimeError(
                f"Device {self.name} cannot be used in this process, which was forked "
                f"{'from one that uses CUDA' if self.on_gpu else 'while another thread ran a step'}. Start it by "
                'multiprocessing.get_context("spawn"), or before the model is wrapped.'
            )
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
            if self._wake_borrower is None:
                self._gate.release()
            else:
                self._wake_borrower()

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

    def serve(self) -> None:
        """Run all items that may run, on the borrowing thread. KeyboardInterrupt and SystemExit are raised at once."""
        self.serving = True
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
            with self._lock:
                self.serving, self.left = False, self.has_work

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
                    if self.closed and not settled:
                        break
                    # Completing `settled` below may make an item of this device ready, which then opens the gate.
                    sleeps = self._asleep = not self.closed
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
