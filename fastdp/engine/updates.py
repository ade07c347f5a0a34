"""How the update of a step is applied: by every replica to its own copy, or by the first for all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from fastdp.engine.accumulation import AccumulatedGradients
from fastdp.engine.nonfinite import FiniteCheck
from fastdp.engine.replica_work import run_update
from fastdp.engine.replicas import Replica, ReplicaGroup
from fastdp.engine.rollback import Rollback
from fastdp.engine.step import Operation, Step
from fastdp.options import Options
from fastdp.program.base import Program
from fastdp.runtime.host.resources import CORES, SEVERAL_THREADS_NBYTES
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.work_stealing import shared_with
from fastdp.tracing import spans


class Updates:
    """Enqueues the updates of steps. Used from the host thread.

    Args:
        replicas: the engine's replicas.
        rollback: the snapshot of the first replica.
        accumulation: gradients of steps that are not reduced.
        options: the timeout is for another device's worker that runs a part of an update, and `on_nonfinite` decides
            which updates are made.
        skipped: the number of updates that were skipped so far.
    """

    def __init__(
        self,
        replicas: ReplicaGroup,
        rollback: Rollback,
        accumulation: AccumulatedGradients,
        options: Options,
        skipped: int = 0,
    ) -> None:
        self._replicas, self._rollback, self._accumulation = replicas, rollback, accumulation
        self._work_stealing = shared_with(replicas.devices[1:CORES], options.timeout)
        self._finite = FiniteCheck(options.on_nonfinite, replicas) if options.on_nonfinite is not None else None
        if self._finite is not None:
            self._finite.skipped = skipped

    @property
    def skipped(self) -> int:
        """The number of updates that were skipped because of numbers that are not finite."""
        return self._finite.skipped if self._finite is not None else 0

    def check(self, step: Step) -> None:
        """Enqueue the check of a sum of gradients that somebody else uses. Does nothing where none is asked for."""
        if self._finite is None or not self._finite.applies:
            return
        step.check = self._finite
        first = self._replicas.every[0]
        first.device.compute.enqueue(partial(self._finite.check_sum, step, first))

    def begin(self, step: Operation, *, accumulates: int = 0) -> None:
        """Enqueue the same update for all replicas, after the step's reduction.

        Args:
            step: a step, or another operation with an update.
            accumulates: the number of replicas whose gradients were not reduced, and wait for a later step.
        """
        replicas = self._replicas
        every = replicas.every
        step.check = self._finite if self._finite is not None and self._finite.applies else None
        # Counted before the update, which may happen even when nobody waits for it any more.
        step.generation = replicas.advance()
        step.updating = every if accumulates else replicas.updating
        # The other devices are idle while the first one updates for all.
        alone = len(step.updating) == 1 and len(every) > 1
        work_stealing = self._work_stealing if alone and replicas.program.update_is_shared else None
        threads = step.threads
        if alone and work_stealing is None and every[0].memory.variables.nbytes > SEVERAL_THREADS_NBYTES:
            threads = step.cores  # helper threads are made, and ended when the replicas go on: not for a small update
        one_by_one = step.prepared and not replicas.program.uses_cupy and spans.now.recorder is None
        one_by_one = one_by_one and step.check is None  # which may compute with CuPy
        # Without `run_update` no replica but the first takes a snapshot.
        saves_parts = self._rollback.parts and not self._rollback.succeeded
        here = isinstance(step, Step) and one_by_one and not saves_parts
        for replica in step.updating[: 1 if here else None]:
            compute, given = replica.device.compute, (step, replica, self._rollback, threads, work_stealing)
            if here or step.here:
                compute.issue_here(run_update, *given)
            else:
                compute.enqueue(partial(run_update, *given))
        if isinstance(step, Step) and here:
            _update_here(step, step.updating[1:])
        if replicas.in_parts and not accumulates:
            replicas.gather_parts()
        elif len(step.updating) < len(every) and not replicas.copies_before:
            replicas.copy_first(readers=None if step.reduction is None else len(step.updating))
        replicas.home.follow(every[0].memory.variables, step.note_home)
        if accumulates:
            self._accumulation.keep(accumulates)
        else:
            self._accumulation.clear()


def update_mode(program: Program, options: Options, devices: Sequence[QueueDevice]) -> str:
    """Which replicas apply updates, as `ReplicaGroup` names it.

    Raises:
        ValueError: `shard_optimizer` for a program that cannot divide its update.
    """
    if options.shard_optimizer and not program.shards_optimizer:
        raise ValueError(
            "`shard_optimizer` is for Keras models and torch modules. Received: shard_optimizer=True for a "
            f"{type(program).__name__}. Leave it out."
        )
    if program.updates_parts and len(devices) > 1:
        return "parts"
    # The others would update themselves for nothing: they get an exposed home's variables before each step.
    if program.home_is_exposed:
        return "first"
    return options.update or ("each" if devices[0].on_gpu and program.update_is_ours else "first")


def _update_here(step: Step, replicas: Sequence[Replica]) -> None:
    """As `run_update` for one replica after the other, behind that of the first, on the thread that has their devices.

    No interrupt comes meanwhile. The replicas after one that fails keep what they have.
    """
    totals, done, watch = step.totals, step.updates_done, step.watch
    now = time.perf_counter()
    for replica in replicas:
        if step.failures:
            return
        rank = replica.rank
        watch.update_began[rank] = now
        failure = replica.device.compute.issue_here(replica.update, totals)
        if failure is not None:
            step.fail(rank, failure, "update")
            return
        done.append(rank)
        watch.update_ended[rank] = now = time.perf_counter()
