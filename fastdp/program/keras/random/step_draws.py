"""Sets the random generators for a step: where replicas start, and which state the host keeps afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastdp.comm.context import Context
from fastdp.program.keras.random.generators import Generators, StepGenerators
from fastdp.program.keras.replica import ReplicaContext, replica_scope


class StepDraws:
    """Gives each replica of a step its generators, and keeps those of the first replica after the step.

    Args:
        moves: whether steps may draw from the host's generators. After a step the attribute says whether it did.
    """

    def __init__(self, moves: bool) -> None:
        self.moves = moves
        self._step: StepGenerators | None = None
        self._first: Generators | None = None
        self._updated: Generators | None = None
        self._begun: dict[int, Generators] = {}

    def begin(self) -> None:
        """Called by the host thread before replicas run."""
        self._step, self._first, self._updated = StepGenerators(), None, None
        self._begun = {}

    def end(self, *, failed: bool) -> None:
        """Called by the host thread when they are done. A failed step leaves all generators unchanged."""
        try:
            last = None if failed else self._updated or self._first
            if not failed:
                self.moves = last is not None and last.used
            if last is not None:
                last.keep()
        finally:
            self._step = None

    def of_replica(self, rank: int) -> Generators:
        """The generators of one replica. Outside a step they are for a trial and are discarded."""
        generators = self._begun.get(rank) or Generators(self._step)
        if rank == 0:
            self._first = generators
        return generators

    def begun(self, rank: int, generators: Generators) -> None:
        """Let the rest of a replica's step go on with generators that a part of it, run by itself, has advanced."""
        self._begun[rank] = generators

    @contextmanager
    def during_update(self) -> Iterator[None]:
        """Let an optimizer draw: each replica continues from the first replica's state after its forward pass."""
        if self._first is None:
            yield
            return
        run = ReplicaContext(Context.alone([], None, 0, 1, 1), generators=self._first.copy())
        with replica_scope(run):
            yield
        self._updated = run.generators  # equal on all replicas
