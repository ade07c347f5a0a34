"""Where the model's own weights lie, and how they follow the first replica where that is elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdp.buffers import FlatBuffers
from fastdp.comm.base import Communicator
from fastdp.program.base import Program
from fastdp.runtime.select import warn_of_relocation


class HomeMemory:
    """A program's home, and whether it lies apart from the first device: in host memory, or on another card.

    Args:
        program: whose home.
        devices: of the engine.
        communicator: over them.
        on_host: have the home in host memory. Where it is already, by an engine made before, it stays.

    In the first device's own memory the home is the first replica's, and nothing has to follow.
    """

    def __init__(self, program: Program, devices: Any, communicator: Communicator, *, on_host: bool) -> None:
        self.home = program.home(devices[0].host_home() if on_host else devices[0])
        self.apart = self.home.device.space != devices[0].space
        self._communicator = communicator
        warn_of_relocation(on_host and self.home.device.on_gpu, devices)

    def variables(self, rank: int, device: Any) -> FlatBuffers:
        """Memory for a replica's variables: of the first the home's, where it is there."""
        here = rank == 0 and not self.apart
        return self.home.variables if here else FlatBuffers(self.home.variables.specs, device)

    def follow(self, first: FlatBuffers, done: Callable[[], object]) -> None:
        """Let the home have the first replica's variables, when all replicas have made the step's update.

        `done()` is called on the first device's worker when it has them.
        """

        def copy() -> None:
            self.home.variables.copy_from(first)
            done()

        if self.apart:
            self._communicator.once(copy)

    def lead(self, first: FlatBuffers) -> None:
        """Let the first replica have the home's variables, before they are copied to the others."""
        if self.apart:
            self._communicator.once(lambda: first.copy_from(self.home.variables))
