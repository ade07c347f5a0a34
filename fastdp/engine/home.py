"""The memory of the model's own weights, and copies between it and the first replica if the two lie apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdp.buffers import FlatBuffers
from fastdp.comm.base import Communicator
from fastdp.program.base import Program
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.select import warn_of_relocation


class HomeMemory:
    """A program's home, which may lie apart from the first device: in host memory, or on another card.

    Args:
        program: the program that owns the home.
        devices: the engine's devices.
        communicator: over these devices.
        on_host: put the home in host memory. A home that an earlier engine has made stays where it is.

    A home in the first device's memory is the first replica's memory itself, and needs no copies.
    """

    def __init__(
        self, program: Program, devices: Sequence[QueueDevice], communicator: Communicator, *, on_host: bool
    ) -> None:
        self.home = program.home(devices[0].host_home() if on_host else devices[0])
        self.apart = self.home.device.space != devices[0].space
        self._communicator = communicator
        warn_of_relocation(on_host and self.home.device.on_gpu, devices)

    def variables(self, rank: int, device: QueueDevice) -> FlatBuffers:
        """The memory for a replica's variables. The first replica uses the home itself if it is on its device."""
        flat, here = self.home.variables, rank == 0 and not self.apart
        return flat if here else FlatBuffers(flat.specs, device, like=flat)

    def follow(self, first: FlatBuffers, done: Callable[[], object]) -> None:
        """Copy the first replica's variables to the home after all replicas have made the step's update.

        The first device's worker calls `done()` after the copy.
        """

        def copy() -> None:
            self.home.variables.copy_from(first)
            done()

        if self.apart:
            self._communicator.once(copy)

    def lead(self, first: FlatBuffers) -> None:
        """Copy the home's variables to the first replica, before they are copied to the others."""
        if self.apart:
            self._communicator.once(lambda: first.copy_from(self.home.variables))
