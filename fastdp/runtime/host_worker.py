"""The main thread as the worker of the first of several virtual devices, while it waits for the others.

A thread that only waits for a step can as well do a worker's part of it: one thread less is woken for each step, and
threads are no more than devices. Work is run when the thread waits for an event, never before: until then it enqueues,
so that the other workers begin first.

What a worker of its own gives for nothing needs care here. Work that hangs must be given up in time: a watchdog
interrupts it. Ctrl-C must not come between taking an item and completing its event: it waits until work runs.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # behind `signal`, whose enumerations take 12 us a step, here 1
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.events import QueueEvent, complete_all, here
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.queue_stream import QueueStream
from fastdp.runtime.watchdog import Watched

_CAN_WATCH = hasattr(signal, "SIGURG")


class OverdueError(DeviceTimeoutError):
    """Work of the main thread was given up. `found`: where all threads were then."""

    def __init__(self, found: str) -> None:
        super().__init__(f"Work on the main thread took too long.{found}")
        self.found = found


@contextmanager
def in_place_of_worker(device: QueueDevice) -> Iterator[bool]:
    """Let the main thread run this device's work whenever it waits for an event.

    Yields whether it does. It does not where the worker is busy, a test delays it, the thread is another one, or SIGINT
    has a handler that is not Python's.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if not _CAN_WATCH or not on_main or device.mine or _signal.getsignal(_signal.SIGINT) is None:
        yield False
        return
    before = getattr(here, "wait", None)
    try:
        taken = device.take(at_once=False)
        if taken:
            here.wait = partial(_wait, device)
        yield taken
    finally:
        here.wait = before
        if device.mine:  # also if an interrupt came before that was noted
            device.give_back()


def _wait(device: QueueDevice, event: QueueEvent, timeout: float | None) -> None:
    """Run the device's work until the event is issued.

    Raises:
        DeviceTimeoutError: it was not issued within `timeout` seconds, or work took longer.
    """
    calls: SimpleQueue[None] = SimpleQueue()
    wake = partial(calls.put, None)
    if not event.notify(wake):
        return
    seconds = threading.TIMEOUT_MAX if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)
    deadline = time.monotonic() + seconds
    with _Interrupts() as interrupts, device.lent_scope():
        wait, worker = here.wait, getattr(here, "worker", False)
        here.wait, here.worker, here.interrupts = None, True, interrupts  # its work waits as on its worker
        try:
            while True:
                _serve(device, wake, interrupts, Watched(f"The work of {device.name}", deadline - time.monotonic()))
                if event.issued:
                    return
                interrupts.may_come = True
                try:
                    interrupts.deliver()
                    calls.get(timeout=max(0.0, deadline - time.monotonic()))
                except Empty:
                    raise _late(timeout) from None
                finally:
                    interrupts.may_come = False
        finally:
            with device._lock:
                device._asleep, device._wake_borrower = False, None
            here.wait, here.worker, here.interrupts = wait, worker, None


def _serve(device: QueueDevice, wake: Callable[[], object], interrupts: _Interrupts, watch: Watched) -> None:
    """Run all items that may run, as `QueueDevice.serve`. Then `wake` is called when another one may."""
    stream: QueueStream | None = None
    while True:
        interrupts.deliver()
        with device._lock:
            if stream is not None:
                stream._running = False
            found = device._next()
            settled, device.settled = device.settled, []
            if found is None and not settled:
                device._wake_borrower, device._asleep, device.left = wake, True, device.has_work
        if settled:
            complete_all(settled)
        if found is None:
            if not settled:
                return
            stream = None
            continue
        stream, item = found
        if isinstance(item, (QueueEvent, tuple)):
            stream._run(item)
        else:
            here.serving = interrupts.may_come = True
            try:
                with watch:
                    stream._run(item)
            except BaseException:
                if watch.found is None:
                    raise
                watch.__exit__(None, None, None)  # again: the watchdog's signal may have come at its beginning
            finally:
                here.serving = interrupts.may_come = False
                stream._running = False
        del found, item
        # The step is given up, whatever the work made of it.
        if watch.found is not None:
            raise OverdueError(watch.found)
        if interrupts.raised and stream._error is not None:
            raise stream._error


def _late(timeout: float | None) -> DeviceTimeoutError:
    return DeviceTimeoutError(f"A device was not done with its work within timeout={timeout} seconds.")


class _Interrupts:
    """Lets Ctrl-C come only while `may_come` is set.

    `raised`: one has ended what the thread did.
    """

    __slots__ = ("_before", "_held", "_noted", "may_come", "raised")

    def __init__(self) -> None:
        self._noted: list[tuple[int, Any]] = []
        self.may_come = self.raised = self._held = False
        self._before: Any = None

    def __enter__(self) -> _Interrupts:
        self._before = _signal.getsignal(_signal.SIGINT)
        _signal.signal(_signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        _signal.signal(_signal.SIGINT, self._before)
        if self._noted and callable(self._before):
            self._before(*self._noted[0])

    def deliver(self) -> None:
        """Let one come that has been noted. Called where no item is in the thread's hands."""
        if self._noted:
            noted, self._noted = self._noted[0], []
            before, self.may_come = self.may_come, True
            try:
                self._handle(*noted)
            finally:
                self.may_come = before

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let none come in the block."""
        held, self._held = self._held, True
        try:
            yield
        finally:
            self._held = held

    def _handle(self, number: int, frame: Any) -> None:
        if self._held or not self.may_come:
            self._noted.append((number, frame))
        elif callable(self._before):
            self.raised = True
            self._before(number, frame)
            self.raised = False
