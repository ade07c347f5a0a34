"""The state of an engine between its steps: which thread uses it, and which step is not over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fastdp.engine.step import Operation
from fastdp.errors import DeviceTimeoutError
from fastdp.runtime import forks

# Seconds that fetching a batch may take on a thread that is to be a worker of the step meanwhile.
FAST_FETCH = 1e-3


class EngineState:
    """Which thread uses an engine, how many steps it has made, and which step is not over.

    Args:
        timeout: seconds before a step is given up.

    Attributes:
        unsettled: the operation in flight, or one that was given up and may still run on the devices.
        busy: held by the thread that uses the engine.
        fetching: seconds that the caller's own work takes during a step, on the average of the latest ones.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.steps = 0
        self.unsettled: Operation | None = None
        self.busy = threading.Lock()
        self.fetching = 0.0
        self._training = False
        self._owner, self._cut_short = 0, False
        forks.watch(self)

    @property
    def fetches_fast(self) -> bool:
        """Whether the thread that uses the engine has time to do a worker's part of a step."""
        return self.fetching <= FAST_FETCH

    def fetch(self, work: Callable[[], object]) -> None:
        """Run the caller's own work during a step, and note how long it takes."""
        began = time.perf_counter()
        work()
        self.fetching += (time.perf_counter() - began - self.fetching) / 2

    def take(self, *, trains: bool) -> None:
        """Wait until the engine is free, and take it. Training one model from two threads fails at once.

        Raises:
            RuntimeError: another thread is training this model, or was running it when this process was forked.
            DeviceTimeoutError: the engine was not free in time.
        """
        if self._cut_short:
            raise RuntimeError(
                "This model cannot be used in this process, which was forked while another thread ran a step of it. "
                'Start it by multiprocessing.get_context("spawn"), or before the model is wrapped.'
            )
        if not self.busy.acquire(blocking=False):
            if trains and self._training:
                raise RuntimeError(
                    "This model is already running a step in another thread. Train one parallel model from one thread "
                    "at a time."
                )
            if not self.busy.acquire(timeout=self.timeout):
                raise DeviceTimeoutError(f"Another thread kept this model busy for {self.timeout} seconds.")
        self._training, self._owner = trains, threading.get_ident()

    def leave(self) -> None:
        """Free the engine. The note that a step trains is cleared first: the next thread may not train."""
        self._training = False
        self.busy.release()

    def after_fork(self) -> None:
        """In a forked child: a step of another thread, which is gone, is never over."""
        if self.busy.locked() and self._owner != threading.get_ident():
            self.busy, self._cut_short = threading.Lock(), True
