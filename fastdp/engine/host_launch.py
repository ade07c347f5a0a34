"""Captured steps on GPUs: the host thread enqueues them on all devices, one after the other, and wakes no worker.

A worker's part of a captured step is to enqueue: copies of rows, launches of graphs, collectives. The host thread does
it for all devices (`fastdp.runtime.queue.lent`), with the same streams, events and order. It waits twice: for the
values that the replicas add up, on which the update depends, and for the end of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from fastdp.comm.scatter_merge import scatter
from fastdp.engine.interrupts import interrupts_come, interrupts_wait
from fastdp.engine.recovery import Recovery
from fastdp.engine.reductions import Reductions
from fastdp.engine.replica_work import commit
from fastdp.engine.replicas import Replica, ReplicaGroup
from fastdp.engine.state import EngineState
from fastdp.engine.step import Step
from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.queue import QueueEvent, first_done, lent
from fastdp.tracing import spans
from fastdp.tracing.spans import span

# Bytes of a batch in host memory that workers copy to pinned memory faster, though they have to be woken.
MOST_NBYTES = 4 << 20


class HostLaunch:
    """Runs captured steps from the calling thread.

    Args:
        state: the engine's state.
        replicas: the engine's replicas. Their program decides which steps are captured.
        reductions: reduces their gradients.
        recovery: waits for steps that failed.

    Attributes:
        enabled: False leaves all steps to the workers.
    """

    def __init__(self, state: EngineState, replicas: ReplicaGroup, reductions: Reductions, recovery: Recovery) -> None:
        self.enabled = replicas.devices[0].on_gpu
        self._state, self._replicas = state, replicas
        self._reductions, self._recovery = reductions, recovery
        # Devices that share a card need the thread to be prepared for each in turn.
        self._apart = len({device.space for device in replicas.devices}) == len(replicas.devices)
        self._computed: Sequence[QueueEvent | None] = [None] * len(replicas.devices)
        self._ended: Sequence[QueueEvent | None] = [None] * len(replicas.devices)

    @contextmanager
    def of(self, step: Step) -> Iterator[None]:
        """Make the calling thread the worker of all devices while it enqueues the step, if the step is captured."""
        devices = self._replicas.devices
        if not (self.enabled and self._replicas.program.launches(step.contexts) and self._copies_fast(step)):
            yield
            return
        with lent(devices) as mine:
            if not mine:  # a worker is still busy
                yield
                return
            step.by_host = step.rendezvous.one_thread = True
            step.prepared = self._apart
            # An interrupt could come between the launches of graphs that wait for each other, or of updates.
            with self._replicas.program.launching(devices, step.threads), interrupts_wait():
                yield
                self._ended = step.ends = self._recorded(self._ended)

    def staging(self, arrays: Any) -> AbstractContextManager[object]:
        """Held while a batch is staged: the calling thread copies it, unless the workers are faster."""
        here = self.enabled and _host_nbytes(arrays) <= MOST_NBYTES
        return lent(self._replicas.devices) if here else nullcontext()

    def scatter(self, step: Step) -> None:
        """Bring each replica's rows to its device, which is idle: the step before was waited for."""
        arrays, devices = step.batch.arrays, self._replicas.devices
        if type(arrays) is not list:
            step.batches = scatter(arrays, step.shards, devices)
            return
        shapes, rank, batches = step.batch.shapes, 0, step.batches
        try:
            for rank, rows in enumerate(step.shards):
                device = devices[rank]
                found = device.take_idle_rows(arrays, rows, shapes)
                batches.append(device.take_rows(arrays, rows) if found is None else found)
        except RuntimeError as error:  # CUDA's
            step.fail(rank, error, "scatter")
            self._fail(step)

    def run(self, step: Step) -> None:
        """Launch the step of each replica that has rows, and the copies of its outputs."""
        self._reductions.begin(step)
        active = self._replicas.every[: len(step.contexts)]
        self._each(step, active, _launch)
        if self._reductions.by_step_graph(step):
            reduction: Any = step.reduction
            if spans.now.recorder is None:
                step.failures += reduction.launch_here(range(len(active)))
            else:
                self._each(step, active, _launch_graph)
            if step.failures:
                self._fail(step)
        if step.contexts[0].wants_outputs:
            self._each(step, active, _write_outputs)

    def reduce(self, step: Step) -> None:
        """Enqueue the rest of the reduction, wait for the replicas' values and add them up."""
        self._computed = computed = self._recorded(self._computed)
        step.failures += self._reductions.finish_here(step, computed)
        if not step.failures:
            with interrupts_come():
                self._wait(step, computed[: len(step.contexts)])
        if step.failures:
            self._fail(step)
        self._collect(step)

    def _each(self, step: Step, replicas: Sequence[Replica], work: Callable[[Step, Replica, int], object]) -> None:
        """Run a part of the step for each replica, as compute work of its device. Raises the error of a failed step."""
        for replica in replicas:
            rank = replica.rank
            failure = replica.device.compute.issue_here(work, step, replica, rank)
            if failure is not None:
                step.fail(rank, failure, "merge" if work is _write_outputs else "run")
            if step.failures:
                self._fail(step)

    def _recorded(self, events: Sequence[QueueEvent | None]) -> list[QueueEvent]:
        """By device, the end of its compute work so far.

        Args:
            events: those of an earlier step, for which nobody waits any more, to be used again.
        """
        pairs = zip(self._replicas.devices, events, strict=True)
        return [device.compute.record(event) for device, event in pairs]

    def _wait(self, step: Step, computed: Sequence[QueueEvent]) -> None:
        """Wait until the replicas are done, or the first of them has failed.

        Raises:
            DeviceTimeoutError: they were not done within the engine's time limit.
        """
        try:
            with span("wait for values"):
                failed = first_done(computed, self._state.timeout)
        except DeviceTimeoutError:
            raise self._recovery.too_late(step) from None
        if failed is not None:
            error = computed[failed].error
            assert error is not None
            step.fail(failed, error, "run")
            self._recovery.card_failed(step, error)

    def _collect(self, step: Step) -> None:
        """Take the values of the replicas, whose devices are done, and add them up, so that their updates begin."""
        rank, reduction = 0, step.reduction
        try:
            for rank in range(len(step.contexts)):
                step.results[rank] = step.launched[rank].result()
                if reduction is not None:
                    reduction.ended(rank)
                step.watch.compute_ended[rank] = time.perf_counter()
            if reduction is not None:
                reduction.all_done()
            rank = 0
            commit(step)
        # Any error of a program ends the step with it.
        except BaseException as error:
            step.fail(rank, error, "run")
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self._fail(step)

    def _fail(self, step: Step) -> None:
        """Raise the step's error when the devices are done with what was launched."""
        step.rendezvous.abort(step.failures[0][1])
        with interrupts_come():
            self._recovery.finish(step)

    def _copies_fast(self, step: Step) -> bool:
        """Whether this thread brings the rows to the devices about as fast as their workers."""
        arrays = step.batch.arrays
        pairs = zip(self._replicas.devices, step.shards, strict=False)
        return _host_nbytes(arrays) <= MOST_NBYTES or all(device.has_staged(arrays, rows) for device, rows in pairs)


def _host_nbytes(arrays: Any) -> int:
    """The size of a batch in bytes, if it is in host memory."""
    return sum(a.nbytes for a in arrays if isinstance(a, np.ndarray)) if isinstance(arrays, (list, tuple)) else 0


def _launch(step: Step, replica: Replica, rank: int) -> None:
    """Bring a replica's inputs to their place and launch its graphs, unless one graph holds the whole step."""
    step.watch.compute_began[rank] = time.perf_counter()
    if not step.prepared:
        replica.prepare_thread(step.threads)
    batch, context = step.batches[rank], step.contexts[rank]
    if spans.now.recorder is None:
        step.launched.append(replica.launch(batch, context))
        return
    with span("run", replica.device.compute, rows=step.watch.rows[rank]):
        step.launched.append(replica.launch(batch, context))


def _launch_graph(step: Step, replica: Replica, rank: int) -> None:
    """Launch the graph of a replica's whole step, when the inputs of all are in place: for a trace."""
    reduction: Any = step.reduction
    with span("run", replica.device.compute, rows=step.watch.rows[rank]):
        step.failures += reduction.launch_here([rank])


def _write_outputs(step: Step, replica: Replica, rank: int) -> None:
    """Enqueue the copies of a replica's outputs to their rows of the merged arrays."""
    began = time.perf_counter()
    step.merger.write(rank, step.launched[rank].outputs())
    step.watch.merging[rank] = time.perf_counter() - began
