"""`DataParallel`: runs a program on several devices as if on one, by scatter, run, reduce, update and merge."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.comm.processes import launched
from fastdp.comm.scatter_merge import Merger, stage
from fastdp.comm.select import communicator
from fastdp.comm.transport import Transport
from fastdp.comm.tuning import tune
from fastdp.engine.accumulation import AccumulatedGradients
from fastdp.engine.across import StepAcross, connect
from fastdp.engine.fingerprint import FINGERPRINTED, writer
from fastdp.engine.home import HomeMemory
from fastdp.engine.host_launch import HostLaunch
from fastdp.engine.inspection import Inspection
from fastdp.engine.make_report import Reporting
from fastdp.engine.recovery import Recovery
from fastdp.engine.reductions import ProcessesReductions, Reductions
from fastdp.engine.replica_work import abort_if_skipped, run_replica, scatter_rows, sum_rest
from fastdp.engine.replicas import Call, Replica, ReplicaGroup
from fastdp.engine.rollback import Rollback
from fastdp.engine.state import EngineState
from fastdp.engine.step import Step, StepResult, make_step
from fastdp.engine.step_scope import StepScope, alone, meanwhile, turn_of
from fastdp.engine.survival import Survival
from fastdp.engine.timing import Timings
from fastdp.engine.updates import Updates, update_mode
from fastdp.engine.waiting_gradients import WaitingGradients
from fastdp.errors import OthersBusyError
from fastdp.options import Options, one_of
from fastdp.program.base import Program, Result, as_program
from fastdp.runtime.roster import Roster
from fastdp.runtime.select import devices_of_engine
from fastdp.shard import Rows
from fastdp.tracing import nvtx
from fastdp.tracing.spans import span
from fastdp.tracing.trace import Traceable

ProgramT_co = TypeVar("ProgramT_co", bound=Program, covariant=True)
_NOTHING = nullcontext()
Arrays = Sequence[np.ndarray]
Work = Callable[[Replica, list[np.ndarray], Context], Result]


class DataParallel(Traceable, Reporting, Inspection, Survival, WaitingGradients, Generic[ProgramT_co]):
    """Runs a program on several devices as if on one.

    Args:
        program: what each replica runs: a `fastdp.program.base.Program`, or an object with its members.
        devices: the devices of the replicas, in the order of the rows, or a value as for `gpus=` in `fastdp.wrap` (a
            number, a list of ordinals, None for all), or the `Roster` of a model that has several engines.
        timeout, update, cpu_merge, merge_device, cpu_relocation, check_replicas, shards, on_nonfinite,
            fingerprint, grad_dtype, on_oom, on_device_loss: as in `fastdp.wrap`.
        options: an object with all of these, instead of keywords.

    `size` is the number of replicas, of all processes where torchrun has started several.
    The engine owns the replicas' memory. For updates that may fail it also owns a snapshot of the first replica's
    variables and slots, used to roll back a failed update. One thread at a time uses the engine. The devices have
    threads; the engine has none.

    Raises:
        ValueError: `devices` is invalid, or `update` is unknown.
        TypeError: `program` lacks a member of `Program`, or `options` and one of its keywords are both given.
    """

    def __init__(
        self,
        program: ProgramT_co,
        devices: Any = None,
        *,
        timeout: float = 1800.0,
        update: str | None = None,
        cpu_merge: bool = True,
        merge_device: int = 0,
        cpu_relocation: bool = False,
        check_replicas: bool = False,
        shards: int | None = None,
        on_nonfinite: str | None = None,
        fingerprint: str | os.PathLike[str] | None = None,
        grad_dtype: str | None = None,
        on_oom: str = "raise",
        on_device_loss: str = "raise",
        options: Options | None = None,
    ) -> None:
        keywords = Options(
            timeout=timeout,
            update=update,
            cpu_merge=cpu_merge,
            merge_device=merge_device,
            cpu_relocation=cpu_relocation,
            check_replicas=check_replicas,
            shards=shards,
            on_nonfinite=on_nonfinite,
            fingerprint=fingerprint,
            grad_dtype=grad_dtype,
            on_oom=on_oom,
            on_device_loss=on_device_loss,
        )
        options = one_of(options, keywords)
        nvtx.follow_environment()
        if not isinstance(devices, Roster):
            devices = Roster.on_shards(devices_of_engine(devices, options.merge_device), options, launched())
        self.program = program
        self.check_replicas = options.check_replicas
        self._roster, self._options = devices, options
        self._program = as_program(program)
        self.update = update_mode(self._program, options, devices.formation().devices)
        self._state = EngineState(options.timeout)
        self._cpu_merge = options.cpu_merge
        sent = options.grad_dtype
        self._transport = None if sent is None else Transport(sent, self._program.scales_loss)
        self.formed = 0
        self._form()

    def _form(self) -> None:
        """Make the replicas on the roster's present devices. Those of before end; gradients that wait are kept."""
        options = self._options
        self._version, self.formation = self._roster.version, self._roster.formation()
        devices = self.devices = self.formation.devices
        self._merge_device = self.formation.merge
        held = list(self._accumulation.sums) if self.formed else []
        if self.formed:
            self._program.unbind(self.formation.deal)
        self.times = Timings()
        self._communicator = communicator(devices)
        self._communicator.send_by(self._transport)
        if options.deterministic:
            self._communicator.choice.use(None)
        elif self._communicator.choice.untuned:
            with suppress(OthersBusyError), alone(patient=False):  # beside a step that hangs built-in sizes do
                tune(self._communicator, devices)
        home = HomeMemory(self._program, devices, self._communicator, on_host=options.cpu_relocation)
        self.group = ReplicaGroup(self._program, self.devices, home, self._communicator, self.update)
        self.replicas = self.group.every
        parts = self.group.in_parts
        self.rollback = Rollback(self.replicas[0], parts=parts, always=parts and options.survives)
        self._recovery = Recovery(self._state, self.group, self._communicator, self.rollback)
        if not self.formed:
            self._across = connect(devices, options, self._transport)
        self.size = len(devices)
        if self._across is not None:
            self._across.copy_first(self.replicas[0].lasting)
            self.size = self._across.size
        self._communicator.prepare(self.group.buckets)
        for device in () if options.cpu_merge else devices:
            device.prepare_to_merge()
        self._accumulation = AccumulatedGradients(self.replicas, self._communicator)
        about = self.group, self._communicator, self._accumulation
        self._reductions = Reductions(*about) if self._across is None else ProcessesReductions(*about, self._across)
        self.host_launch = HostLaunch(self._state, self.group, self._reductions, self._recovery)
        skipped = self.skipped_steps if self.formed else 0
        self._updates = Updates(self.group, self.rollback, self._accumulation, options, skipped)
        writes = self._across is None or self._across.first == 0  # the other processes have the same weights
        self._fingerprint = writer(options, self.group) if writes else None
        if self._fingerprint is not None or options.on_nonfinite is not None:
            self._reductions.needs_whole = True
        self._accumulation.take_over(held)
        self.formed += 1

    def train(
        self,
        batch: Batch | Arrays,
        *,
        structure: object = None,
        wants_outputs: bool = True,
        reduce: bool = True,
        while_running: Callable[[], object] | None = None,
    ) -> StepResult:
        """Run one training step on a global batch. All replicas end with the same new weights.

        Args:
            batch: arrays with the same number of rows (>= 1), or a `Batch` of them. Read, never written, until this
                returns.
            structure: passed to the program as `Context.structure`. A `Batch` has its own.
            wants_outputs: merge the replicas' outputs too.
            reduce: False leaves the gradients on the replicas for the next step that reduces (gradient
                accumulation). Loss terms and moments are still summed, and the program's `update` still runs.
            while_running: called after all work of the step is enqueued, before the engine waits for it. Meant to
                fetch the next batch and `stage` it. An exception from it ends the step, whose update may or may not
                happen.

        Raises:
            ReplicaError: a replica failed; also an instance of the original exception's class. No weight changed.
            DeviceTimeoutError: the step took longer than `timeout` seconds.
        """
        batch = batch if type(batch) is Batch else Batch.of(batch, structure)
        return self.surviving(partial(self._train, batch, wants_outputs, reduce, [while_running]))

    def _train(
        self, batch: Batch, wants_outputs: bool, reduce: bool, once: list[Callable[[], object] | None]
    ) -> StepResult:
        """As `train`. `once` has `while_running`, which is called by one try only."""
        with self._begin("train", batch, self._most, wants_outputs, reduces=reduce) as step:
            with self.host_launch.of(step) if self.host_launch.enabled else _NOTHING:
                self._scatter(step)
                self._run(step, Replica.train, has_gradients=True)
                self._reduce(step)
                self._update(step)
            while_running = once[0]
            if while_running is not None:
                once[0] = None
                meanwhile(step, partial(self._state.fetch, while_running), partial(self._merge, step))
            return self._merge(step)

    def predict(self, batch: Batch | Arrays, *, structure: object = None) -> StepResult:
        """Run the forward pass on a global batch. Arguments, result and errors as in `train`."""
        batch = batch if type(batch) is Batch else Batch.of(batch, structure)
        return self._forward("predict", batch, lambda: self._most, Replica.predict)

    def call(self, batch: Batch, work: Call, formed: int | None = None) -> StepResult:
        """Run `work(state, rows, context)` on each replica in place of the program's `predict`.

        The rows are split over all devices, regardless of the program's `most_replicas`. Result and errors as in
        `train`.

        Args:
            formed: for a backward pass, the engine's `formed` at its forward pass.
        """
        run = partial(self._forward, "call", batch, lambda: self.size, partial(Replica.call, work=work))
        return run() if formed is None else self.through_graphs(formed, run)

    def backward(self, batch: Batch, work: Call, formed: int | None = None, whole: str = "") -> StepResult:
        """Run a backward pass: `work(state, rows, context)` on each replica, which writes its gradients to the state's
        buffers. They are summed, and nothing is updated.

        The sums are in the first replica's buffers when this returns. The rows are split as in `call`, whose graphs
        the work may go back through. Result and errors as in `train`.

        Args:
            batch: a batch of as many rows as that of the forward pass; its arrays are handed out as there.
            work: as in `call`.
            formed: the engine's `formed` at the forward pass; None: now.
            whole: why the rows of a device cannot run in parts; empty if they can.

        Raises:
            GraphsLostError: the graphs are those of replicas that are no more.
        """
        run = partial(self._backward, batch, work)
        return self.through_graphs(self.formed if formed is None else formed, run, whole)

    def _backward(self, batch: Batch, work: Call) -> StepResult:
        """As `backward`."""
        with self._begin("backward", batch, self.size) as step:
            self._scatter(step)
            self._run(step, partial(Replica.call, work=work), has_gradients=True)
            self._reduce(step)
            self._updates.check(step)
            return self._merge(step)

    def stage(self, batch: Batch | Arrays) -> bool:
        """Prefetch the next batch: start to copy its rows to the devices while the current step runs.

        Args:
            batch: the arrays that the next `train` or `predict` will get (the same objects, unchanged until it
                returns), or the `Batch` of them.

        Another step may come first. A second staged batch replaces the first. A failed step drops the staged batch.

        Returns:
            Whether all rows are being copied or need no copy. Otherwise some rows, for which there is no memory yet,
            are copied by their step.

        Raises:
            ValueError: arrays without rows, or of unequal length.
        """
        batch = batch if type(batch) is Batch else Batch.of(batch)
        shards = self._step_of(batch, "stage", self._most)[0]
        with turn_of(self.devices, self.timeout), span("stage"), self.host_launch.staging(batch.arrays):
            return stage(batch.arrays, shards, self.devices)

    def forget_staged(self) -> None:
        """Drop the staged batch, which will not be used."""
        for device in self.devices:
            device.forget_staged()

    # The five verbs.

    def _scatter(self, step: Step) -> None:
        """Give each replica its rows of every array."""
        step.watch.verb = "scatter"
        step.watch.scattering = time.perf_counter()
        if step.by_host:
            self.host_launch.scatter(step)
        else:
            scatter_rows(step, self.devices)
        step.watch.scattered = time.perf_counter()

    def _run(self, step: Step, work: Work, *, has_gradients: bool = False) -> None:
        """Enqueue each replica's work on its rows. A replica writes its outputs to their rows of the merged arrays."""
        step.watch.verb = "run"
        step.results = [None] * len(step.shards)
        if step.by_host:
            self.host_launch.run(step)
            return
        if step.here:
            self.replicas[0].device.compute.issue_here(run_replica, step, self.replicas[0], step.contexts[0], work)
            return
        if has_gradients:
            self._reductions.begin(step)
        for context, replica in zip(step.contexts, self.replicas, strict=False):
            compute = replica.device.compute
            compute.enqueue(partial(run_replica, step, replica, context, work))
            if replica.device.on_gpu:
                abort_if_skipped(step, compute.mark())

    def _reduce(self, step: Step) -> None:
        """Enqueue the reduction of gradients and sums. Every replica gets them, even without rows."""
        step.watch.verb = "reduce"
        if step.by_host:
            self.host_launch.reduce(step)
        else:
            self._reductions.finish(step)

    def _update(self, step: Step) -> None:
        """Enqueue the update. Each replica applies it itself, or gets a copy of the first replica's variables."""
        step.watch.verb = "update"
        self._updates.begin(step, accumulates=0 if step.reduces else len(step.shards))

    def _merge(self, step: Step) -> StepResult:
        """Wait for the replicas, and return the outputs merged in row order."""
        if step.over:
            return step.kept()
        step.watch.verb = "merge"
        self._recovery.finish(step)
        step.watch.finished = time.perf_counter()
        sum_rest(step)
        if step.trains:
            self._program.committed()
            if self.check_replicas:
                self.assert_replicas_equal()
        assert step.totals is not None
        outputs = step.merger.result() if step.contexts[0].wants_outputs else []
        if step.trains:
            self.times.add(step.watch)
        if self._fingerprint is not None and step.kind in FINGERPRINTED:
            self._fingerprint.add(step.kind, step.totals, step.batch.arrays, step.batch.rows)
        notes, every_note = step.totals.notes, step.totals.every_note
        return StepResult(outputs, step.totals.sums, notes, step.batch.rows, every_note, step.skipped)

    def _forward(self, kind: str, batch: Batch, most: Callable[[], int], work: Work) -> StepResult:
        """Run a step without gradients, on at most so many replicas."""

        def once() -> StepResult:
            with self._begin(kind, batch, most()) as step:
                self._scatter(step)
                self._run(step, work)
                return self._merge(step)

        return self.surviving(once)

    # Around a step.

    @property
    def _most(self) -> int:
        """How many replicas may share a step of the program."""
        return min(self._program.most_replicas, self.size)

    def _step_of(self, batch: Batch, kind: str, most: int) -> tuple[Sequence[Rows], StepAcross | None]:
        """Split the rows over at most so many replicas: those of this process, and its part in a step of several."""
        if self._across is None:
            return batch.deal(self.deal.limited(most)), None
        across = self._across.step(batch, kind, most, self._program)
        return across.shards, across

    def _begin(
        self, kind: str, batch: Batch, most: int, wants_outputs: bool = True, *, reduces: bool = True
    ) -> StepScope[Step]:
        """Make a step on at most so many replicas. It begins when the returned scope is entered."""
        if self._fingerprint is not None and kind in FINGERPRINTED:
            self._fingerprint.begin()
        shards, across = self._step_of(batch, kind, most)
        merge = partial(Merger, shards) if across is None else across.merger
        merger = merge(self.devices, self._merge_device, on_host=self._cpu_merge)
        step = make_step(
            batch,
            shards,
            self.devices,
            self._state.steps,
            self._state.timeout,
            merger,
            cores=self._program.cores,
            wants_outputs=wants_outputs,
            kind=kind,
            reduces=reduces,
            across=across,
            tight=self.formation.tight,
        )
        return StepScope(self._state, self._recovery, self.group, step)
