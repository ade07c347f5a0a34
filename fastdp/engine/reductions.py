"""Chooses how the gradients of a step are reduced: during backward, inside CUDA graphs, or at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastdp.comm.base import Communicator
from fastdp.engine.accumulation import AccumulatedGradients
from fastdp.engine.across import Across, ProcessReduction, local_branches
from fastdp.engine.replica_work import commit
from fastdp.engine.replicas import ReplicaGroup
from fastdp.engine.step import Step
from fastdp.runtime.queue import QueueEvent
from fastdp.tracing import spans

# Steps of a batch shape after which a GPU's steps allocate nothing, and the number of shapes whose steps are counted.
WARM_STEPS, MOST_SHAPES = 2, 256


class Reductions:
    """Chooses how each step reduces, the same way for all replicas. Used from the host thread.

    Args:
        replicas: the engine's replicas. Their program's `step_graph` decides whether replicas reduce inside their work.
        communicator: over their devices.
        accumulation: gradients of earlier steps, which are added to those of the next step that reduces.

    Attributes:
        needs_whole: something but the update looks at the sums: a fingerprint, or a check for NaN.
    """

    needs_whole = False

    def __init__(self, replicas: ReplicaGroup, communicator: Communicator, accumulation: AccumulatedGradients) -> None:
        self._replicas, self._communicator, self._accumulation = replicas, communicator, accumulation
        self._trained: dict[Any, int] = {}
        self._here: Any = None  # the reduction of the latest step that one thread has launched on all devices

    def begin(self, step: Step) -> None:
        """Start the reduction of a step that is about to run, if buckets may be reduced before the replicas are done.

        Args:
            step: a step whose rows are on their devices.
        """
        if len(self._replicas.every) == 1 or self._is_by_step_graph(step):
            return
        # Sums of earlier steps must be added to the gradients first.
        if not step.reduces or self._accumulation.count:
            return
        shape = step.batch.rows, step.batch.shapes
        warm = self._trained.get(shape, 0) >= WARM_STEPS
        if not warm:
            if len(self._trained) >= MOST_SHAPES:
                self._trained.clear()
            self._trained[shape] = self._trained.get(shape, 0) + 1
        ends, buckets = self._replicas.ends(len(step.shards)), self._replicas.buckets
        everywhere = len(step.shards) == len(self._replicas.every)
        scatters = step.trains and self.scatters()
        if step.by_host and everywhere and not scatters and spans.now.recorder is None:
            self._here = here = self._communicator.begin_here(ends[1], buckets, warm=warm, known=self._here)
            step.reduction = here
            for context, listener in zip(step.contexts, here.listeners, strict=True):
                context.ready = listener
            return
        step.reduction = self._communicator.begin(*ends, buckets, warm=warm, scatters=scatters)
        for context in step.contexts if self._communicator.sums_early else ():
            context.ready = partial(step.reduction.ready, context.index)

    def scatters(self) -> bool:
        """Whether each replica gets its part of the sums alone, since it updates that part. Before a step.

        Raises:
            ValueError: the optimizer's settings have changed, and parts can no longer be updated.
        """
        replicas = self._replicas
        return replicas.in_parts and not (self.needs_whole or replicas.program.part_needs_whole())

    def finish(self, step: Step) -> None:
        """Enqueue the rest of the reduction, also for replicas without rows, and then the commit."""
        if not step.reduces:
            self._accumulation.reserve(len(step.shards))
            self._communicator.once(partial(commit, step))
        elif len(self._replicas.every) == 1 and not self._accumulation.count:  # its gradients are the sums
            if step.here:
                self._replicas.devices[0].compute.issue_here(commit, step)
            else:
                self._communicator.once(partial(commit, step))
        elif step.reduction is not None and self._leaves(step):
            step.sums_left = True
        elif step.reduction is not None:
            # Devices that do not update wait for the updated variables, and thereby for the sums.
            readers = len(self._replicas.updating) if step.trains else None
            self._communicator.finish(step.reduction, once=partial(commit, step), readers=readers)
        else:
            self.reduce(self._accumulation.hand_over(len(step.shards)), once=partial(commit, step))

    def _leaves(self, step: Step) -> bool:
        """Whether the thread that waits for a step sums its gradients: nothing on the devices needs them."""
        return step.kind == "backward" and not self.needs_whole and self._communicator.leaves(step.reduction)

    def finish_here(self, step: Step, computed: Sequence[QueueEvent]) -> list[tuple[int, BaseException]]:
        """As `finish` without the commit, on a thread that works in place of the workers.

        Args:
            step: a step that the replicas have been launched for.
            computed: by device, the end of its compute work so far.

        Returns:
            Failures, with the ranks that they belong to.
        """
        if not step.reduces:
            self._accumulation.reserve(len(step.shards))
        elif step.reduction is not None:
            return self._communicator.finish_here(step.reduction, computed)
        elif len(self._replicas.every) > 1 or self._accumulation.count:
            self.reduce(self._accumulation.hand_over(len(step.shards)))
        return []

    @staticmethod
    def by_step_graph(step: Step) -> bool:
        """Whether the replicas' graphs reduce the gradients of a step that has begun."""
        return step.contexts[0].step_graph is not None

    def reduce(self, sources: int, once: Callable[[], object] | None = None) -> None:
        """Enqueue the all-reduce of the first `sources` replicas' gradients, and then `once()`."""
        ends, buckets = self._replicas.ends(sources), self._replicas.buckets
        if self.scatters():
            self._communicator.reduce_scatter(*ends, buckets, once=once)
        else:
            self._communicator.all_reduce(*ends, buckets, once=once)

    def _is_by_step_graph(self, step: Step) -> bool:
        """Let the replicas reduce inside their own work if their program has a graph for it. Returns whether it has."""
        why_not = ""
        if self._replicas.in_parts:
            why_not = "each device updates its part of the weights"
        elif not step.reduces:
            why_not = "gradients wait for a later step"
        elif self._accumulation.count:
            why_not = "gradients of earlier steps are added"
        elif len(step.contexts) < len(self._replicas.every):
            why_not = "fewer rows than devices"
        step_graph = self._replicas.program.step_graph(step.contexts, why_not)
        if step_graph is None:
            return False
        step.reduction = reduction = step_graph.begin()
        for context in step.contexts:
            context.step_graph = step_graph
            context.launch = _later if step.by_host else partial(reduction.launch, context.rank, context.rendezvous)
        return True


def _later() -> None:
    """The host thread launches the graphs of all replicas when the last replica's inputs are in place."""


class ProcessesReductions(Reductions):
    """Reduces in this process, and then over all processes. Arguments as of `Reductions`, and `across`.

    A bucket that is complete early goes to the other processes while backward goes on.
    """

    def __init__(
        self, replicas: ReplicaGroup, communicator: Communicator, accumulation: AccumulatedGradients, across: Across
    ) -> None:
        super().__init__(replicas, communicator, accumulation)
        self.needs_whole = True  # the sums of a process are added to those of the others
        self._across = across
        self._reduction: ProcessReduction | None = None

    def begin(self, step: Step) -> None:
        """As in `Reductions`. One device, too, has buckets that other processes wait for."""
        self._reduction = None
        assert step.across is not None
        waiting = not step.reduces or self._accumulation.count
        if waiting and self._across.shards is not None and not step.across.is_full:
            raise NotImplementedError(
                f"With `shards` across processes, accumulated gradients need batches of at least "
                f"{self._across.shards} rows, one for each shard. Received: {step.batch.rows} rows. Leave the last "
                "rows out (drop_last=True), or do not accumulate."
            )
        if waiting or not step.across.shared:
            return
        ends, buckets = self._replicas.ends(len(step.shards)), self._replicas.buckets
        self._reduction = step.across.reduction(ends[0], buckets)
        step.reduction = self._communicator.begin(*ends, buckets, branches=self._branches(step.across.bounds))
        step.reduction.summed = self._reduction.complete
        for context in step.contexts:
            context.ready = partial(step.reduction.ready, context.index)

    def finish(self, step: Step) -> None:
        """As in `Reductions`, then over the processes."""
        assert step.across is not None
        if not step.across.counts_here:
            for replica in self._replicas.every[: len(step.shards)]:
                replica.device.compute.enqueue(replica.gradients.clear)
        by_reduce = step.reduction is None and (len(self._replicas.every) > 1 or self._accumulation.count > 0)
        super().finish(step)
        if step.reduces and not by_reduce:
            self._over_processes()

    def reduce(self, sources: int, once: Callable[[], object] | None = None) -> None:
        """As in `Reductions`, then over the processes."""
        bounds = self._across.bounds if self._across.shards is not None and self._accumulation.count else None
        if bounds is None:
            super().reduce(sources, once)
        else:
            begun = self._communicator.begin(
                *self._replicas.ends(sources), self._replicas.buckets, branches=self._branches(bounds)
            )
            self._communicator.finish(begun, once=once)
        self._over_processes(bounds)

    def _branches(self, bounds: Sequence[int] | None) -> list[tuple[int, int]] | None:
        """By replica of this process, the branches of the tree over the shards of all; None without shards."""
        if self._across.shards is None or bounds is None:
            return None
        rank = self._across.processes.rank
        return [(start - bounds[rank], stop - bounds[rank]) for start, stop in local_branches(bounds, rank)]

    def _over_processes(self, bounds: Sequence[int] | None = None) -> None:
        """Enqueue the reduction over the processes, before any update."""
        every, across = self._replicas.every, self._across
        reduction, self._reduction = self._reduction, None
        if reduction is None:
            flats, buckets = [replica.gradients for replica in every], self._replicas.buckets
            reduction = ProcessReduction(across, flats, buckets, "a training step", bounds)
        every[0].device.compute.enqueue(reduction.finish)
        if len(self._replicas.updating) > 1:
            self._communicator.broadcast([replica.gradients for replica in every])
