"""A meeting point where the replicas of a step exchange values in the middle of their work."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from fastdp.comm.turns import Turn
from fastdp.errors import DeviceTimeoutError, StepAborted
from fastdp.tracing.spans import span


class Rendezvous:
    """Lets `size` threads exchange values repeatedly, and never leaves them waiting for a thread that does not come.

    Args:
        size: the number of threads.
        timeout: seconds that one exchange may take.
        names: what messages call the threads, by rank: the names of their devices.
        turns: by rank, the turns of threads that take turns. A thread that waits gives its turn to another.
    """

    def __init__(self, size: int, timeout: float, names: Sequence[str] = (), turns: Sequence[Turn | None] = ()) -> None:
        self._size = size
        self._timeout = timeout
        self._names = names
        self._turns = turns
        self._changed: Any = threading.Condition() if size > 1 else threading.Lock()  # for which nobody waits
        self._arrived: list[Any] = [None] * size
        self._waiting: list[int] = []
        self._place: object = None  # of those who wait
        self._gone: list[int] = []
        self._round = 0
        self._values: list[Any] = []
        self._aborted = self._over = False
        self._cause: BaseException | None = None
        self._parted = ""  # how the threads missed each other
        self.one_thread = False  # a single thread runs all parts of the step: whoever waits would wait for ever

    def exchange(self, rank: int, value: Any, place: object) -> list[Any]:
        """Pass `value`, wait for all other threads, and return all values in rank order.

        Values are passed by reference, and must only be read.

        Args:
            rank: this thread's rank.
            value: its value.
            place: names the exchange, in words: a text, or a tuple of parts of one. Equal on all threads that belong
                together. Otherwise values of two computations would be mixed.

        Raises:
            RuntimeError: the threads are at different places, or one of them has left. All get it.
            StepAborted: another thread failed.
            DeviceTimeoutError: another thread did not arrive in time.
        """
        turn = self._turns[rank] if self._turns else None
        if turn is None:
            return self._exchange(rank, value, place)
        turn.give()
        values = self._exchange(rank, value, place)
        turn.take()  # outside of the lock, since the shard that has the turn may want that
        return values

    def _exchange(self, rank: int, value: Any, place: object) -> list[Any]:
        """As `exchange`, without turns."""
        with self._changed:
            self._go_on()
            if self.one_thread and self._size > 1:
                self._part(f"A step launched by one thread comes to {_in_words(place)}, which is a bug in fastdp.")
            if self._gone or (self._waiting and place != self._place):
                self._part(self._missed(rank, place))
            turn = self._round
            self._arrived[rank] = value
            self._waiting.append(rank)
            self._place = place
            if len(self._waiting) == self._size:
                self._values, self._arrived = self._completed(self._arrived, place), [None] * self._size
                self._waiting, self._round = [], turn + 1
                if self._size > 1:
                    self._changed.notify_all()
                return self._values
            with span("wait for replicas"):
                self._changed.wait_for(lambda: self._round > turn or self._aborted, self._timeout)
            if self._round > turn:
                return self._values
            self._go_on()
            missing = [one for one in range(self._size) if one not in self._waiting]
            late = DeviceTimeoutError(
                f"{len(missing)} of {self._size} replicas did not reach {_in_words(place)} within {self._timeout} "
                f"seconds: {self._named(missing)}."
            )
            self.abort(late)  # a thread that arrives later would wait for this one, which leaves
            raise late

    def _completed(self, values: list[Any], place: object) -> list[Any]:
        """What all threads get, from their values in rank order. Called once per exchange, by the last thread."""
        return values

    def leave(self, rank: int) -> None:
        """Note that a thread has ended its work: whoever waits for it, now or later, gets the error at once."""
        with self._changed:
            self._gone.append(rank)
            if self._waiting and not self._aborted:
                self._parted = self._missed()
                self.abort(RuntimeError(self._parted))

    @property
    def timeout(self) -> float:
        """Seconds that one exchange may take."""
        return self._timeout

    @property
    def aborted(self) -> bool:
        """Whether `abort` was called."""
        return self._aborted

    def abort(self, cause: BaseException) -> None:
        """Wake all waiting threads, and refuse later ones, because a thread failed."""
        with self._changed:
            if not self._aborted and not self._over:
                self._cause = cause
            self._aborted = True
            if self._size > 1:
                self._changed.notify_all()

    def end(self) -> None:
        """Note that the step is over, and let go of what has aborted it.

        The traceback of an error holds all of its step. Torch's graphs may hold this object by references that Python's
        garbage collector does not see, and the step would then stay in memory for good.
        """
        with self._changed:
            self._over, self._cause = True, None

    def _go_on(self) -> None:
        """Raise if the threads do not exchange any more."""
        if self._parted:
            raise RuntimeError(self._parted)
        if self._aborted:
            raise StepAborted("The step was stopped by a failure on another device.") from self._cause

    def _part(self, how: str) -> None:
        """Give up, because the threads miss each other. Raises the error that all get."""
        self._parted = how
        error = RuntimeError(how)
        self.abort(error)
        raise error

    def _missed(self, rank: int | None = None, place: object = None) -> str:
        """The message: where the threads are."""
        where = [f"{self._named(self._waiting)} at {_in_words(self._place)}"] if self._waiting else []
        if rank is not None:
            where.append(f"{self._named([rank])} at {_in_words(place)}")
        if self._gone:
            where.append(f"{self._named(self._gone)} past the end")
        return (
            f"The replicas took different paths: {'; '.join(where)}. What replicas compute together, all of them must "
            "reach. A path must not depend on the values of a replica's own rows: choose it by values that are the "
            "same on all devices, or use one device (gpus=[0])."
        )

    def _named(self, ranks: Sequence[int]) -> str:
        return " and ".join(self._names[r] if self._names else f"replica {r}" for r in sorted(ranks))


def _in_words(place: object) -> str:
    return " ".join(str(part) for part in place) if isinstance(place, tuple) else str(place)
