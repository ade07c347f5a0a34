"""`DataParallel`: runs a program on several devices as if on one, by scatter, run, reduce, update and merge."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastdp.buffers import FlatBuffers, Memory
from fastdp.comm.batch import count_rows
from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.comm.scatter_merge import Merger, scatter, stage
from fastdp.comm.select import communicator
from fastdp.engine.accumulation import AccumulatedGradients
from fastdp.engine.home import HomeMemory
from fastdp.engine.reductions import Reductions
from fastdp.engine.replicas import Replica, assert_equal
from fastdp.engine.rollback import Rollback
from fastdp.engine.step import Step, StepResult, add_up, commit, run_replica, run_update, step_error
from fastdp.engine.step_scope import StepScope, meanwhile, one_step_at_a_time
from fastdp.engine.timing import Timings, Watch
from fastdp.errors import DeviceTimeoutError
from fastdp.options import Options
from fastdp.program.base import Program, Result
from fastdp.runtime.host.resources import CORES
from fastdp.runtime.queue import joined
from fastdp.runtime.select import devices_of_engine
from fastdp.runtime.work_stealing import shared_with
from fastdp.shard import Rows, split_rows


class DataParallel:
    """Runs a program on several devices as if on one.

    Args:
        program: what each replica runs (`fastdp.program.base.Program`).
        devices: one replica per device, in the order of the rows: devices, or what `gpus=` takes elsewhere (a
            number, a list of ordinals, None for all).
        timeout, update, cpu_merge, merge_device, cpu_relocation, check_replicas: as in `fastdp.wrap`, which says what
            each is for.
        options: all of them in one, in place of these keywords.

    The engine owns the replicas' memory, and, for updates that may fail, a spare copy of the first replica's
    variables and slots, from which a failed update is taken back. It is used from one thread at a time, and
    holds no thread of its own: the devices do.

    Raises:
        ValueError: anything wrong with `devices`; an unknown `update`.
    """

    def __init__(
        self,
        program: Program,
        devices: Any = None,
        *,
        timeout: float = 1800.0,
        update: str | None = None,
        cpu_merge: bool = True,
        merge_device: int = 0,
        cpu_relocation: bool = False,
        check_replicas: bool = False,
        options: Options | None = None,
    ) -> None:
        if options is None:
            options = Options(
                timeout=timeout,
                update=update,
                cpu_merge=cpu_merge,
                merge_device=merge_device,
                cpu_relocation=cpu_relocation,
                check_replicas=check_replicas,
            )
        devices = devices_of_engine(devices, options.merge_device)
        self.program = program
        self.devices = list(devices)
        self.update = options.update or ("each" if devices[0].on_gpu else "first")
        self.timeout = options.timeout
        self.check_replicas = options.check_replicas
        self.steps = 0
        self._busy = threading.Lock()
        self._training = False
        self._cpu_merge, self._merge_device = options.cpu_merge, self.devices[options.merge_device]
        self._communicator = communicator(self.devices)
        self._residence = HomeMemory(program, devices, self._communicator, on_host=options.cpu_relocation)
        self._home = self._residence.home
        self._generation = -1
        self._unsettled: Step | None = None
        self.replicas = [self._replicate(rank) for rank in range(len(devices))]
        self._spare = Rollback(self.replicas[0])
        self._buckets = self.replicas[0].gradients.buckets()
        self._communicator.prepare(self._buckets)
        for device in () if options.cpu_merge else self.devices:
            device.prepare_to_merge()
        self._held = AccumulatedGradients(self.replicas, self._communicator)
        self._share = shared_with(devices[1:CORES], options.timeout)
        self._reductions = Reductions(program, self._communicator, self._buckets, len(devices))
        self.timings: list[list[float]] = []
        self.times = Timings()

    # The two steps.

    def train(
        self,
        batch: Sequence[np.ndarray],
        *,
        structure: object = None,
        wants_outputs: bool = True,
        reduce: bool = True,
        while_running: Callable[[], object] | None = None,
    ) -> StepResult:
        """One training step on a global batch: all replicas end with the same new weights.

        Args:
            batch: arrays with the same number of rows (>= 1); read, never written, until this returns.
            structure: handed to the program as `Context.structure`.
            wants_outputs: merge the replicas' outputs too.
            reduce: False leaves the gradients on the replicas, for the next step that reduces: gradient
                accumulation. Loss terms and moments are added up, and the program's `update` runs, in any case.
            while_running: called when all work of the step is enqueued, before it is waited for: to fetch the next
                batch, and to `stage` it. What it raises ends the step, whose update then may or may not happen.

        Raises:
            ReplicaError: a replica failed (also an instance of what it failed with). No weight changed.
            DeviceTimeoutError: the step took longer than `timeout` seconds.
        """
        with self._begin(batch, structure, wants_outputs, trains=True) as step:
            step.reduces = reduce
            self._scatter(step, batch)
            self._reductions.begin(step, batch, self._held.count, self._ends)
            self._run(step, Replica.train)
            self._reduce(step)
            self._update(step)
            if while_running is not None:
                meanwhile(step, while_running, lambda: self._merge(step))
            return self._merge(step)

    def stage(self, batch: Sequence[np.ndarray]) -> bool:
        """Begin to copy the rows of the batch that comes next to the devices, while the present step runs.

        Args:
            batch: the very arrays that the next `train` or `predict` gets, unchanged from now until it is over.

        Another step may come first; of two staged batches the second counts. A step that fails forgets it.

        Returns:
            Whether all rows are on their way (or need no copies). Others wait for their step, without memory as yet.

        Raises:
            ValueError: arrays without rows, or of unequal length.
        """
        shards = self._deal_out(count_rows(batch))
        with one_step_at_a_time:
            return stage(batch, shards, self.devices)

    def forget_staged(self) -> None:
        """The batch that was staged is not going to come."""
        for device in self.devices:
            device.forget_staged()

    def predict(self, batch: Sequence[np.ndarray], *, structure: object = None) -> StepResult:
        """Forward only, on a global batch. Arguments, result and errors as in `train`."""
        with self._begin(batch, structure, True, trains=False) as step:
            self._scatter(step, batch)
            self._run(step, Replica.predict)
            return self._merge(step)

    # The five verbs.

    def _scatter(self, step: Step, batch: Sequence[np.ndarray]) -> None:
        """Each replica gets its rows of every array."""
        step.watch.scattering = time.perf_counter()
        step.batches = scatter(batch, step.shards, self.devices)
        step.watch.scattered = time.perf_counter()

    def _run(self, step: Step, work: Callable[[Replica, list[np.ndarray], Context], Result]) -> None:
        """Each replica works on its rows, and writes its outputs to their place."""
        step.results = [None] * len(step.shards)
        step.seconds = [0.0] * len(step.shards)
        for context, replica in zip(step.contexts, self.replicas, strict=False):
            replica.device.compute.enqueue(lambda c=context, r=replica: run_replica(step, r, c, work))  # type: ignore[misc]

    def _reduce(self, step: Step) -> None:
        """Gradients and sums are added up; every replica gets them, those without rows too."""
        if not step.reduces:
            self._held.reserve(len(step.shards))
            self._communicator.once(lambda: commit(step))
            return
        if step.reduction is not None:
            # Devices that do not update wait for the variables of the one that does, and so for the sums.
            self._communicator.finish(step.reduction, once=lambda: commit(step), readers=len(self._updating))
            return
        sources = self._held.hand_over(len(step.shards))
        self._communicator.all_reduce(*self._ends(sources), self._buckets, once=lambda: commit(step))

    def _update(self, step: Step) -> None:
        """Every replica gets the same update: by applying it to its own copy, or a copy of the first's."""
        # Before, not after: an update may happen even when nobody waits for it any more.
        self._home.generation += 1
        self._generation = step.generation = self._home.generation
        step.updating = self._updating if step.reduces else self.replicas
        # The other devices have nothing to do while the first updates for all.
        alone = len(step.updating) == 1 and len(self.replicas) > 1
        share = self._share if alone and getattr(self.program, "update_is_shared", False) else None
        threads = CORES if alone and share is None else step.threads
        for replica in step.updating:
            replica.device.compute.enqueue(partial(run_update, step, replica, self._spare, threads, share))
        if len(step.updating) < len(self.replicas):
            readers = None if step.reduction is None else len(step.updating)
            self._communicator.broadcast([replica.memory.variables for replica in self.replicas], readers)
        self._residence.follow(self.replicas[0].memory.variables, step)
        if step.reduces:
            self._held.clear()
        else:
            self._held.keep(len(step.shards))

    def _merge(self, step: Step) -> StepResult:
        """Wait for the replicas; outputs are together in row order."""
        if step.over:
            return step.kept()
        self._finish(step)
        step.watch.finished = time.perf_counter()
        trains = step.totals is not None
        if step.totals is None:
            add_up(step)
        else:
            self.program.committed()
            if self.check_replicas:
                self.assert_replicas_equal()
        assert step.totals is not None
        outputs = step.merger.result() if step.contexts[0].wants_outputs else []
        self.timings.append(step.seconds)
        del self.timings[:-1000]
        if trains:
            self.times.add(step.watch)
        notes, every_note = step.totals.notes, step.totals.every_note
        return StepResult(outputs, step.totals.sums, notes, step.shards[0].total, every_note)

    # The reduction.

    def _ends(self, sources: int) -> tuple[list[FlatBuffers], list[FlatBuffers]]:
        """The gradients of the first replicas, that have any, and of those that need the sum.

        GPUs all take part in a collective. In host memory a replica that gets the variables instead is left out.
        """
        every = [replica.gradients for replica in self.replicas]
        return every[:sources], every if self.devices[0].on_gpu else every[: len(self._updating)]

    # State.

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients of earlier steps wait on the replicas, or may do so once a given-up step has ended."""
        return self._held.count > 0 or self._unsettled is not None

    def fold(self) -> None:
        """Reduce the gradients that wait on the replicas now, and let the program take them over into its slots.

        Raises:
            ReplicaError, DeviceTimeoutError: as in `train`.
        """
        with self._begin([np.zeros(1)], None, False, trains=False) as step:
            self.steps -= 1  # it is none
            if not (sources := self._held.hand_over(0)):
                return
            self._communicator.all_reduce(*self._ends(sources), self._buckets)
            for replica in self._updating:
                replica.device.compute.enqueue(replica.fold)
            self._held.clear()
            self._residence.follow(self.replicas[0].memory.variables, step)
            self._home.generation += 1
            self._generation = self._home.generation
            self._finish(step)
            self.program.committed()

    @property
    def _updating(self) -> list[Replica]:
        """The replicas that apply the update themselves."""
        return self.replicas if self.update == "each" else self.replicas[:1]

    @property
    def buckets(self) -> int:
        """In how many buckets the gradients are reduced."""
        return len(self._buckets)

    @property
    def spare_nbytes(self) -> int:
        """Bytes of the copy from which a failed update is taken back."""
        return self._spare.nbytes

    def assert_replicas_equal(self) -> None:
        """Compare all replicas with the first, bit by bit.

        Raises:
            RuntimeError: a replica's variables or slots differ; the message names the device.
        """
        what = ("variables", "slots") if self.update == "each" else ("variables",)
        assert_equal(self.replicas, what, self.steps)

    def refresh(self) -> None:
        """Copy the home's variables and the first replica's slots to all others. Enqueued, not waited for."""
        self._residence.lead(self.replicas[0].memory.variables)
        self._communicator.broadcast([replica.memory.variables for replica in self.replicas])
        if self.update == "each":
            self._communicator.broadcast([replica.memory.slots for replica in self.replicas])
        self.program.committed()
        self._generation = self._home.generation

    def _replicate(self, rank: int) -> Replica:
        """Make the replica of one device; the first lives in the program's home."""
        device, program = self.devices[rank], self.program
        gradients = FlatBuffers(program.gradients, device)
        own = program.slots if self.update == "each" else []
        slots = program.home_slots(device) if rank == 0 else FlatBuffers(own, device)
        return Replica(program, device, rank, Memory(self._residence.variables(rank, device), slots, gradients))

    # Around a step.

    def _begin(self, batch: Sequence[np.ndarray], structure: object, wants_outputs: bool, *, trains: bool) -> StepScope:
        """Check the batch, deal out the rows, and make sure that the replicas are up to date."""
        total = count_rows(batch)
        shards = self._deal_out(total)
        rendezvous = Rendezvous(len(shards), self.timeout)
        contexts = [
            Context(rank, rows, self.steps, rendezvous, len(shards), batch, structure, wants_outputs, device)
            for rank, (rows, device) in enumerate(zip(shards, self.devices, strict=False))
        ]
        merger = Merger(shards, self.devices, self._merge_device, on_host=self._cpu_merge)
        watch = Watch([rows.count for rows in shards], len(self.replicas))
        step = Step(shards, contexts, merger, rendezvous, max(1, CORES // len(shards)), watch)
        return StepScope(self, step, trains)

    def _deal_out(self, total: int) -> list[Rows]:
        """The rows of each replica that has any."""
        most = getattr(self.program, "most_replicas", len(self.replicas))
        return split_rows(total, min(most, len(self.replicas)))

    def _finish(self, step: Step) -> None:
        """Wait until all devices are done; on a failure clean up and raise it."""
        events = [replica.device.compute.record() for replica in self.replicas]
        try:
            if step.reduction is not None:
                step.reduction.serve(joined(events), self.timeout)
            else:
                joined(events).finish(self.timeout)
        except DeviceTimeoutError:
            busy = [self.devices[rank].name for rank, result in enumerate(step.results) if result is None]
            what = f"The step on {busy}" if busy else "The update"
            raise DeviceTimeoutError(f"{what} took longer than timeout={self.timeout} seconds.") from None
        failed = [(rank, event.error) for rank, event in enumerate(events) if event.error is not None]
        if failed:
            self._settle()
            raise step_error(step.failures or failed, step, self.devices)
        self._communicator.check()

    def _settle(self) -> None:
        """Wait for what a failed or abandoned step left on the devices; take back an update that not all made."""
        for device in self.devices:
            device.synchronize(self.timeout)
        for device in self.devices:
            device.recover()
        self._communicator.recover()
        step, self._unsettled = self._unsettled, None
        # Another generation: another engine has gone on from what there was.
        if step is None or not step.updates_begun or self._home.generation != step.generation:
            return
        if step.restorable and len(step.updates_done) < len(step.updating):
            self._spare.restore(self.replicas)
        elif self._residence.apart and not step.came_home:  # all go on from the first
            self._home.variables.copy_from(self.replicas[0].memory.variables)
