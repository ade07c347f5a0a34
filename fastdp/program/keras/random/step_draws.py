"""Sets the random generators for a step: where replicas start, and which state the host keeps afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastdp.comm.context import Context
from fastdp.program.keras.random.generators import Generators, StepGenerators
from fastdp.program.keras.replica import ReplicaContext, replica_scope


class StepDraws:
    """Hands each replica of a step its generators, and keeps the first one's after the step.

    Args:
        moves: whether steps may draw from generators of the host's; afterwards what the last step has shown.
    """

    def __init__(self, moves: bool) -> None:
        self.moves = moves
        self._step: StepGenerators | None = None
        self._first: Generators | None = None
        self._updated: Generators | None = None

    @contextmanager
    def during_step(self) -> Iterator[None]:
        """Held by the host thread while replicas run. A step that fails leaves all generators as they were."""
        self._step, self._first, self._updated = StepGenerators(), None, None
        try:
            yield
            last = self._updated or self._first
            self.moves = last is not None and last.used
            if last is not None:
                last.keep()
        finally:
            self._step = None

    def of_replica(self, rank: int) -> Generators:
        """The generators of one replica; outside any step those of a trial, which nobody keeps."""
        generators = Generators(self._step)
        if rank == 0:
            self._first = generators
        return generators

    @contextmanager
    def during_update(self) -> Iterator[None]:
        """Let an optimizer draw: on each replica from where the first one's forward pass has got to."""
        if self._first is None:
            yield
            return
        run = ReplicaContext(Context.alone([], None, 0, 1, 1), generators=self._first.copy())
        with replica_scope(run):
            yield
        self._updated = run.generators  # alike on all replicas
