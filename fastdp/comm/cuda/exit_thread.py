"""A thread for what may block when the process ends. It is started before: Python 3.12 starts none at its end."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["ExitThread"]


class _Task:
    """What one thread waits for, and what it does then."""

    def __init__(self) -> None:
        self.work: Callable[[], object] | None = None
        self.asked, self.done = threading.Event(), threading.Event()

    def serve(self) -> None:
        """The thread's life."""
        self.asked.wait()
        if self.work is not None:
            self.work()
        self.done.set()


class ExitThread:
    """One idle thread between `start` and `stop`. Both may be called again, from any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._task: _Task | None = None

    def start(self) -> None:
        """Have the thread ready."""
        with self._lock:
            if self._task is None:
                self._task = _Task()
                threading.Thread(target=self._task.serve, name=self._name, daemon=True).start()

    def stop(self) -> None:
        """End the thread, if there is one and it has nothing to do."""
        task = self._take()
        if task is not None:
            task.asked.set()

    def run(self, work: Callable[[], object], seconds: float) -> bool:
        """Run `work()` on the thread, or here if there is none. False if it takes longer than its seconds."""
        task = self._take()
        if task is None:
            work()
            return True
        task.work = work
        task.asked.set()
        return task.done.wait(seconds)

    def _take(self) -> _Task | None:
        with self._lock:
            task, self._task = self._task, None
            return task
