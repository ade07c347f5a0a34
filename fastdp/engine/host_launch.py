"""Captured steps on GPUs: the host thread enqueues them on all devices, one after the other, and wakes no worker.

A worker's part of a captured step is to enqueue: copies of rows, launches of graphs, collectives. The host thread does
it for all devices (`fastdp.runtime.queue.lent`), with the same streams, events and order. It waits twice: for the
values that the replicas add up, on which the update depends, and for the end of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from fastdp.engine.interrupts import interrupts_wait
from fastdp.engine.recovery import Recovery
from fastdp.engine.reductions import Reductions
from fastdp.engine.replicas import Replica, ReplicaGroup
from fastdp.engine.state import EngineState
from fastdp.engine.step import Step, commit
from fastdp.errors import DeviceTimeoutError
from fastdp.program.base import Launched
from fastdp.runtime.queue import QueueEvent, first_done, lent
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
            with self._replicas.program.launching(devices):
                yield
                step.ends = [device.compute.record() for device in devices]

    def staging(self, arrays: Any) -> AbstractContextManager[object]:
        """Held while a batch is staged: the calling thread copies it, unless the workers are faster."""
        here = self.enabled and _host_nbytes(arrays) <= MOST_NBYTES
        return lent(self._replicas.devices) if here else nullcontext()

    def run(self, step: Step) -> None:
        """Launch the step of each replica that has rows, and the copies of its outputs."""
        self._reductions.begin(step)
        step.launched = [None] * len(step.contexts)
        work: list[Callable[[Step, Replica, int], None]] = [_launch]
        if self._reductions.by_step_graph(step):
            work.append(_launch_graph)
        if step.contexts[0].wants_outputs:
            work.append(_write_outputs)
        active = self._replicas.every[: len(step.contexts)]
        with interrupts_wait():  # which could come between the launches of graphs that wait for each other
            for part in work:
                for replica in active:
                    if not step.failures:
                        self._do(step, replica, partial(part, step, replica, replica.rank))
        if step.failures:
            self._fail(step)

    def reduce(self, step: Step) -> None:
        """Enqueue the rest of the reduction, wait for the replicas' values and add them up."""
        devices = self._replicas.devices
        computed = [device.compute.record() for device in devices]
        with interrupts_wait():
            step.failures += self._reductions.finish_here(step, computed)
        if not step.failures:
            self._wait(step, computed[: len(step.contexts)])
        for replica in self._replicas.every[: len(step.contexts)]:
            if not step.failures:
                self._do(step, replica, partial(_collect, step, replica, replica.rank))
        if not step.failures:
            if step.reduction is not None:
                step.reduction.all_done()
            self._do(step, self._replicas.every[0], partial(commit, step))
        if step.failures:
            self._fail(step)

    @staticmethod
    def _do(step: Step, replica: Replica, work: Callable[[], object]) -> None:
        """Run a part of the step as compute work of a replica's device. Note its failure, or why it was skipped."""
        compute = replica.device.compute
        compute.issue(work)
        if compute.failure is not None:
            step.failures.append((replica.rank, compute.failure))

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
            step.failures.append((failed, error))
            self._recovery.card_failed(step, error)

    def _fail(self, step: Step) -> None:
        """Raise the step's error when the devices are done with what was launched."""
        step.rendezvous.abort(step.failures[0][1])
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
    with span("run", replica.device.compute, rows=step.watch.rows[rank]):
        replica.prepare_thread(step.threads)
        step.launched[rank] = replica.launch(step.batches[rank], step.contexts[rank])


def _launch_graph(step: Step, replica: Replica, rank: int) -> None:
    """Launch the graph of a replica's whole step, when the inputs of all are in place."""
    reduction: Any = step.reduction
    with span("run", replica.device.compute, rows=step.watch.rows[rank]):
        reduction.launch_here(rank)


def _write_outputs(step: Step, replica: Replica, rank: int) -> None:
    """Enqueue the copies of a replica's outputs to their rows of the merged arrays."""
    began = time.perf_counter()
    step.merger.write(rank, _of(step, rank).outputs())
    step.watch.merging[rank] = time.perf_counter() - began


def _collect(step: Step, replica: Replica, rank: int) -> None:
    """Take the values of a replica whose device is done."""
    step.results[rank] = _of(step, rank).result()
    if step.reduction is not None:
        step.reduction.ended(rank)
    step.watch.compute_ended[rank] = time.perf_counter()


def _of(step: Step, rank: int) -> Launched:
    launched = step.launched[rank]
    assert launched is not None, "the replica has been launched"
    return launched
