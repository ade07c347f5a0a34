"""The locks and scopes around a step, and the handling of a step that is interrupted by another one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import Generic, TypeVar

from fastdp.engine.recovery import Recovery
from fastdp.engine.replicas import ReplicaGroup
from fastdp.engine.state import EngineState
from fastdp.engine.step import Operation, Step, StepResult
from fastdp.engine.step_lock import StepLock
from fastdp.errors import DeviceTimeoutError, OthersBusyError
from fastdp.options import Options
from fastdp.runtime.events import here
from fastdp.runtime.host.resources import CORES
from fastdp.runtime.host_worker import in_place_of_worker
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.scopes import Scopes
from fastdp.tracing.spans import Recorder, now
from fastdp.warn import warn_user

# Steps of different engines that share devices must not interleave: replicas block in exchanges.
one_step_at_a_time = StepLock()

OperationT = TypeVar("OperationT", bound=Operation)


class _Here(threading.local):
    """The step that this thread has open while it does something else, and the call that ends it."""

    open: tuple[Step, Callable[[], StepResult]] | None = None


_here = _Here()


def meanwhile(step: Step, work: Callable[[], object], end: Callable[[], StepResult]) -> None:
    """Run `work()` on this thread while a fully enqueued step runs on the devices.

    `work()` may itself begin a step of this or another model, such as a data set that calls the model. In that case
    `end()` first waits for the current step, and its outcome is kept until `work()` returns.
    """
    _here.open = (step, end)
    step.watch.verb = "while running"
    try:
        work()
    finally:
        _here.open = None


def _end_open_step() -> None:
    """End the step that this thread has open, since it begins another one."""
    opened, _here.open = _here.open, None
    if opened is None:
        return
    step, end = opened
    try:
        step.outcome = end()
    # Any error is kept: it belongs to the caller of that step, and is raised there when the current work is over.
    except BaseException as error:  # noqa: BLE001
        step.error = error
    step.over = True
    assert step.close is not None, "a step that is open has a scope"
    step.close(step.error)


def _check_not_inside() -> None:
    """Check that this thread is not a part of a step, which another step would have to wait for.

    On one virtual device a step runs on the thread that holds the lock, and may have others inside. On several, the
    first one's part does, and the others would wait for it.

    Raises:
        RuntimeError: it is.
    """
    if getattr(here, "worker", False) and (getattr(here, "serving", False) or one_step_at_a_time.is_held_by_others()):
        raise RuntimeError(
            "A parallel model was called inside a step of a parallel model (in forward, a loss function, an "
            "optimizer or a hook), on one of the devices that it would wait for. Call the plain module there, such "
            "as `model.module`; or write the loop, where loss functions run outside steps."
        )


def _wait_for_others(devices: Sequence[QueueDevice] | None, timeout: float) -> None:
    """Wait until no other engine runs a step that must be over before one on these devices; None: any step.

    Raises:
        DeviceTimeoutError: a step took longer than `timeout` seconds.
    """
    if not one_step_at_a_time.acquire(devices, timeout):
        which = "the devices" if devices is None else " or ".join(dict.fromkeys(device.name for device in devices))
        raise DeviceTimeoutError(f"Another model kept {which} busy for timeout={timeout} seconds.")


@contextmanager
def turn_of(devices: Sequence[QueueDevice], timeout: float) -> Iterator[None]:
    """Keep other engines from running a step on these devices.

    Raises:
        DeviceTimeoutError: a step took longer than `timeout` seconds.
    """
    _wait_for_others(devices, timeout)
    try:
        yield
    finally:
        one_step_at_a_time.release()


@contextmanager
def alone(timeout: float = 1800.0, *, patient: bool = True) -> Iterator[None]:
    """Keep all engines of this process from running a step. A step that this thread has open is ended first.

    Args:
        timeout: seconds to wait for steps, where `patient`.
        patient: False does not wait for a step that may hang. True warns of one.

    Raises:
        RuntimeError: this thread is a part of a step.
        OthersBusyError: a step of another thread may hang, or took longer than `timeout` seconds.
    """
    _check_not_inside()
    _end_open_step()
    patience = one_step_at_a_time.patience
    if not one_step_at_a_time.acquire(None, min(patience, timeout)):
        if not patient:
            raise OthersBusyError("a step of another model does not end, and nothing can be captured beside it")
        _wait_out(timeout, min(patience, timeout))
    try:
        yield
    finally:
        one_step_at_a_time.release()


def _wait_out(timeout: float, waited: float) -> None:
    """Take the lock alone after a step that may hang, and tell of the wait.

    Raises:
        OthersBusyError: it did not end.
    """
    if waited < timeout:
        warn_user(
            "fastdp: a step of another model has not ended for some seconds. This model is to capture its step now, "
            f"beside which nothing may run, so it waits, at most timeout={timeout} seconds. With shards= or "
            "deterministic=True it may not run the step in another form, which could change bits."
        )
    if not one_step_at_a_time.acquire(None, timeout - waited):
        raise OthersBusyError(
            f"Another model has kept its devices busy for timeout={timeout} seconds, and this one must capture its "
            "step now. Nothing has changed; the next step tries again."
        )


@contextmanager
def between_steps(devices: Sequence[QueueDevice], timeout: float) -> Iterator[None]:
    """Keep other engines from running a step on these devices. A step that this thread has open is ended first.

    Raises:
        RuntimeError: this thread is a part of a step.
        DeviceTimeoutError: a step took longer than `timeout` seconds.
    """
    _check_not_inside()
    _end_open_step()
    with turn_of(devices, timeout):
        yield


def alone_for(options: Options, *, records: bool = False) -> Callable[[], AbstractContextManager[None]]:
    """`alone` as a model with these options captures its steps, or records them as CUDA graphs.

    A capture can wait until a step that may hang is over, and steps stay eager until then. With `deterministic=True`
    their number decides, so they wait, as recordings do.
    """
    return partial(alone, options.timeout, patient=options.deterministic or records)


class StepScope(AbstractContextManager[OperationT], Generic[OperationT]):
    """Holds the locks and the program's own scope during one operation, and refreshes stale replicas before it.

    Args:
        state: the engine's state.
        recovery: cleans up after operations that failed.
        replicas: the engine's replicas.
        operation: a step, or the folding of gradients.
    """

    def __init__(self, state: EngineState, recovery: Recovery, replicas: ReplicaGroup, operation: OperationT) -> None:
        self._state, self._recovery, self._replicas = state, recovery, replicas
        self._operation = operation
        self._scopes = Scopes()
        self._closed = False
        self._recorder: Recorder | None = None

    def __enter__(self) -> OperationT:
        _check_not_inside()
        _end_open_step()
        operation = self._operation
        self._state.take(trains=operation.trains)
        try:
            _wait_for_others(self._replicas.devices, self._state.timeout)
            try:
                recorder = now.recorder
                if recorder is not None:
                    self._begin_trace(recorder)
                self._prepare()
            except BaseException as error:
                self._recovery.abandon(operation, error)
                try:
                    self._scopes.leave()
                finally:
                    one_step_at_a_time.release()
                if self._recorder is not None:
                    self._end_trace(self._recorder, error)
                raise
        except BaseException:
            self._state.leave()
            raise
        operation.close = self.close
        return operation

    def _prepare(self) -> None:
        """Clean up after an abandoned step, and refresh stale replicas."""
        operation, devices = self._operation, self._replicas.devices
        self._recovery.prepare(operation)
        self._state.unsettled = operation
        # With cores to spare the workers have one each, and this thread sums buckets meanwhile.
        # Shards of one device take turns among workers.
        spare = devices[0].on_gpu or devices[0].part_of is not None or len(devices) < max(CORES, 2)
        if not spare and self._replicas.program.first_may_run_here and self._state.fetches_fast:
            self._scopes.enter(in_place_of_worker(devices[0]))
        self._replicas.bring_up_to_date(operation.active or len(self._replicas.every))
        self._scopes.enter(self._replicas.program.running(self._operation.threads))
        if len(devices) == 1 and not devices[0].on_gpu:
            # This thread would only wait for the worker, so it takes the worker's place. Torch's helper threads also
            # stay awake only while a single thread uses them.
            mine = self._scopes.enter(devices[0].lend())
            operation.here = (
                mine and self._recorder is None and isinstance(operation, Step) and operation.across is None
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None) -> None:
        """End the operation, with the error if it failed. Only the first call has an effect."""
        if self._closed:
            return
        self._closed = True
        self._operation.close = None  # breaks a reference cycle, so that the step's memory is freed at once
        try:
            self._end(error)
        finally:
            self._operation.end()
            self._state.steps += self._operation.counts
            one_step_at_a_time.release()
            self._state.leave()
            if self._recorder is not None:
                self._end_trace(self._recorder, error)

    def _end(self, error: BaseException | None) -> None:
        """Leave the scopes, which see the failure and cannot suppress it, once the devices are done."""
        try:
            if error is None:
                self._state.unsettled = None
            else:
                self._recovery.abandon(self._operation, error)
                self._recovery.end(error)
        finally:
            self._scopes.leave(error)

    def _begin_trace(self, recorder: Recorder) -> None:
        """Tell traces that this operation begins."""
        self._recorder = recorder
        operation, program = self._operation, self._replicas.program
        facts: dict[str, object] = {"program": type(program).__name__}
        if isinstance(operation, Step):
            facts["rows"] = operation.batch.rows
        recorder.step_begins(program, operation.kind, self._state.steps, facts)

    def _end_trace(self, recorder: Recorder, error: BaseException | None) -> None:
        """Tell traces that it is over. They may write their files now."""
        self._recorder = None
        recorder.step_ends(self._replicas.program, self._operation.kind, error)
