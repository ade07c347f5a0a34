"""One training step that runs as a CUDA graph per GPU: who launches when, and what happens if one does not."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from fastdp.comm.base import Reduction
from fastdp.comm.rendezvous import Rendezvous
from fastdp.errors import StepAborted

# A launch returns at once, or CUDA is beyond help.
_LAUNCH_SECONDS = 30.0


class Launchable(Protocol):
    """The graphs of a step: `fastdp.comm.cuda.step_graph.build.StepGraph`."""

    early: int
    size: int

    def launch(self, rank: int) -> None:
        """Enqueue a rank's graph."""

    def abort(self) -> None:
        """Have GPUs leave the collectives that they wait in."""


class StepGraphReduction(Reduction):
    """The reduction of a step in which the graphs of the replicas reduce the gradients themselves.

    Args:
        step: the graphs.
    """

    def __init__(self, step: Launchable) -> None:
        self._step = step
        self._changed = threading.Condition()
        self._launching: set[int] = set()
        self._launched: set[int] = set()
        self._given_up = False
        self._over = False

    @property
    def early(self) -> int:
        """How many buckets may be reduced while a replica still computes: the GPUs alone know whether they are."""
        return self._step.early

    def launch(self, rank: int, rendezvous: Rendezvous) -> None:
        """Launch a replica's graph once all replicas have their inputs in place. On its worker; each does so once.

        Raises:
            StepAborted: another replica failed, and no graph has been launched or none is waited for.
            DeviceTimeoutError: a replica did not come in time.
            RuntimeError: CUDA refuses. The step's collectives are aborted, so that no GPU waits for this one.
        """
        rendezvous.exchange(rank, None)
        with self._changed:
            if self._given_up:
                raise StepAborted("The step was given up before its graphs were launched.")
            self._launching.add(rank)
        try:
            self._step.launch(rank)
        except BaseException:
            self._left(rank, launched=False)
            self._give_up(always=True)
            raise
        self._left(rank, launched=True)

    def abandon(self, error: BaseException | None) -> None:
        """Nobody waits for the step any more: no GPU may be left in a collective that others do not come to.

        A collective that all have come to ends by itself, unless the step is late, of which nobody knows why.
        """
        self._give_up(always=isinstance(error, TimeoutError))

    def _left(self, rank: int, *, launched: bool) -> None:
        with self._changed:
            self._launching.discard(rank)
            if launched:
                self._launched.add(rank)
            self._changed.notify_all()

    def _give_up(self, *, always: bool) -> None:
        """Launch no more, and abort what some have launched and others have not, or (`always`) whatever runs."""
        with self._changed:
            if self._over or self._given_up:
                return
            self._given_up = True
            self._changed.wait_for(lambda: not self._launching, _LAUNCH_SECONDS)
            began = len(self._launched)
        if began and (always or began < self._step.size):
            self._step.abort()

    # What the engine and the communicator ask of any reduction.

    def ready(self, rank: int, bucket: int) -> None:
        """The graph itself goes on with the bucket."""

    def ended(self, rank: int) -> None:
        """A replica's work is enqueued.

        Raises:
            RuntimeError: its graph was never launched, and nobody's gradients are reduced.
        """
        if rank not in self._launched:
            raise RuntimeError(
                f"Replica {rank} has not launched the graph of its step, for which all others wait. This is a bug in "
                "fastdp."
            )

    def rest(self) -> list[int]:
        """Nothing is left to be reduced. Asked when all replicas are done: nothing is given up any more."""
        with self._changed:
            self._over = True
        return []

    def issue(self, numbers: Sequence[int]) -> None:
        """Issue the collectives of these buckets: none is left."""
