"""One training step that runs as a CUDA graph per GPU: when each worker launches, and what happens if one fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from fastdp.comm.base import Reduction
from fastdp.comm.rendezvous import Rendezvous
from fastdp.errors import StepAborted
from fastdp.runtime.cuda import cupy_api

# A launch returns at once. If it takes this long, CUDA hangs.
_LAUNCH_SECONDS = 30.0


class Launchable(Protocol):
    """The graphs of a step: `fastdp.comm.cuda.step_graph.build.StepGraph`."""

    early: int
    size: int
    changed: threading.Condition  # one step after the other uses it

    def launch(self, rank: int) -> None:
        """Enqueue a rank's graph."""

    def launch_here(self, rank: int) -> None:
        """As `launch`, on the one thread that launches the graphs of all ranks."""

    def abort(self) -> None:
        """Make the GPUs leave the collectives that they wait in."""


class StepGraphReduction(Reduction):
    """The reduction of a step in which the replicas' graphs reduce the gradients.

    Args:
        step: the graphs.
    """

    def __init__(self, step: Launchable) -> None:
        self._step = step
        self._changed = step.changed
        self._launching: set[int] = set()
        self._launched: set[int] = set()
        self._given_up = False
        self._over = False

    @property
    def early(self) -> int:
        """How many buckets may be reduced while a replica still computes. Only the GPUs know how many are."""
        return self._step.early

    def launch(self, rank: int, rendezvous: Rendezvous) -> None:
        """Launch a replica's graph when all replicas have their inputs in place. Called once, on its worker.

        Raises:
            StepAborted: another replica failed, or the step was given up, before this launch.
            DeviceTimeoutError: a replica did not arrive in time.
            RuntimeError: CUDA refuses. The step's collectives are aborted, so that no GPU waits for this one.
        """
        rendezvous.exchange(rank, None, "the launch of the step's graphs")
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

    def launch_here(self, ranks: Sequence[int]) -> list[tuple[int, BaseException]]:
        """Launch these replicas' graphs, when all have their inputs in place, on the thread that has all devices.

        Returns:
            The rank whose launch failed, and why; nothing if none did.
        """
        rank = 0
        try:
            for rank in ranks:
                self._step.launch_here(rank)
                self._launched.add(rank)
        except RuntimeError as error:  # CUDA's
            self._give_up(always=True)
            return [(rank, error)]
        except BaseException:
            self._give_up(always=True)
            raise
        return []

    def abandon(self, error: BaseException | None) -> None:
        """Give the step up, and leave no GPU waiting in a collective that others do not reach.

        A collective that all ranks have launched ends by itself. After a timeout, or where CUDA has failed, that is
        uncertain, so it is aborted.
        """
        self._give_up(always=isinstance(error, (TimeoutError, cupy_api.CudaError)))

    def _left(self, rank: int, *, launched: bool) -> None:
        with self._changed:
            self._launching.discard(rank)
            if launched:
                self._launched.add(rank)
            self._changed.notify_all()

    def _give_up(self, *, always: bool) -> None:
        """Launch no more graphs. Abort if only some ranks have launched theirs, or (`always`) if any has."""
        with self._changed:
            if self._over or self._given_up:
                return
            self._given_up = True
            self._changed.wait_for(lambda: not self._launching, _LAUNCH_SECONDS)
            began = len(self._launched)
        if began and (always or began < self._step.size):
            self._step.abort()

    # The interface that the engine and the communicator use.

    def ready(self, rank: int, bucket: int) -> None:
        """Does nothing: the graph itself reduces the bucket."""

    def ended(self, rank: int) -> None:
        """A replica's work is enqueued.

        Raises:
            RuntimeError: its graph was never launched, so no gradients are reduced.
        """
        if rank not in self._launched:
            raise RuntimeError(
                f"Replica {rank} has not launched the graph of its step, for which all others wait. This is a bug in "
                "fastdp."
            )

    def all_done(self) -> None:
        """All replicas are done: from now on nothing is aborted."""
        with self._changed:
            self._over = True

    def rest(self) -> list[int]:
        """No bucket is left. Called when all replicas are done."""
        self.all_done()
        return []

    def issue(self, numbers: Sequence[int]) -> None:
        """Does nothing: no bucket is left."""
