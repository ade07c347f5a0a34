"""What callers do with gradients that wait on the replicas: read them, set them, fold them, or end their window."""

from __future__ import annotations

from collections.abc import Sequence

from fastdp.buffers import FlatBuffers
from fastdp.engine.accumulation import AccumulatedGradients
from fastdp.engine.fingerprint import FingerprintWriter
from fastdp.engine.recovery import Recovery
from fastdp.engine.reductions import Reductions
from fastdp.engine.replicas import Replica, ReplicaGroup
from fastdp.engine.state import EngineState
from fastdp.engine.step import Operation
from fastdp.engine.step_scope import StepScope
from fastdp.engine.updates import Updates
from fastdp.program.base import Program, Totals


class WaitingGradients:
    """Gives an engine its operations on accumulated gradients. The attributes are the engine's."""

    replicas: Sequence[Replica]
    group: ReplicaGroup
    check_replicas: bool
    _program: Program
    _state: EngineState
    _recovery: Recovery
    _accumulation: AccumulatedGradients
    _reductions: Reductions
    _updates: Updates
    _fingerprint: FingerprintWriter | None

    @property
    def holds_gradients(self) -> bool:
        """Whether replicas hold accumulated gradients, or may hold some once an abandoned step has ended."""
        return self._accumulation.count > 0 or self._state.unsettled is not None

    def accumulated(self) -> Sequence[FlatBuffers]:
        """The sums of gradients that wait for a step that reduces: one of each replica that has any, in rank order.

        They are the engine's, on the replicas' devices, and valid until the next step.
        """
        with self._idle():
            return self._accumulation.sums

    def hold(self, replicas: int) -> Sequence[FlatBuffers]:
        """Drop the gradients that wait, and let the first replicas hold others.

        Returns:
            One buffer of zeros for each of these replicas, on its device. The caller writes the gradients there.
        """
        with self._idle():
            return self._accumulation.hold(replicas)

    def end_window(self, totals: Totals) -> bool:
        """Reduce the accumulated gradients now, and run an update by them without another batch.

        Args:
            totals: what the program's `update` gets.

        Returns:
            Whether there were accumulated gradients. If not, there is no update.

        Raises:
            ReplicaError, DeviceTimeoutError: as in `train`. The gradients still wait.
        """
        cores = self._program.cores
        operation = Operation(max(1, cores // len(self.replicas)), cores, "update", trains=True, totals=totals)
        with StepScope(self._state, self._recovery, self.group, operation):
            sources = self._accumulation.hand_over(0)
            if not sources:
                return False
            self._reductions.reduce(sources)
            self._updates.begin(operation)
            self._recovery.finish(operation)
            self._program.committed()
            if self.check_replicas:
                self.group.assert_equal(self._state.steps)
            if self._fingerprint is not None:
                self._fingerprint.add("update", totals)
        return True

    def fold(self) -> None:
        """Reduce the accumulated gradients now, and let the program move them into its slots.

        Raises:
            ReplicaError, DeviceTimeoutError: as in `train`.
        """
        with self._idle() as folding:
            sources = self._accumulation.hand_over(0)
            if not sources:
                return
            self._reductions.reduce(sources)
            for replica in self.group.updating:
                replica.device.compute.enqueue(replica.fold)
            self._accumulation.clear()
            self.group.home.follow(self.replicas[0].memory.variables, folding.note_home)
            self.group.advance()
            self._recovery.finish(folding)
            self._program.committed()

    def _idle(self) -> StepScope[Operation]:
        """A scope in which nothing runs on the devices, and what an abandoned step has left is cleaned up."""
        cores = self._program.cores
        return StepScope(self._state, self._recovery, self.group, Operation(cores, cores))
