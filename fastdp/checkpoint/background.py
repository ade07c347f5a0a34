"""Runs one piece of work at a time in a thread of its own, and hands its failure to whoever comes next."""

from __future__ import annotations

import threading
from collections.abc import Callable

NAME = "fastdp-checkpoint"


class Background:
    """At most one piece of work at a time. Its thread ends with it, so between two pieces there is none.

    The thread is no daemon: a process that ends, even by an error, ends after the work that it has begun.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, after the one that is under way.

        Raises:
            BaseException: what the one before has failed with. The new one has not begun.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name=NAME)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the work under way.

        Raises:
            BaseException: what it has failed with, once.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @property
    def failed(self) -> bool:
        """Whether the work has failed, and nobody has been told."""
        return self._failure is not None

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the thread that trains raises it
            self._failure = error
