"""What lasts from one step of an engine to the next: whose turn it is, and what the last step left behind."""

from __future__ import annotations

import threading

from fastdp.engine.step import Operation
from fastdp.errors import DeviceTimeoutError


class EngineState:
    """Whose turn it is on an engine, how many steps it has made, and the one that is not over.

    Args:
        timeout: seconds that one step may take.

    Attributes:
        unsettled: what is in flight, or was given up and may still run: nobody waits for it then.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.steps = 0
        self.unsettled: Operation | None = None
        self.busy = threading.Lock()
        self._training = False

    def take(self, *, trains: bool) -> None:
        """Wait until the engine is free. Two threads that train one model are a mistake, and told so at once.

        Raises:
            RuntimeError: another thread is training this model.
            DeviceTimeoutError: the engine was not free in time.
        """
        if not self.busy.acquire(blocking=False):
            if trains and self._training:
                raise RuntimeError(
                    "This model is already running a step in another thread. Train one parallel model from one thread "
                    "at a time."
                )
            if not self.busy.acquire(timeout=self.timeout):
                raise DeviceTimeoutError(f"Another thread kept this model busy for {self.timeout} seconds.")
        self._training = trains

    def leave(self) -> None:
        """Free the engine. Whoever takes it next has not said yet that it trains: the note of this step goes first."""
        self._training = False
        self.busy.release()
