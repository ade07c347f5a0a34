"""A meeting point where the replicas of a step exchange values in the middle of their work."""

from __future__ import annotations

import threading
from typing import Any

from fastdp.errors import DeviceTimeoutError, StepAborted


class Rendezvous:
    """Lets `size` threads exchange values repeatedly, and never leaves them waiting for a thread that failed.

    Args:
        size: the number of threads.
        timeout: seconds that one exchange may take.
    """

    def __init__(self, size: int, timeout: float) -> None:
        self._size = size
        self._timeout = timeout
        self._changed = threading.Condition()
        self._arrived: list[Any] = [None] * size
        self._count = 0
        self._round = 0
        self._values: list[Any] = []
        self._cause: BaseException | None = None

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Pass `value`, wait for all other threads, and return all values in rank order.

        Values are passed by reference, and must only be read.

        Raises:
            StepAborted: another thread failed.
            DeviceTimeoutError: another thread did not arrive in time.
        """
        with self._changed:
            if self._cause is not None:
                raise StepAborted("The step was stopped by a failure on another device.") from self._cause
            turn = self._round
            self._arrived[rank] = value
            self._count += 1
            if self._count == self._size:
                self._values, self._arrived = self._arrived, [None] * self._size
                self._count, self._round = 0, turn + 1
                self._changed.notify_all()
                return self._values
            self._changed.wait_for(lambda: self._round > turn or self._cause is not None, self._timeout)
            if self._round > turn:
                return self._values
            if self._cause is not None:
                raise StepAborted("The step was stopped by a failure on another device.") from self._cause
            missing = self._size - self._count
            late = DeviceTimeoutError(
                f"{missing} of {self._size} replicas did not reach the exchange within {self._timeout} seconds."
            )
            self.abort(late)  # a thread that arrives later would wait for this one, which leaves
            raise late

    @property
    def timeout(self) -> float:
        """Seconds that one exchange may take."""
        return self._timeout

    @property
    def aborted(self) -> bool:
        """Whether `abort` was called."""
        return self._cause is not None

    def abort(self, cause: BaseException) -> None:
        """Wake all waiting threads, and refuse later ones, because a thread failed."""
        with self._changed:
            self._cause = cause if self._cause is None else self._cause
            self._changed.notify_all()
