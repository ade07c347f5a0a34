"""The locks and scopes around a step, and what happens to a step that nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any

from fastdp.engine.step import Step, StepResult
from fastdp.errors import DeviceTimeoutError

# Steps of different engines that share devices must not interleave: replicas block in exchanges.
one_step_at_a_time = threading.RLock()


_here = threading.local()


def meanwhile(step: Step, work: Callable[[], object], end: Callable[[], StepResult]) -> None:
    """Run `work()` on this thread while a step, all of whose work is enqueued, runs on the devices.

    If `work()` itself begins a step, of this or another model, as a data set may that asks the model: then `end()`
    waits for the present one first, and its outcome is kept for the thread when it comes back.
    """
    _here.open = (step, end)
    try:
        work()
    finally:
        _here.open = None


def _end_open_step() -> None:
    """End the step in the middle of which this thread begins another one."""
    opened, _here.open = getattr(_here, "open", None), None
    if opened is None:
        return
    step, end = opened
    try:
        step.outcome = end()
    # Kept whatever it is: it belongs to the caller of that step, who is told when the present work is over.
    except BaseException as error:  # noqa: BLE001
        step.error = error
    step.over = True
    step.scope.close(step.error)


@contextmanager
def alone(timeout: float = 1800.0) -> Iterator[None]:
    """While it lasts no engine of this process runs a step. One that this thread has open is ended first.

    Raises:
        DeviceTimeoutError: a step took longer than `timeout` seconds.
    """
    _end_open_step()
    if not one_step_at_a_time.acquire(timeout=timeout):
        raise DeviceTimeoutError(f"Another model kept the devices busy for {timeout} seconds.")
    try:
        yield
    finally:
        one_step_at_a_time.release()


class StepScope(AbstractContextManager[Step]):
    """Holds the locks of one step and the program's own scope, and brings stale replicas up to date.

    A part of the engine (`fastdp.engine.data_parallel.DataParallel`), whose state it reads and sets.
    """

    def __init__(self, engine: Any, step: Step, trains: bool) -> None:
        self._engine = engine
        self._step = step
        self._trains = trains
        self._held = ExitStack()
        self._closed = False

    def __enter__(self) -> Step:
        engine = self._engine
        _end_open_step()
        self._step.scope = self
        self._take()
        try:
            if not one_step_at_a_time.acquire(timeout=engine.timeout):
                raise TimeoutError(f"Another model kept the devices busy for {engine.timeout} seconds.")
            try:
                self._prepare()
            except BaseException as error:
                self._abandon(error)
                one_step_at_a_time.release()
                raise
        except BaseException:
            self._leave()
            raise
        return self._step

    def _take(self) -> None:
        """Wait until the engine is free. Two threads that train one model are a mistake, and told so at once.

        Raises:
            RuntimeError: another thread is training this model.
            DeviceTimeoutError: the engine was not free in time.
        """
        engine = self._engine
        if not engine._busy.acquire(blocking=False):
            if self._trains and engine._training:
                raise RuntimeError(
                    "This model is already running a step in another thread. Train one parallel model from one thread "
                    "at a time."
                )
            if not engine._busy.acquire(timeout=engine.timeout):
                raise DeviceTimeoutError(f"Another thread kept this model busy for {engine.timeout} seconds.")
        engine._training = self._trains

    def _leave(self) -> None:
        """Free the engine. Whoever takes it next has not said yet that it trains: the note of this step goes first."""
        self._engine._training = False
        self._engine._busy.release()

    def _prepare(self) -> None:
        """Clean up after a step that nobody waited for, and refresh replicas that are stale."""
        engine = self._engine
        threads = self._step.threads
        # Left by this engine, or by another one on the same devices.
        if engine._unsettled is not None or any(device.unsettled for device in engine.devices):
            engine._settle()
        engine._unsettled = self._step
        # Both are asked: the second also re-adopts variables whose memory was replaced.
        changed = engine.program.changed_outside()
        if changed:  # `committed()` forgets it: the number tells the other engines on this home
            engine._home.generation += 1
        if engine._generation != engine._home.generation:
            engine.refresh()
        self._held.enter_context(engine.program.running(threads))
        if len(engine.devices) == 1 and not engine.devices[0].on_gpu:
            # This thread would only wait for the worker. Torch's operations on several cores also want to be those of
            # one thread, whose helpers stay awake for them; with a second one they are put to sleep.
            self._held.enter_context(engine.devices[0].lend())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None) -> None:
        """End the step; `error` says how it failed. Only the first call counts."""
        if self._closed:
            return
        self._closed = True
        self._step.scope = None  # no cycle: what the step holds goes when its caller drops it
        engine = self._engine
        try:
            if error is None:
                engine._unsettled = None
            else:
                self._abandon(error)
            # What is held is told of a failure, which goes its own way.
            self._held.__exit__(None if error is None else type(error), error, None)
        finally:
            engine.steps += 1
            one_step_at_a_time.release()
            self._leave()

    def _abandon(self, error: BaseException) -> None:
        """Nobody waits for this step any more: stop what still runs, and let the next one clean up.

        After a failure of a replica, a timeout, an interrupt of this thread, or a device that is closed.
        """
        self._step.rendezvous.abort(error)
        if self._step.reduction is not None:
            self._step.reduction.abandon(error)
        self._engine._generation = -1
        for device in self._engine.devices:
            device.unsettled = True
