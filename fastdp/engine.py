"""The engine: scatter, run, reduce, update, merge."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np

from fastdp.backend.queue import QueueDevice, joined
from fastdp.buckets import FlatBuffers
from fastdp.comm.choose import communicator
from fastdp.comm.rendezvous import Rendezvous
from fastdp.device import resolve
from fastdp.errors import DeviceTimeoutError
from fastdp.program.base import Context, Memory, Program, Result
from fastdp.replica import Replica
from fastdp.shard import CORES, split_rows
from fastdp.step import Step, StepResult, add_up, commit, run_replica, step_error
from fastdp.timing import Timings, Watch
from fastdp.transfer import Merger, count_rows, scatter

# Steps of different engines that share devices must not interleave: replicas block in exchanges.
_one_step_at_a_time = threading.RLock()


class DataParallel:
    """Runs a program on several devices as if on one.

    Args:
        program: what each replica runs (`fastdp.program.base.Program`).
        devices: one replica per device, in the order of the rows: devices, or what `gpus=` takes elsewhere (a
            number, a list of ordinals, None for all).
        timeout: seconds that one step may take before it is given up.
        update: "first" applies the update on the first device, with all cores, and copies the new variables to the
            others, which is faster where devices outnumber the cores that they share. "each" applies it on every
            device to its own copy. The results have the same bits. None: "each" on GPUs, "first" elsewhere.
        cpu_merge: merge outputs in host memory; otherwise in that of the device `merge_device`, as its arrays.
        merge_device: place of a device in `devices`.
        check_replicas: after each update, verify that all replicas are bitwise equal (for debugging).

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
        check_replicas: bool = False,
    ) -> None:
        if not _are_devices(devices):
            devices = resolve(devices, caller="fastdp.DataParallel")
        if not devices or len({id(device) for device in devices}) != len(devices):
            raise ValueError(f"`devices` must be one or more different devices. Received: {list(devices)}")
        if update is None:
            update = "each" if devices[0].on_gpu else "first"
        if isinstance(merge_device, bool) or merge_device not in range(len(devices)):
            raise ValueError(
                f"`merge_device` must be the place of one of the {len(devices)} devices, from 0. "
                f"Received: merge_device={merge_device!r}"
            )
        if update not in ("first", "each"):
            raise ValueError(f'`update` must be "first" or "each". Received: update={update!r}')
        self.program = program
        self.devices = list(devices)
        self.update = update
        self.timeout = timeout
        self.check_replicas = check_replicas
        self.steps = 0
        self._busy = threading.Lock()
        self._training = False
        self._cpu_merge, self._merge_device = cpu_merge, self.devices[merge_device]
        self._communicator = communicator(self.devices)
        self._home = program.home(devices[0])
        self._generation = -1
        self._unsettled: Step | None = None
        self.replicas = [self._replicate(rank) for rank in range(len(devices))]
        self._saved = [FlatBuffers(flat.specs, devices[0]) for flat in self.replicas[0].lasting]
        self._updated = False
        self._buckets = self.replicas[0].gradients.buckets()
        self.timings: list[list[float]] = []
        self.times = Timings()

    # The two steps.

    def train(self, batch: Sequence[np.ndarray], *, structure: object = None, wants_outputs: bool = True) -> StepResult:
        """One training step on a global batch: all replicas end with the same new weights.

        Args:
            batch: arrays with the same number of rows (>= 1); read, never written, until this returns.
            structure: handed to the program as `Context.structure`.
            wants_outputs: merge the replicas' outputs too.

        Raises:
            ReplicaError: a replica failed (also an instance of what it failed with). No weight changed.
            DeviceTimeoutError: the step took longer than `timeout` seconds.
        """
        with self._begin(batch, structure, wants_outputs, trains=True) as step:
            self._scatter(step, batch)
            self._run(step, Replica.train)
            self._reduce(step)
            self._update(step)
            return self._merge(step)

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
        active = [replica.gradients for replica in self.replicas[: len(step.shards)]]
        every = [replica.gradients for replica in self.replicas]
        self._communicator.all_reduce(active, every, self._buckets, once=lambda: commit(step))

    def _update(self, step: Step) -> None:
        """Every replica gets the same update: by applying it to its own copy, or a copy of the first's."""

        def apply(replica: Replica) -> None:
            assert step.totals is not None
            step.watch.update_began[replica.rank] = time.perf_counter()
            try:
                if replica.rank == 0:
                    step.restorable = self._save()
                    step.updates_begun = True
                # The other devices have nothing to do while the first updates for all.
                replica.prepare_thread(CORES if self.update == "first" else step.threads)
                replica.update(step.totals)
                step.updates_done.append(replica.rank)
                step.watch.update_ended[replica.rank] = time.perf_counter()
                self._updated = True
            except BaseException as error:
                step.failures.append((replica.rank, error))
                raise

        # Before, not after: an update may happen even when nobody waits for it any more.
        self._home.generation += 1
        self._generation = step.generation = self._home.generation
        for replica in self._updating:
            replica.device.compute.enqueue(lambda r=replica: apply(r))  # type: ignore[misc]
        if len(self._updating) < len(self.replicas):
            self._communicator.broadcast([replica.memory.variables for replica in self.replicas])

    def _merge(self, step: Step) -> StepResult:
        """Wait for the replicas; outputs are together in row order."""
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
        return StepResult(outputs, step.totals.sums, step.totals.notes, step.shards[0].total)

    # State.

    @property
    def _updating(self) -> list[Replica]:
        """The replicas that apply the update themselves."""
        return self.replicas if self.update == "each" else self.replicas[:1]

    @property
    def spare_nbytes(self) -> int:
        """Bytes of the copy from which a failed update is taken back."""
        return sum(saved.nbytes for saved in self._saved)

    def assert_replicas_equal(self) -> None:
        """Compare all replicas with the first, bit by bit.

        Raises:
            RuntimeError: a replica's variables or slots differ; the message names the device.
        """
        first = self.replicas[0].memory
        for replica in self.replicas[1:]:
            for what in ("variables", "slots") if self.update == "each" else ("variables",):
                if not getattr(first, what).equals(getattr(replica.memory, what)):
                    raise RuntimeError(
                        f"The {what} on {replica.device.name} differ from those on {self.devices[0].name} "
                        f"after step {self.steps}. This is a bug in fastdp or in the program's update."
                    )

    def refresh(self) -> None:
        """Copy the first replica's variables and slots to all others. Enqueued, not waited for."""
        self._communicator.broadcast([replica.memory.variables for replica in self.replicas])
        if self.update == "each":
            self._communicator.broadcast([replica.memory.slots for replica in self.replicas])
        self.program.committed()
        self._generation = self._home.generation

    def _replicate(self, rank: int) -> Replica:
        """Make the replica of one device; the first lives in the program's home."""
        device, program = self.devices[rank], self.program
        gradients = FlatBuffers(program.gradients, device)
        if rank == 0:
            memory = Memory(self._home.variables, program.home_slots(device), gradients)
        else:
            variables = FlatBuffers(self._home.variables.specs, device)
            slots = FlatBuffers(program.slots if self.update == "each" else [], device)
            memory = Memory(variables, slots, gradients)
        return Replica(program, device, rank, memory)

    # Around a step.

    def _begin(
        self, batch: Sequence[np.ndarray], structure: object, wants_outputs: bool, *, trains: bool
    ) -> _StepScope:
        """Check the batch, deal out the rows, and make sure that the replicas are up to date."""
        total = count_rows(batch)
        shards = split_rows(total, len(self.replicas))
        rendezvous = Rendezvous(len(shards), self.timeout)
        contexts = [
            Context(rank, rows, self.steps, rendezvous, len(shards), batch, structure, wants_outputs, device)
            for rank, (rows, device) in enumerate(zip(shards, self.devices, strict=False))
        ]
        threads = max(1, CORES // len(shards))
        merger = Merger(shards, self.devices, self._merge_device, on_host=self._cpu_merge)
        watch = Watch([rows.count for rows in shards], len(self.replicas))
        return _StepScope(self, Step(shards, contexts, merger, rendezvous, threads, watch), trains)

    def _finish(self, step: Step) -> None:
        """Wait until all devices are done; on a failure clean up and raise it."""
        events = [replica.device.compute.record() for replica in self.replicas]
        try:
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

    def _save(self) -> bool:
        """Keep the first replica's variables and slots as they are before an update; False if not needed.

        An update that runs none of the user's code and has succeeded before is relied on, and saves a copy of all
        variables and slots.
        """
        if self._updated and self.program.update_is_reliable:
            self._saved = []
            return False
        if not self._saved:  # given up before; the program has changed its mind
            self._saved = [FlatBuffers(flat.specs, self.devices[0]) for flat in self.replicas[0].lasting]
        for saved, flat in zip(self._saved, self.replicas[0].lasting, strict=True):
            saved.copy_from(flat)
        return True

    def _settle(self) -> None:
        """Wait for what a failed or abandoned step left on the devices; take back an update that not all made."""
        for device in self.devices:
            device.synchronize(self.timeout)
        for device in self.devices:
            device.recover()
        step, self._unsettled = self._unsettled, None
        if step is None or not step.updates_begun or len(step.updates_done) == len(self._updating):
            return
        # Another generation: another engine has gone on from what there was.
        if step.restorable and self._home.generation == step.generation:
            for replica in self.replicas:
                for saved, flat in zip(self._saved, replica.lasting, strict=True):
                    flat.copy_from(saved)


def _are_devices(devices: Any) -> bool:
    """Whether these are devices, and not numbers that name some."""
    return isinstance(devices, (list, tuple)) and any(isinstance(device, QueueDevice) for device in devices)


class _StepScope(AbstractContextManager[Step]):
    """Holds the locks of one step and the program's own scope, and brings stale replicas up to date."""

    def __init__(self, engine: DataParallel, step: Step, trains: bool) -> None:
        self._engine = engine
        self._step = step
        self._trains = trains
        self._running: AbstractContextManager[None] | None = None

    def __enter__(self) -> Step:
        engine = self._engine
        self._take()
        try:
            if not _one_step_at_a_time.acquire(timeout=engine.timeout):
                raise TimeoutError(f"Another model kept the devices busy for {engine.timeout} seconds.")
            try:
                self._prepare()
            except BaseException as error:
                self._abandon(error)
                _one_step_at_a_time.release()
                raise
        except BaseException:
            engine._busy.release()
            raise
        return self._step

    def _take(self) -> None:
        """Wait until the engine is free. Two threads that train one model are a mistake, and told so at once.

        Raises:
            RuntimeError: another thread is training this model.
            DeviceTimeoutError: the engine was not free in time.
        """
        engine = self._engine
        if not engine._busy.acquire(blocking=False):
            if self._trains and engine._training:
                raise RuntimeError(
                    "This model is already running a step in another thread. Train one parallel model from one thread "
                    "at a time."
                )
            if not engine._busy.acquire(timeout=engine.timeout):
                raise DeviceTimeoutError(f"Another thread kept this model busy for {engine.timeout} seconds.")
        engine._training = self._trains

    def _prepare(self) -> None:
        """Clean up after a step that nobody waited for, and refresh replicas that are stale."""
        engine = self._engine
        threads = self._step.threads
        # Left by this engine, or by another one on the same devices.
        if engine._unsettled is not None or any(device.unsettled for device in engine.devices):
            engine._settle()
        engine._unsettled = self._step
        # Both are asked: the second also re-adopts variables whose memory was replaced.
        changed = engine.program.changed_outside()
        if changed:  # `committed()` forgets it: the number tells the other engines on this home
            engine._home.generation += 1
        if engine._generation != engine._home.generation:
            engine.refresh()
        self._running = engine.program.running(threads)
        self._running.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        engine = self._engine
        try:
            if error is None:
                engine._unsettled = None
            else:
                self._abandon(error)
            if self._running is not None:
                self._running.__exit__(None, None, None)
        finally:
            engine.steps += 1
            _one_step_at_a_time.release()
            engine._busy.release()

    def _abandon(self, error: BaseException) -> None:
        """Nobody waits for this step any more: stop what still runs, and let the next one clean up.

        After a failure of a replica, a timeout, an interrupt of this thread, or a device that is closed.
        """
        self._step.rendezvous.abort(error)
        self._engine._generation = -1
        for device in self._engine.devices:
            device.unsettled = True
