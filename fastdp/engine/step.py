"""One training step in flight: what it carries, and what its replicas do on their devices' workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdp.comm.base import Reduction
from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.comm.scatter_merge import Merger
from fastdp.engine.interrupts import interrupts_wait
from fastdp.engine.replicas import Replica
from fastdp.engine.rollback import Rollback
from fastdp.engine.timing import Watch
from fastdp.errors import ReplicaError, StepAborted, replica_error_class
from fastdp.program.base import Result, Totals
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.work_stealing import WorkStealing
from fastdp.shard import Rows


@dataclass(slots=True)
class StepResult:
    """What a step gives the caller: merged outputs (the caller's own), summed numbers, rows, and the notes of the first
    replica and of all."""

    outputs: list[np.ndarray]
    sums: np.ndarray
    notes: Any
    rows: int
    every_note: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Step:
    """One step in flight."""

    shards: list[Rows]
    contexts: list[Context]
    merger: Merger
    rendezvous: Rendezvous
    threads: int
    watch: Watch
    batches: list[list[np.ndarray]] = field(default_factory=list)
    results: list[Result | None] = field(default_factory=list)
    totals: Totals | None = None
    seconds: list[float] = field(default_factory=list)
    failures: list[tuple[int, BaseException]] = field(default_factory=list)
    generation: int = -1
    updates_begun: bool = False
    restorable: bool = True
    updates_done: list[int] = field(default_factory=list)
    updating: list[Replica] = field(default_factory=list)
    reduces: bool = True
    reduction: Reduction | None = None
    came_home: bool = False  # the new variables, where the program's own lie elsewhere than a replica's
    # Of a step that ended while its thread did something else: see step_scope.meanwhile.
    scope: Any = None
    over: bool = False
    outcome: StepResult | None = None
    error: BaseException | None = None

    def kept(self) -> StepResult:
        """What came of a step that is over; raises what it failed with."""
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome


def run_replica(
    step: Step,
    replica: Replica,
    context: Context,
    work: Callable[[Replica, list[np.ndarray], Context], Result],
) -> None:
    """Run one replica's work on its device's worker; a failure wakes the replicas that wait for it."""
    watch = step.watch
    began = watch.compute_began[context.rank] = time.perf_counter()
    try:
        replica.prepare_thread(step.threads)
        result = work(replica, step.batches[context.rank], context)
        if context.wants_outputs:
            merging = time.perf_counter()
            step.merger.write(context.rank, result.outputs)
            watch.merging[context.rank] = time.perf_counter() - merging
        result.outputs = []
        step.results[context.rank] = result
        if step.reduction is not None:
            step.reduction.ended(context.rank)
    except BaseException as error:
        step.failures.append((context.rank, error))
        step.rendezvous.abort(error)
        raise
    finally:
        watch.compute_ended[context.rank] = time.perf_counter()
        step.seconds[context.rank] = watch.compute_ended[context.rank] - began


def commit(step: Step) -> None:
    """Add up the sums, and let the updates begin, on all replicas or on none: not for an abandoned step."""
    if step.rendezvous.aborted:
        raise StepAborted("The step was given up before its update.")
    step.watch.arrived = time.perf_counter()
    step.watch.early = step.reduction.early if step.reduction is not None else 0
    add_up(step)


def add_up(step: Step) -> None:
    """Add up the replicas' sums, in rank order."""
    results = [result for result in step.results if result is not None]
    sums = results[0].sums.copy()
    for result in results[1:]:
        sums += result.sums
    every_note = [result.notes for result in results]
    agree = getattr(results[0].notes, "agree", None)
    if agree is not None and len(results) > 1:
        agree(every_note)
    step.totals = Totals(sums, results[0].notes, every_note, step.reduces)


def run_update(step: Step, replica: Replica, spare: Rollback, threads: int, share: WorkStealing | None) -> None:
    """Update one replica on its device's worker; the first one keeps what it changes, where that is needed.

    Args:
        spare: the first replica's.
        threads: of one operation.
        share: the threads that do a piece of the update each, where it is made in pieces.
    """
    assert step.totals is not None
    step.watch.update_began[replica.rank] = time.perf_counter()
    try:
        if replica.rank == 0:
            step.restorable = spare.save()
            step.updates_begun = True
        step.totals.share = share
        replica.prepare_thread(threads)
        with interrupts_wait():  # the worker may be the thread that waits for it
            replica.update(step.totals)
            step.updates_done.append(replica.rank)
        step.watch.update_ended[replica.rank] = time.perf_counter()
        spare.succeeded = True
    except BaseException as error:
        step.failures.append((replica.rank, error))
        raise


def step_error(
    failures: Sequence[tuple[int, BaseException]], step: Step, devices: Sequence[QueueDevice]
) -> ReplicaError:
    """The error to raise for a failed step: its first cause, with the device and the rows."""
    causes = [failure for failure in failures if not isinstance(failure[1], StepAborted)] or list(failures)
    rank, cause = causes[0]
    total = step.shards[0].total
    rows = (step.shards[rank].start, step.shards[rank].stop) if rank < len(step.shards) else None
    where = f"rows {rows[0]} to {rows[1]} of the batch's {total}" if rows else f"no rows of the batch's {total}"
    message = (
        f"The replica on {devices[rank].name} ({where}) failed with {type(cause).__name__}: {cause}\n"
        "The step was stopped"
    )
    if step.updates_begun and not step.restorable:
        message += " in the middle of its update: all replicas go on from the weights of the first."
    else:
        message += " and no replica's weights were changed."
    error = replica_error_class(type(cause))(message, device=devices[rank].name, rows=rows)
    error.__cause__ = cause
    return error
