"""The end of a step: waits for all devices, and cleans up after a step that failed."""

from __future__ import annotations

from fastdp.comm.base import Communicator
from fastdp.engine.replicas import ReplicaGroup
from fastdp.engine.rollback import Rollback
from fastdp.engine.state import EngineState
from fastdp.engine.step import Operation, step_error
from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.queue import joined


class Recovery:
    """Waits for the operations of one engine, and cleans up after those that failed.

    Args:
        state: the engine's state.
        replicas: the engine's replicas.
        communicator: over their devices.
        rollback: the snapshot of the first replica.
    """

    def __init__(
        self, state: EngineState, replicas: ReplicaGroup, communicator: Communicator, rollback: Rollback
    ) -> None:
        self._state, self._replicas = state, replicas
        self._communicator, self._rollback = communicator, rollback

    def finish(self, operation: Operation) -> None:
        """Wait until all devices are done.

        Raises:
            ReplicaError: a replica failed. The operation has been cleaned up.
            DeviceTimeoutError: the devices were not done in time. The next step cleans up.
        """
        devices, timeout = self._replicas.devices, self._state.timeout
        events = [device.compute.record() for device in devices]
        try:
            if operation.reduction is not None:
                operation.reduction.serve(joined(events), timeout)
            else:
                joined(events).finish(timeout)
        except DeviceTimeoutError:
            what = operation.unfinished(devices)
            raise DeviceTimeoutError(f"{what} took longer than timeout={timeout} seconds.") from None
        failed = [(rank, event.error) for rank, event in enumerate(events) if event.error is not None]
        if failed:
            self.settle()
            raise step_error(operation.failures or failed, operation, devices)
        self._communicator.check()

    def abandon(self, operation: Operation, error: BaseException) -> None:
        """Stop an operation that nobody waits for any more. The next operation cleans up.

        Called after a replica failed, a timeout, an interrupt of this thread, or when a device was closed.
        """
        operation.abandon(error)
        self._replicas.doubt()
        for device in self._replicas.devices:
            device.unsettled = True

    def settle_if_needed(self) -> None:
        """Clean up after an abandoned operation of this engine, or of another engine on the same devices."""
        needed = self._state.unsettled is not None
        for device in self._replicas.devices:
            needed = needed or device.unsettled
        if needed:
            self.settle()

    def settle(self) -> None:
        """Wait until the devices are idle, and roll back an update that some replicas have not made."""
        for device in self._replicas.devices:
            device.synchronize(self._state.timeout)
        for device in self._replicas.devices:
            device.recover()
        self._communicator.recover()
        left, self._state.unsettled = self._state.unsettled, None
        home = self._replicas.home
        # If the generation differs, another engine has continued from the home's values.
        if left is None or not left.updates_begun or home.home.generation != left.generation:
            return
        if left.restorable and len(left.updates_done) < len(left.updating):
            self._rollback.restore(self._replicas.every)
        elif home.apart and not left.came_home:  # all replicas continue from the first
            home.home.variables.copy_from(self._replicas.every[0].memory.variables)
