"""A replica: one program bound to one device and its memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdp.buffers import FlatBuffers, Memory
from fastdp.comm.context import Context
from fastdp.program.base import Program, Result, Totals
from fastdp.runtime.queue import QueueDevice


class Replica:
    """A copy of a program's state on a device, and the calls that run there.

    Args:
        program: what to run.
        device: where.
        rank: place among the replicas; it orders rows and sums.
        memory: the replica's flat buffers, on `device`.
    """

    def __init__(self, program: Program, device: QueueDevice, rank: int, memory: Memory) -> None:
        self.device = device
        self.rank = rank
        self.memory = memory
        self._program = program
        self._state = program.bind(memory, device, rank)

    @property
    def gradients(self) -> FlatBuffers:
        """The gradient of this replica's contribution; of the whole batch once reduced."""
        return self.memory.gradients

    @property
    def lasting(self) -> tuple[FlatBuffers, FlatBuffers]:
        """What lasts from step to step: variables and slots."""
        return self.memory.variables, self.memory.slots

    def prepare_thread(self, threads: int) -> None:
        """Let the device's worker use `threads` cores in one operation. Runs there, before each step's work."""
        self._program.prepare_thread(threads, self.device)

    def train(self, batch: list[np.ndarray], context: Context) -> Result:
        """Forward, loss and backward. Runs on the device's worker."""
        return self._program.train(self._state, batch, context)

    def predict(self, batch: list[np.ndarray], context: Context) -> Result:
        """Forward only. Runs on the device's worker."""
        return self._program.predict(self._state, batch, context)

    def update(self, totals: Totals) -> None:
        """Apply the reduced gradients. Runs on the device's worker."""
        self._program.update(self._state, totals)

    @property
    def update_is_reliable(self) -> bool:
        """Whether none of the user's code runs in an update."""
        return self._program.update_is_reliable

    def rehearse_update(self) -> bool:
        """Try the update on copies; whether that could be done. Runs on the device's worker."""
        return self._program.rehearse_update(self._state)

    def accumulate(self, total: FlatBuffers, part: FlatBuffers) -> None:
        """Add `part` to `total`. Runs on the device's worker."""
        self._program.accumulate(total, part)

    def fold(self) -> None:
        """Take over reduced gradients into the slots. Runs on the device's worker."""
        self._program.fold(self._state)


def assert_equal(replicas: Sequence[Replica], buffers: Sequence[str], step: int) -> None:
    """Compare all replicas with the first, bit by bit, in these buffers of their memory; see DataParallel."""
    first = replicas[0]
    for replica in replicas[1:]:
        for what in buffers:
            if not getattr(first.memory, what).equals(getattr(replica.memory, what)):
                raise RuntimeError(
                    f"The {what} on {replica.device.name} differ from those on {first.device.name} "
                    f"after step {step}. This is a bug in fastdp or in the program's update."
                )
