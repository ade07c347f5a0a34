"""Runs many small jobs, such as decoding chunks, in a few threads of the process that all readers share."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from fastdp.runtime import forks
from fastdp.runtime.host.resources import CORES

Job = Callable[[], None]

# More threads than this read no faster from one disk, and each holds a decoded chunk.
MOST_THREADS = 16


def thread_count() -> int:
    """The processor cores that this process may use, at most 16."""
    return min(CORES, MOST_THREADS)


class JobThreads:
    """Threads that share the jobs of each `run` with the thread that calls it.

    Args:
        count: how many threads work, with the calling one.
        name: the beginning of the names of the others.

    Threads begin with the first run, and end when nobody uses them: `use` and `release` count who does. Where nobody
    ever calls `use`, they end with the process.
    """

    def __init__(self, count: int, name: str = "fastdp-read") -> None:
        self.count = count
        self._name = name
        # A finalizer may call `release` in a thread that is inside `_submit`.
        self._lock = threading.RLock()
        self._pool: ThreadPoolExecutor | None = None
        self._users = 0
        forks.watch(self)

    def use(self) -> None:
        """One more object reads by these threads."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """One of them is gone; with the last one, the threads end. Any thread may call this, and none is waited for."""
        with self._lock:
            self._users -= 1
            pool, self._pool = (None, self._pool) if self._users else (self._pool, None)
        if pool is not None:
            pool.shutdown(wait=False)

    def run(self, jobs: Iterable[Job], most: int = MOST_THREADS) -> None:
        """Run all jobs, and return when none runs any more. The first error of a job is raised; later jobs are dropped.

        At most `most` jobs run at once. The calling thread works too, so that `run` may be called by many threads, and
        inside a job.
        """
        waiting = deque(jobs)
        helpers: list[Future[None]] = []
        if self.count > 1 and len(waiting) > 1:
            helpers = self._submit(waiting, min(self.count, most, len(waiting)) - 1)
        try:
            _drain(waiting)
        finally:
            waiting.clear()
            # A helper that has not begun finds no job; it is not waited for.
            errors = [helper.exception() for helper in helpers if not helper.cancel()]
        try:
            for error in errors:
                if error is not None:
                    raise error
        finally:
            # An error holds this frame: without a cycle, who read is gone as soon as the error is.
            del errors, helpers

    def after_fork(self) -> None:
        """A forked child has none of the threads: begin anew."""
        self._lock = threading.RLock()
        self._pool = None

    def _submit(self, waiting: deque[Job], count: int) -> list[Future[None]]:
        """Have other threads take jobs too."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.count - 1, self._name)
            return [self._pool.submit(_drain, waiting) for _ in range(count)]


def _drain(waiting: deque[Job]) -> None:
    """Run jobs until none waits; after an error no other thread takes one either."""
    while True:
        try:
            job = waiting.popleft()
        except IndexError:
            return
        try:
            job()
        except BaseException:
            waiting.clear()
            raise


SHARED = JobThreads(thread_count())
