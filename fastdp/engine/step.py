"""One step in flight: its batch, its replicas' contexts and results, how far it has come, and its error."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from fastdp.comm.base import Reduction
from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.comm.scatter_merge import Merger
from fastdp.comm.turns import Turn, turns_of
from fastdp.engine.across import StepAcross
from fastdp.engine.replicas import Replica
from fastdp.engine.timing import TracedWatch, Watch
from fastdp.errors import ProcessError, StepAborted, replica_error_class
from fastdp.program.base import Launched, Result, Totals
from fastdp.runtime.queue import QueueDevice, QueueEvent
from fastdp.shard import Rows
from fastdp.tracing.spans import now


@dataclass(slots=True)
class StepResult:
    """A step's result for the caller: merged outputs (owned by the caller), summed numbers, the number of rows, the
    first replica's notes and those of all replicas, and whether the update was skipped."""

    outputs: list[np.ndarray]
    sums: np.ndarray
    notes: Any
    rows: int
    every_note: list[Any] = field(default_factory=list)
    skipped: bool = False


class UpdateCheck(Protocol):
    """Decides whether an update is made (`fastdp.engine.nonfinite`)."""

    def passes(self, operation: Operation, replica: Replica) -> bool:
        """Whether a replica may make the update. On its device's worker."""

    def note(self, operation: Operation) -> None:
        """Count an operation whose update was skipped. On the host thread."""


@dataclass(slots=True)
class Operation:
    """Work of all replicas in flight: a step, an update by accumulated gradients, or the folding of them.

    Args:
        threads: cores that one replica may use inside one operation of the program.
        cores: cores that all replicas may use together.
        trains: whether there is an update, or a forward pass only.
        totals: what the update gets; None until the sums are there.

    `generation` is the number of its update (see `ReplicaGroup.advance`). `restorable`: a snapshot of the variables
    and slots has been taken. `came_home`: the program's own variables equal the first replica's. `cut_short` is the
    communicator's count from before the operation. `by_host`: the host thread does what workers would do
    (`fastdp.engine.host_launch`). `here`: its only device's work runs on the calling thread as soon as it is enqueued.
    `prepared`: it is prepared for all devices at once, by `Program.launching`. `ends`
    are the ends of the devices' compute work, if they have been recorded. `close` ends the operation
    (`fastdp.engine.step_scope`); None when it is not open. `kind` is its name in traces. `check` decides whether its
    update is made, and `skipped` tells that it was not. `verbs` are the verbs of its failures, by the exception's id.
    `blamed` is the rank that a failure of the whole step came from; None if that is unknown, -1 if there is none.
    """

    threads: int
    cores: int
    kind: str = "fold"
    reduction: Reduction | None = None
    failures: list[tuple[int, BaseException]] = field(default_factory=list)
    generation: int = -1
    updates_begun: bool = False
    restorable: bool = True
    updates_done: list[int] = field(default_factory=list)
    updating: Sequence[Replica] = ()
    came_home: bool = False
    cut_short: int = 0
    ends: Sequence[QueueEvent] = ()
    close: Callable[[BaseException | None], None] | None = None
    trains: bool = False
    totals: Totals | None = None
    by_host: bool = False
    here: bool = False
    prepared: bool = False
    check: UpdateCheck | None = None
    skipped: bool = False
    verbs: dict[int, str] = field(default_factory=dict)
    blamed: int | None = -1

    counts: ClassVar[bool] = False

    def fail(self, rank: int, error: BaseException, verb: str) -> None:
        """Note a replica's failure, and in which verb it came."""
        self.verbs.setdefault(id(error), verb)
        self.failures.append((rank, error))

    def abandon(self, error: BaseException) -> None:
        """Stop the operation after this error. Nobody waits for it any more."""
        if self.reduction is not None:
            self.reduction.abandon(error)

    @property
    def active(self) -> int:
        """The number of replicas that have rows; 0 if that is not the question."""
        return 0

    def end(self) -> None:
        """Let go of the error that has ended it. Called when it is over, and nobody waits for it any more."""

    def unfinished(self, devices: Sequence[QueueDevice], late: Sequence[str]) -> str:
        """Name the work that has not ended, for the message of a timeout. `late`: as in `Communicator.late`."""
        return f"The all-reduce, which {list(late)} did not come to," if late else "The update"

    def rows_of(self, rank: int) -> tuple[str, tuple[int, int] | None]:
        """A replica's rows, as text for a message and as (start, stop); empty and None if there is no batch."""
        return "", None

    def verb_of(self, rank: int) -> str:
        """The verb in which a device's stream has failed, outside of the replica's own work."""
        return "reduce"

    def update_began(self, rank: int) -> None:
        """A replica begins its update. Only the updates of steps are timed."""

    def update_ended(self, rank: int) -> None:
        """A replica has made its update."""

    def note_home(self) -> None:
        """Note that the program's own variables, which lie apart from any replica's, have the new values."""
        self.came_home = True


@dataclass(slots=True)
class Step(Operation):
    """One step in flight.

    Args:
        batch: the global batch.
        shards: the rows of each replica that has any.
        contexts: the contexts of these replicas, in rank order.
        reduces: whether gradients are reduced; otherwise they stay on the replicas.
        turns: by rank, the turns of replicas that are shards of one device.

    `launched`: by rank, the replicas' steps that the host thread has launched.

    `across` is the step's part in that of several processes, if there are several.

    `sums_left`: its gradients are summed by the thread that waits for it.

    `over`, `outcome` and `error` are for a step that ends while its thread does something else: see
    `step_scope.meanwhile`.
    """

    batch: Batch = field(kw_only=True)
    shards: Sequence[Rows] = field(kw_only=True)
    contexts: list[Context] = field(kw_only=True)
    merger: Merger = field(kw_only=True)
    rendezvous: Rendezvous = field(kw_only=True)
    watch: Watch = field(kw_only=True)
    reduces: bool = field(kw_only=True)
    turns: Sequence[Turn | None] = field(kw_only=True)
    batches: list[list[np.ndarray]] = field(default_factory=list)
    results: list[Result | None] = field(default_factory=list)
    launched: list[Launched] = field(default_factory=list)
    over: bool = False
    outcome: StepResult | None = None
    error: BaseException | None = None
    across: StepAcross | None = None
    sums_left: bool = False

    counts: ClassVar[bool] = True

    def abandon(self, error: BaseException) -> None:
        """Wake replicas that wait for each other. An update that has not begun will not begin."""
        self.rendezvous.abort(error)
        if self.across is not None and self.results:
            self.across.fail(error)
        Operation.abandon(self, error)  # not `super()`: slots=True makes the class twice, and it refers to the first

    def end(self) -> None:
        """As `Operation.end`: the replicas' contexts outlive the step with the user's graphs."""
        self.rendezvous.end()

    @property
    def active(self) -> int:
        """The number of replicas that have rows."""
        return len(self.shards)

    def unfinished(self, devices: Sequence[QueueDevice], late: Sequence[str]) -> str:
        """The devices whose replicas have not finished, else those that hold up the all-reduce, else the update."""
        busy = [devices[rank].name for rank, result in enumerate(self.results) if result is None]
        return f"The step on {busy}" if busy else Operation.unfinished(self, devices, late)

    def rows_of(self, rank: int) -> tuple[str, tuple[int, int] | None]:
        """The replica's rows."""
        total = self.batch.rows
        if rank >= len(self.shards):
            return f" (no rows of the batch's {total})", None
        rows = self.shards[rank]
        return f" (rows {rows.start} to {rows.stop} of the batch's {total})", (rows.start, rows.stop)

    def verb_of(self, rank: int) -> str:
        """Before the replica has run: the copies of its rows."""
        return "scatter" if rank < len(self.results) and self.results[rank] is None else Operation.verb_of(self, rank)

    def update_began(self, rank: int) -> None:
        """Take the time."""
        self.watch.update_began[rank] = time.perf_counter()

    def update_ended(self, rank: int) -> None:
        """Take the time."""
        self.watch.update_ended[rank] = time.perf_counter()

    def kept(self) -> StepResult:
        """The result of a step that is over. Raises the error of a failed step."""
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome


def make_step(
    batch: Batch,
    shards: Sequence[Rows],
    devices: Sequence[QueueDevice],
    number: int,
    timeout: float,
    merger: Merger,
    *,
    cores: int,
    wants_outputs: bool,
    kind: str,
    reduces: bool,
    across: StepAcross | None = None,
    tight: Collection[QueueDevice] = (),
) -> Step:
    """Make a step on these shards. Enqueues nothing.

    Args:
        number: the step's number, for its contexts.
        timeout: seconds that replicas may wait for each other in the middle of the step.
        cores: cores that all replicas may use together.
        kind: "train", "predict", "call" or "backward".
        across: the step's part in that of several processes.
        tight: devices whose rows run in parts, one after the other.
    """
    names, here = [device.name for device in devices], len(shards)
    turns = turns_of(devices[:here], timeout, tight)
    rendezvous = Rendezvous(here, timeout, names, turns) if across is None else across.rendezvous(timeout, names, turns)
    first, size = (0, here) if across is None else (across.first, across.size)
    common = (number, rendezvous, size, batch, batch.structure, wants_outputs)
    contexts = [
        Context(
            first + place,
            rows,
            *common,
            device,
            first=first,
            here=here,
            is_cut=device.part_of in tight,
            among_cut=bool(tight),
        )
        for place, (rows, device) in enumerate(zip(shards, devices, strict=False))
    ]
    by_shards = devices[0].part_of is not None  # whose bits depend on the cores that each has
    return Step(
        max(1, cores // (size if by_shards else here)),
        cores,
        kind=kind,
        trains=kind == "train",
        batch=batch,
        shards=shards,
        contexts=contexts,
        merger=merger,
        rendezvous=rendezvous,
        turns=turns,
        watch=(Watch if now.recorder is None else TracedWatch)(
            [rows.stop - rows.start for rows in shards], len(devices)
        ),
        reduces=reduces,
        across=across,
    )


def step_error(
    failures: Sequence[tuple[int, BaseException]], operation: Operation, devices: Sequence[QueueDevice]
) -> BaseException:
    """The error to raise for a failed operation. It names the first cause, the device, the rows and the verb.

    An exit or an interrupt that the caller's code has raised on a device stays what it is: it ends the program.
    """
    causes = [failure for failure in failures if not isinstance(failure[1], StepAborted)] or list(failures)
    rank, cause = causes[0]
    if isinstance(cause, (ProcessError, KeyboardInterrupt, SystemExit)):  # no device of this process has failed
        return cause
    verb = operation.verbs.get(id(cause)) or operation.verb_of(rank)
    blamed = operation.blamed if operation.blamed != -1 else rank
    where, rows = operation.rows_of(blamed or 0)
    text = traceback.TracebackException(type(cause), cause, None)  # even of an error whose own text fails
    who = "The step" if blamed is None else f"The replica on {devices[blamed].name}{where}"
    message = f"{who} failed with {type(cause).__name__}: {text}\nThe step was stopped in `{verb}`"
    if operation.updates_begun and not operation.restorable and operation.updating[0].memory.parts is not None:
        message += " in the middle of its update: the devices have updated other parts. Load a checkpoint."
    elif operation.updates_begun and not operation.restorable:
        message += " in the middle of its update: all replicas go on from the weights of the first. "
        message += "Weights and optimizer state may have been updated in part. Load a checkpoint to undo that."
    else:
        message += " and no replica's weights were changed."
    device = devices[blamed if blamed is not None else rank].name
    error = replica_error_class(type(cause))(message, device=device, rows=None if blamed is None else rows, verb=verb)
    error.__cause__ = cause
    return error
