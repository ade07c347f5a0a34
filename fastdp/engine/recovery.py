"""The end of a step: waits for all devices, and cleans up after a step that failed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress

from fastdp.comm.base import Communicator
from fastdp.engine.replicas import ReplicaGroup
from fastdp.engine.rollback import Rollback
from fastdp.engine.state import EngineState
from fastdp.engine.step import Operation, step_error
from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.positions import busy, report
from fastdp.runtime.queue import QueueDevice, QueueEvent, first_done, joined
from fastdp.tracing.spans import now, span
from fastdp.warn import warn_user

PATIENCE = 10.0  # seconds to wait for a step that its caller has left


class Recovery:
    """Waits for the operations of one engine, and cleans up after those that failed.

    Args:
        state: the engine's state.
        replicas: the engine's replicas.
        communicator: over their devices.
        rollback: the snapshot of the first replica.

    Attributes:
        without: devices of their own that hang, and that nobody waits for any more.
    """

    def __init__(
        self, state: EngineState, replicas: ReplicaGroup, communicator: Communicator, rollback: Rollback
    ) -> None:
        self._state, self._replicas = state, replicas
        self._communicator, self._rollback = communicator, rollback
        self.without: frozenset[QueueDevice] = frozenset()

    def finish(self, operation: Operation) -> None:
        """Wait until all devices are done.

        Raises:
            BaseException: a replica failed (`step_error`). The operation has been cleaned up.
            DeviceTimeoutError: the devices were not done in time. The next step cleans up.
        """
        devices = self._replicas.devices
        if operation.here and not devices[0].has_work:  # all of it has run
            self._finish(operation, [devices[0].compute.failure])
            return
        events = operation.ends or [device.compute.record() for device in devices]
        try:
            if now.recorder is None:
                self._wait(operation, events)
            else:
                with span("wait for devices"):
                    self._wait(operation, events)
        except DeviceTimeoutError as error:
            raise self.too_late(operation, getattr(error, "found", None)) from None
        self._finish(operation, [event.error for event in events])

    def _finish(self, operation: Operation, errors: Sequence[BaseException | None]) -> None:
        """As `finish`, when the devices are done, with these failures of their compute streams."""
        failed = [(rank, error) for rank, error in enumerate(errors) if error is not None]
        if failed or operation.failures:
            self.settle()
            raise step_error([*operation.failures, *failed], operation, self._replicas.devices)
        self._communicator.check()
        # Only now: a replica that updates its part must not go without a snapshot because another one was quick.
        self._rollback.succeeded = self._rollback.succeeded or bool(operation.updates_done)
        if operation.skipped and operation.check is not None:
            operation.check.note(operation)

    def _wait(self, operation: Operation, events: Sequence[QueueEvent]) -> None:
        timeout = self._state.timeout
        if operation.ends:
            first_done(events, timeout)
        elif operation.reduction is not None:
            operation.reduction.serve(joined(events), timeout)
        else:
            joined(events).finish(timeout)

    def too_late(self, operation: Operation, found: str | None = None) -> DeviceTimeoutError:
        """The error of an operation that has taken too long. `found`: where all threads were, if they have gone on."""
        devices, late = self._replicas.devices, self._communicator.late()
        what = operation.unfinished(devices, late)
        collective = operation.reduction.position if operation.reduction is not None else ""
        return DeviceTimeoutError(
            f"{what} took longer than timeout={self._state.timeout} seconds.{collective}{found or report(devices)}"
        )

    def card_failed(self, operation: Operation, error: BaseException) -> None:
        """Let the other devices stop waiting for one that has failed, in collectives that it will not end."""
        operation.abandon(error)
        self._communicator.abort()

    def abandon(self, operation: Operation, error: BaseException) -> None:
        """Stop an operation that nobody waits for any more. The next operation cleans up.

        Called after a replica failed, a timeout, an interrupt of this thread, or when a device was closed.
        """
        operation.abandon(error)
        home, late = self._replicas.home.home, isinstance(error, DeviceTimeoutError)
        if late:
            self._communicator.abort()
        cut_short = operation.cut_short != self._communicator.cut_short
        if self._state.unsettled is operation and operation.generation == home.generation:
            # The update waits behind a collective on GPUs, and runs when that is given up.
            devices = self._replicas.devices
            home.doubtful = cut_short or (late and devices[0].on_gpu and len(devices) > 1)
        self._replicas.doubt()
        for device in self._replicas.devices:
            device.unsettled = True
            if device.settle() is None:
                device.settle = weakref.WeakMethod(self.settle)

    def end(self, error: BaseException) -> None:
        """Wait for an operation that its caller leaves, so that it changes nothing behind the caller's back.

        Ctrl-C, and an error of a data set, come while the devices are at work. Whoever catches them and saves the model
        gets the weights before the step or after it. A second Ctrl-C ends the wait.
        """
        if self._state.unsettled is None or isinstance(error, DeviceTimeoutError):
            return
        seconds = min(PATIENCE, self._state.timeout)
        with suppress(RuntimeError):  # no collective can run any more: the next step says so, this error comes first
            try:
                self.settle(seconds)
            except DeviceTimeoutError:
                warn_user(
                    f"fastdp: a step was left by {type(error).__name__}, and devices are still at work on it after "
                    f"{seconds:g} seconds. Until they are done the weights may change; the next step waits for them."
                )

    def prepare(self, operation: Operation) -> None:
        """Clean up before an operation if another was abandoned, of this engine or of another on the same devices.

        Raises:
            RuntimeError: an update used sums of a collective that was cut short, and cannot be taken back.
            DeviceTimeoutError: a device is still busy.
        """
        needed = self._state.unsettled is not None
        others = []
        for device in self._replicas.devices:
            needed = needed or device.unsettled
            settle = device.settle()
            if settle is not None and settle != self.settle:
                others.append(settle)
        for settle in dict.fromkeys(others):  # before anybody goes on from weights that it may share
            settle(self._state.timeout)
        if needed:
            self.settle()
        if self._replicas.home.home.doubtful:
            raise RuntimeError(
                "The weights and the optimizer's slots of this model may be wrong: an all-reduce was given up while "
                "its update waited for it, or a device failed in the middle of updating its part. Build the model "
                "again, load a checkpoint, and wrap it."
            )
        operation.cut_short = self._communicator.cut_short

    def settle(self, timeout: float | None = None) -> None:
        """Wait until the devices are idle, and roll back an update that some replicas have not made, or made of sums of
        a collective that was given up.

        Args:
            timeout: of another engine that is about to run on some of the devices; None for this engine's own.

        Raises:
            DeviceTimeoutError: a device is still busy.
            RuntimeError: no collective can run any more.
        """
        seconds = self._state.timeout if timeout is None else timeout
        try:
            for device in self._waited:
                if timeout is None or not device.closed:
                    device.synchronize(seconds)
        except DeviceTimeoutError:
            devices = self._replicas.devices
            late = self._communicator.late() or busy(devices)
            raise DeviceTimeoutError(
                f"{late} were not done with an earlier step within another timeout={seconds} seconds, and the other "
                f"devices wait for them.{report(devices)}"
            ) from None
        for device in self._waited:
            device.recover()
        try:
            self._communicator.recover()
        except RuntimeError:
            for device in self._replicas.devices:
                device.unsettled = True
            raise
        left, self._state.unsettled = self._state.unsettled, None
        home = self._replicas.home
        # If the generation differs, another engine has continued from the home's values.
        if left is None or home.home.generation != left.generation:
            return
        wrong = left.updates_begun and left.cut_short != self._communicator.cut_short
        short = left.updates_begun and len(left.updates_done) < len(left.updating)
        home.home.doubtful = (wrong or (short and self._replicas.in_parts)) and not left.restorable
        if not left.updates_begun:
            return
        if left.restorable and (wrong or short):
            self._rollback.restore(self._replicas.every, left.generation)
        elif home.apart and not left.came_home:  # all replicas continue from the first
            home.home.variables.copy_from(self._replicas.every[0].memory.variables)

    @property
    def _waited(self) -> list[QueueDevice]:
        """The devices that are waited for."""
        return [device for device in self._replicas.devices if (device.part_of or device) not in self.without]
