"""Gradients that wait on their replicas for a later all-reduce: gradient accumulation."""

from __future__ import annotations

from collections.abc import Sequence

from fastdp.buffers import FlatBuffers
from fastdp.comm.base import Communicator
from fastdp.engine.replicas import Replica


class AccumulatedGradients:
    """On each replica, the sum of the gradients of steps that were not reduced.

    Args:
        replicas: all replicas of the engine.
        communicator: over their devices.

    A step's gradient stays in the replica's flat buffer. It is added to the sum once the step has succeeded on all
    replicas, so a failed step leaves the sums unchanged. The first `count` replicas hold a sum.
    """

    def __init__(self, replicas: Sequence[Replica], communicator: Communicator) -> None:
        self.count = 0
        self._replicas = list(replicas)
        self._communicator = communicator
        self._sums: list[FlatBuffers] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the sums of all replicas."""
        return sum(flat.nbytes for flat in self._sums)

    @property
    def sums(self) -> Sequence[FlatBuffers]:
        """The sums, in rank order."""
        return self._sums[: self.count]

    def hold(self, replicas: int) -> Sequence[FlatBuffers]:
        """Let the first replicas hold sums of zeros, which the caller writes. Only while nothing runs."""
        self._sums.clear()
        self.reserve(replicas)
        self.count = replicas
        return self._sums

    def take_over(self, held: Sequence[FlatBuffers]) -> None:
        """Let the replicas hold what those before them have held. Only while nothing runs."""
        if not held:
            return
        sums = self.hold(min(len(held), len(self._replicas)))
        for number, flat in enumerate(held):
            replica, total = self._replicas[number % len(sums)], sums[number % len(sums)]
            if number < len(sums):
                total.copy_from(flat)
            else:
                replica.accumulate(total, flat)

    def reserve(self, active: int) -> None:
        """Allocate the sums of the first `active` replicas. On the host thread, before the step."""
        for replica in self._replicas[len(self._sums) : active]:
            self._sums.append(FlatBuffers(replica.gradients.specs, replica.device))

    def keep(self, active: int) -> None:
        """Add the gradients of the first `active` replicas to the sums, after all replicas have made the update."""
        before = self.count

        def over() -> None:
            self.count = max(before, active)

        def add(replica: Replica, total: FlatBuffers) -> None:
            if replica.rank < before:
                replica.accumulate(total, replica.gradients)
            else:
                total.copy_from(replica.gradients)

        self._communicator.once(over)
        for replica, total in zip(self._replicas[:active], self._sums, strict=False):
            replica.device.compute.enqueue(lambda r=replica, t=total: add(r, t))  # type: ignore[misc]

    def hand_over(self, active: int) -> int:
        """Add the sums to the gradients of a step whose rows are on the first `active` replicas.

        Returns:
            The number n of replicas to reduce; they are the first n.
        """

        def give(replica: Replica, total: FlatBuffers) -> None:
            if replica.rank < active:
                replica.accumulate(replica.gradients, total)
            else:
                replica.gradients.copy_from(total)

        for replica, total in zip(self._replicas[: self.count], self._sums, strict=False):
            replica.device.compute.enqueue(lambda r=replica, t=total: give(r, t))  # type: ignore[misc]
        return max(active, self.count)

    def clear(self) -> None:
        """Drop the sums after all replicas have used them."""

        def over() -> None:
            self.count = 0

        if self.count:
            self._communicator.once(over)
