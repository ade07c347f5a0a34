"""The replicas of a program, one on each device: makes, refreshes and compares them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from fastdp.buffers import FlatBuffers, Memory
from fastdp.comm.base import Communicator
from fastdp.comm.context import Context
from fastdp.engine.home import HomeMemory
from fastdp.program.base import Launched, Program, Result, Totals
from fastdp.runtime.queue import QueueDevice, lent

# A program's own work on a replica's rows, called as `predict` is: `work(state, batch, context)`.
Call = Callable[[Any, list[np.ndarray], Context], Result]


class Replica:
    """A copy of a program's state on a device, and the calls that run there.

    Args:
        program: the program to run.
        device: the replica's device.
        rank: the replica's index, which orders rows and sums.
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
        """The gradient of this replica's contribution. After the reduction: the gradient of the whole batch."""
        return self.memory.gradients

    @property
    def lasting(self) -> tuple[FlatBuffers, ...]:
        """Variables and slots, which last from step to step."""
        return self.memory.variables, self.memory.slots

    @property
    def own(self) -> tuple[FlatBuffers, ...]:
        """What an update of this replica changes: also the slots of its part, if it has a part."""
        parts = self.memory.parts
        return self.lasting if parts is None else (*self.lasting, parts)

    def prepare_thread(self, threads: int) -> None:
        """Let the device's worker use `threads` cores in one operation. Runs on it before each step's work."""
        self._program.prepare_thread(threads, self.device)

    def train(self, batch: list[np.ndarray], context: Context) -> Result:
        """Forward, loss and backward. Runs on the device's worker."""
        return self._program.train(self._state, batch, context)

    def launch(self, batch: list[np.ndarray], context: Context) -> Launched:
        """Enqueue what `train` runs, without waiting. Runs on the host thread, as work of the device."""
        return self._program.launch(self._state, batch, context)

    def predict(self, batch: list[np.ndarray], context: Context) -> Result:
        """Forward only. Runs on the device's worker."""
        return self._program.predict(self._state, batch, context)

    def call(self, batch: list[np.ndarray], context: Context, work: Call) -> Result:
        """Run the program's own work instead of `predict`. Runs on the device's worker."""
        return work(self._state, batch, context)

    def update(self, totals: Totals) -> None:
        """Apply the reduced gradients. Runs on the device's worker."""
        self._program.update(self._state, totals)

    def skip(self, totals: Totals) -> None:
        """Note that the update is not made. Runs on the device's worker."""
        self._program.skip(self._state, totals)

    @property
    def update_is_reliable(self) -> bool:
        """Whether none of the user's code runs in an update."""
        return self._program.update_is_reliable

    def rehearse_update(self) -> bool:
        """Try the update on copies; False if it cannot be tried. Runs on the device's worker."""
        return self._program.rehearse_update(self._state)

    def accumulate(self, total: FlatBuffers, part: FlatBuffers) -> None:
        """Add `part` to `total`. Runs on the device's worker."""
        self._program.accumulate(total, part)

    def fold(self) -> None:
        """Move reduced gradients into the slots. Runs on the device's worker."""
        self._program.fold(self._state)


class ReplicaGroup:
    """The replicas of a program, one on each device. Makes, refreshes and compares them.

    Args:
        program: the program that they run.
        devices: their devices, in the order of the rows.
        home: the memory of the program's own variables. The first replica shares it if it is on the first device.
        communicator: over the devices.
        update: "each": every replica applies the update. "first": the first replica applies it for all. "parts": every
            replica updates its part of the variables, and has the slots of that part alone.

    Attributes:
        every: the replicas, in the order of the devices.
        updating: the replicas that apply the update themselves.
        buckets: the buckets of the gradients, in the order in which backward completes them.
        copies_before: whether each step begins with copies of the first replica's variables, and ends without.
        in_parts: whether every replica updates a part.
    """

    def __init__(
        self,
        program: Program,
        devices: Sequence[QueueDevice],
        home: HomeMemory,
        communicator: Communicator,
        update: str,
    ) -> None:
        self.program, self.devices, self.home = program, devices, home
        self._communicator, self._update = communicator, update
        self._generation = -1
        self.copies_before = program.home_is_exposed and len(devices) > 1
        self.in_parts = update == "parts"
        self.every = [self._replicate(rank) for rank in range(len(devices))]
        self.updating = self.every[:1] if update == "first" else self.every
        self.buckets = self.every[0].gradients.buckets()
        self._gradients = [replica.gradients for replica in self.every]
        self._variables = [replica.memory.variables for replica in self.every]

    def _replicate(self, rank: int) -> Replica:
        """Make the replica of one device. The first replica lives in the program's home."""
        device, program = self.devices[rank], self.program
        gradients = FlatBuffers(program.gradients, device)
        own = program.slots if self._update != "first" else []
        slots = program.home_slots(device) if rank == 0 else FlatBuffers(own, device)
        ranks = len(self.devices) if self.in_parts else 1
        return Replica(program, device, rank, Memory(self.home.variables(rank, device), slots, gradients, ranks))

    def ends(self, sources: int) -> tuple[list[FlatBuffers], list[FlatBuffers]]:
        """The buffers of an all-reduce: gradients of the first `sources` replicas, and of those that get the sum.

        On GPUs all replicas take part in a collective. In host memory, replicas that only get a copy of the variables
        do not.
        """
        every = self._gradients
        return every[:sources], every if self.devices[0].on_gpu else every[: len(self.updating)]

    # Up to date.

    def bring_up_to_date(self, active: int) -> None:
        """Enqueue a refresh of the replicas if the user or another engine has changed the home.

        Args:
            active: the number of replicas that have a part in what follows.
        """
        # Called always, since it also re-adopts variables whose memory was replaced.
        if self.program.changed_outside():  # `committed()` resets it; the new number tells the home's other engines
            self.home.home.advance()
        if self._generation != self.home.home.generation:
            self.refresh()
        elif self.copies_before:
            self.refresh(active)

    def refresh(self, active: int | None = None) -> None:
        """Enqueue copies of the home's variables and the first replica's slots to the others, or the active ones."""
        with lent(self.devices) if self.devices[0].on_gpu else nullcontext():  # a GPU's worker would only enqueue
            self.home.lead(self._variables[0])
            self._communicator.refresh(self._variables[:active])
            if self._update != "first" and active is None:
                self._communicator.refresh([replica.memory.slots for replica in self.every])
        self.program.committed()
        self._generation = self.home.home.generation

    def gather_parts(self) -> None:
        """Enqueue copies of each replica's part of the updated variables to all others."""
        self._communicator.all_gather(self._variables, self.buckets)

    def copy_first(self, readers: int | None) -> None:
        """Enqueue copies of the first replica's updated variables to the others.

        Args:
            readers: as in `Communicator.broadcast`.
        """
        self._communicator.broadcast(self._variables, readers)

    def advance(self) -> int:
        """Count an update that begins, so that other engines on this home refresh. Returns the home's generation."""
        self.home.home.advance()
        self._generation = self.home.home.generation
        return self._generation

    def doubt(self) -> None:
        """Let the next step refresh the replicas, whose values are unknown after a failure."""
        self._generation = -1

    def assert_equal(self, step: int) -> None:
        """Compare all replicas with the first, bit by bit. `step` is for the error message. See `DataParallel`."""
        if self.copies_before:
            return  # the others have no values of their own: they get the first one's before the next step
        first = self.every[0]
        for replica in self.every[1:]:
            for what, ours, theirs in zip(("variables", "slots"), first.lasting, replica.lasting, strict=True):
                if (what == "variables" or self._update != "first") and not ours.equals(theirs):
                    raise RuntimeError(
                        f"The {what} on {replica.device.name} differ from those on {first.device.name} "
                        f"after step {step}. This is a bug in fastdp or in the program's update."
                    )
