"""What a step runs on the devices' workers: each replica's passes, the sums of their values, and the updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from fastdp.comm.context import Context
from fastdp.comm.scatter_merge import scatter
from fastdp.comm.tree import sum_in_tree
from fastdp.engine.interrupts import interrupts_wait
from fastdp.engine.replicas import Replica
from fastdp.engine.rollback import Rollback
from fastdp.engine.step import Operation, Step, step_error
from fastdp.errors import StepAborted
from fastdp.program.base import Result, Totals
from fastdp.runtime.queue import QueueDevice, QueueEvent
from fastdp.runtime.work_stealing import WorkStealing
from fastdp.tracing.spans import now, span


def scatter_rows(step: Step, devices: Sequence[QueueDevice]) -> None:
    """Bring each replica's rows to its device. On the host thread.

    Raises:
        ReplicaError: a device could not take them.
    """
    step.batches = []
    try:
        scatter(step.batch.arrays, step.shards, devices, into=step.batches)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        step.fail(len(step.batches), error, "scatter")
        raise step_error(step.failures, step, devices) from error


def run_replica(
    step: Step,
    replica: Replica,
    context: Context,
    work: Callable[[Replica, list[np.ndarray], Context], Result],
) -> None:
    """Run one replica's work on its device's worker. A failure wakes the replicas that wait for it."""
    watch, turn = step.watch, step.turns[context.index]
    watch.compute_began[context.index] = time.perf_counter()
    verb = "run"
    try:
        if turn is not None:
            turn.take()
            watch.compute_began[context.index] = time.perf_counter()
            if step.rendezvous.aborted:
                raise StepAborted("The step was stopped by a failure of another shard.")
        replica.prepare_thread(step.threads)
        if now.recorder is None:
            result = work(replica, step.batches[context.index], context)
        else:
            with span("run", replica.device.compute, rows=context.rows.count):
                result = work(replica, step.batches[context.index], context)
        step.rendezvous.leave(context.index)
        if context.wants_outputs:
            merging, verb = time.perf_counter(), "merge"
            step.merger.write(context.index, result.outputs)
            watch.merging[context.index] = time.perf_counter() - merging
        result.outputs = []
        step.results[context.index] = result
        if step.reduction is not None:
            step.reduction.ended(context.index)
    except BaseException as error:
        step.fail(context.index, error, verb)
        step.rendezvous.abort(error)
        raise
    finally:
        watch.compute_ended[context.index] = time.perf_counter()
        if turn is not None:
            turn.give()


def abort_if_skipped(step: Step, ran: QueueEvent) -> None:
    """Wake replicas that wait for one whose work is skipped, since its rows could not be copied.

    Args:
        ran: a mark behind the replica's work.
    """

    def check() -> None:
        if ran.error is not None:
            step.rendezvous.abort(ran.error)

    if not ran.notify(check):
        check()


def commit(step: Step) -> None:
    """Add up the sums and let the updates begin, on all replicas, or on none if the step was abandoned."""
    if step.rendezvous.aborted:
        raise StepAborted("The step was given up before its update.")
    step.watch.arrived = time.perf_counter()
    step.watch.early = step.reduction.early if step.reduction is not None else 0
    add_up(step)


def add_up(step: Step) -> None:
    """Add up the sums of all replicas: in rank order, or in the tree of the shards."""
    results = [result for result in step.results if result is not None]
    mine = results[0].notes
    if step.across is not None:
        results = step.across.everybody(results)
    sums = results[0].sums.copy()
    if step.contexts[0].device is not None and step.contexts[0].device.part_of is not None:
        sums = sum_in_tree([result.sums for result in results], sums)
    else:
        for result in results[1:]:
            sums += result.sums
    every_note = [result.notes for result in results]
    agree = getattr(mine, "agree", None)
    if agree is not None and len(results) > 1:
        agree(every_note)
    step.totals = Totals(sums, mine, every_note, step.reduces)


def sum_rest(step: Step) -> None:
    """Sum what no device has needed: gradients that the caller alone uses, and the sums of a step without an update."""
    if step.sums_left and step.reduction is not None:
        step.reduction.sum_rest()
    if step.totals is None:
        add_up(step)


def run_update(
    operation: Operation, replica: Replica, rollback: Rollback, threads: int, work_stealing: WorkStealing | None
) -> None:
    """Update one replica on its device's worker. The first replica takes a snapshot before, if one is needed.

    Args:
        rollback: the snapshot of the first replica.
        threads: cores that one operation may use.
        work_stealing: runs parts of the update on several workers, if the program splits its update.
    """
    assert operation.totals is not None
    operation.update_began(replica.rank)
    try:
        if operation.check is not None and not operation.check.passes(operation, replica):
            return
        if replica.rank == 0 or rollback.parts:
            if not rollback.save(replica, operation.generation):
                operation.restorable = False  # never back to True: other replicas may be at this line too
            operation.updates_begun = True
        operation.totals.work_stealing = work_stealing
        if not operation.prepared:
            replica.prepare_thread(threads)
        with interrupts_wait():  # the worker may be the main thread
            if now.recorder is None:
                replica.update(operation.totals)
            else:
                with span("update", replica.device.compute):
                    replica.update(operation.totals)
            operation.updates_done.append(replica.rank)
        if threads > operation.threads and not operation.prepared:
            replica.prepare_thread(operation.threads)  # helper threads end slowly once all replicas compute again
        operation.update_ended(replica.rank)
    except BaseException as error:
        operation.fail(replica.rank, error, "update")
        raise
