"""`Program`: the base class of what a replica runs, a model as pure functions over explicit state.

    train(state, batch)   -> gradients, sums, outputs
    update(state, totals) -> parameters, slots and buffers written in place
    predict(state, batch) -> sums, outputs

The engine owns the memory. Each replica has flat buffers for the variables (parameters and buffers), the
slots (the optimizer's variables) and the gradients; `bind` makes the replica's state from them. The first
replica lives in the program's *home*, the memory that the user's own model aliases. So the model is
trained in place and never copied back.

The program is responsible for exactness. `train` leaves in `state` the gradient of the replica's
*contribution* to the loss of the global batch. Contributions are chosen such that the plain sum over
replicas is the gradient of one device. `sums` are further numbers of which only the sum over replicas
matters (loss terms, moments of BatchNorm). The program chooses their layout, which must be the same on
all replicas of a step.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdp.buffers import Allocator, ArraySpec, FlatBuffers, Home, Memory
from fastdp.comm.context import Context
from fastdp.runtime.host.resources import CORES
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.work_stealing import WorkStealing
from fastdp.shard import Deal


@dataclass(slots=True)
class Result:
    """The result of one replica: output arrays, numbers to be summed, and notes for `update`.

    `notes` describe the layout of `sums` and whatever else `update` needs. All replicas use the notes of the first.
    If the notes have a method `agree(every)`, it is called before any update and raises if the replicas' notes
    contradict each other.
    """

    outputs: list[np.ndarray] = field(default_factory=list)
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    notes: Any = None


@dataclass(slots=True)
class Launched:
    """A replica's step whose work is enqueued on its device and which nobody has waited for.

    Attributes:
        outputs: gives the arrays of `Result.outputs`. Called once, behind the launch of the step's graphs.
        result: gives the `Result` without outputs. Called once, when the device has done the step.
    """

    outputs: Callable[[], list[Any]]
    result: Callable[[], Result]


@dataclass(slots=True)
class Totals:
    """The sums of a step over all replicas, and the first replica's notes.

    `reduced` is False if the step's gradients wait for a later reduction: each replica then has its own.
    `work_stealing`, if not None, runs the parts of an update on the workers of several devices at a time
    (`fastdp.runtime.work_stealing`).
    """

    sums: np.ndarray
    notes: Any
    every_note: list[Any]
    reduced: bool = True
    work_stealing: WorkStealing | None = None


class Program(ABC):
    """A model that the engine can replicate.

    A subclass must define `gradients`, `home`, `bind`, `train`, `update` and `predict`. Everything else has a default.
    The state of a replica is the value that `bind` returns.

    Attributes:
        gradients: name, shape and dtype of each parameter that has a gradient.
        slots: name, shape and dtype of each variable of the optimizer.
        most_replicas: the largest number of replicas that may share a step. Read before each step.
        update_how: how the update is applied, in words, for `report()`.
        why_eager: why its steps are not captured, for `report()`.
        update_is_shared: `update` uses `Totals.work_stealing`. It then runs on its replica's share of the cores;
            other updates that the first replica makes for all use all cores in each operation.
        home_is_exposed: other code may write to the home's memory between two steps in ways that `changed_outside` does
            not see. The first replica then makes every update, and the engine copies the home's variables to the other
            replicas at the beginning of each step instead of its end.
        cores: how many cores a step may use. Read on the host thread before each step. Default: those of the process.
        update_is_reliable: an `update` that has succeeded once will not raise, because it does not run the user's code.
        update_is_ours: `update` does not run code of the user's that may keep something between two calls, so that it
            may run once for each replica. Read when the program gets its devices.
        first_may_run_here: on several virtual devices, the first replica may run on the thread that calls the engine.
        scales_loss: the loss is scaled, so gradients may be infinite, and `update` sees to it.
        updates_parts: `update` updates a replica's part of the variables: the part of each bucket of gradients that is
            its own between a reduce-scatter and an all-gather. Of several replicas each then makes its update.
        shards_optimizer: it can do so, or divide the update, if it is told to.
        divides_update: the first replica's `update` has each device update a part, and keep its slots.
        uses_cupy: `update` may compute with CuPy, whose current stream is then the replica's.

    These attributes may be properties.
    """

    gradients: Sequence[ArraySpec]
    slots: Sequence[ArraySpec] = ()
    most_replicas: int = sys.maxsize
    update_how: str = ""
    why_eager: str = "functions run as they are"
    update_is_shared: bool = False
    home_is_exposed: bool = False
    update_is_reliable: bool = False
    update_is_ours: bool = True
    first_may_run_here: bool = True
    scales_loss: bool = False
    updates_parts: bool = False
    shards_optimizer: bool = False
    divides_update: bool = False
    uses_cupy: bool = True
    cores: int = CORES

    @property
    def captures(self) -> Any:
        """What captures its training steps; None if nothing does. It has `report`, a list as `steps_report`."""
        return None

    @property
    def steps_report(self) -> list[dict[str, Any]]:
        """How training steps run, for `report()`: an entry for each shape of a replica's rows, or one for all."""
        return self.captures.report if self.captures is not None else [{"how": "eager", "why": self.why_eager}]

    # Memory.

    @abstractmethod
    def home(self, device: Allocator) -> Home:
        """The memory of the first replica, filled with the model's present values."""

    def home_slots(self, device: Allocator) -> FlatBuffers:
        """The slots of the first replica, filled with their present values. Default: zeros."""
        return FlatBuffers(self.slots, device)

    def slots_nbytes(self, rank: int) -> int:
        """Bytes of a replica's slots that are not in the engine's memory, for `report()`. Default: none."""
        return 0

    @abstractmethod
    def bind(self, memory: Memory, device: QueueDevice, rank: int) -> Any:
        """A replica's state over `memory`."""

    def unbind(self, deal: Deal) -> None:  # noqa: B027
        """Forget all replicas: `home`, `home_slots` and `bind` are called again, for another number of them perhaps.

        Args:
            deal: how rows are dealt to the replicas that come.
        """

    def known_parts(self) -> Sequence[object]:
        """Objects that every process has in the same order, and that notes refer to: layers, say. Default: none."""
        return ()

    def changed_outside(self) -> bool:
        """Whether anything but `update` has changed the home's values since `committed()`. Default: no."""
        return False

    def committed(self) -> None:  # noqa: B027
        """Called when all replicas have the home's present values."""

    # Around a step.

    def prepare_thread(self, threads: int, device: QueueDevice) -> None:  # noqa: B027
        """Called on a device's worker: let it use `threads` cores per operation, and the device's streams."""

    def running(self, threads: int) -> AbstractContextManager[object]:
        """A context manager that the host thread holds while replicas run. Default: one that does nothing."""
        return nullcontext()

    # The step.

    @abstractmethod
    def train(self, state: Any, batch: list[np.ndarray], context: Context) -> Result:
        """Run forward, loss and backward on one replica's rows. Gradients go into the state's buffers."""

    def step_graph(self, contexts: Sequence[Context], why_not: str) -> Any:
        """The graph with which each replica runs a whole training step and its all-reduce. Default: None.

        Called on the host thread, before the replicas run, with their rows on their devices.

        Args:
            contexts: of the replicas.
            why_not: why the engine cannot use such a graph in this step; empty if it can.

        Returns:
            None, or the value of `Context.step_graph` for all replicas. Its `begin()` returns the step's reduction
            (`fastdp.comm.base.Reduction`), which also has `launch(rank, rendezvous)`. The graph is launched once.
        """
        return None

    def launches(self, contexts: Sequence[Context]) -> bool:
        """Whether all of these replicas can run their next training step by `launch`. Default: no.

        Called on the host thread, before the rows are on their devices.
        """
        return False

    def launching(self, devices: Sequence[QueueDevice], threads: int) -> AbstractContextManager[object]:
        """A context manager that the host thread holds while it does the work of these devices' workers.

        If each has a card of its own, it stands for `prepare_thread(threads, device)` of all of them.
        """
        return nullcontext()

    def launch(self, state: Any, batch: list[np.ndarray], context: Context) -> Launched:
        """Enqueue a training step as `train` runs it, without waiting for the device or for other replicas.

        Called by the host thread for one replica after the other, if `launches` says so. `Context.launch` then only
        notes that the replica's inputs are in place: the graphs of all replicas are launched behind the last call.
        """
        raise NotImplementedError

    @abstractmethod
    def predict(self, state: Any, batch: list[np.ndarray], context: Context) -> Result:
        """Run forward only."""

    # The update.

    @abstractmethod
    def update(self, state: Any, totals: Totals) -> None:
        """Apply the summed gradients, slots and buffers to the state, in place.

        If `totals` are not reduced, it runs on every replica, including replicas without slots. It must then not change
        the gradients, and leave the same variables on all replicas.
        """

    def part_needs_whole(self) -> bool:
        """Whether the update of a part needs the sums of all gradients. Called on the host thread before a step.

        Raises:
            ValueError: parts can no longer be updated.
        """
        return False

    def rehearse_update(self, state: Any) -> bool:
        """Try an update on copies of a few numbers, with the present settings and gradients. Runs on the worker.

        Raises what the update itself would raise.

        Returns:
            Whether the update could be tried. Default: no; the engine then takes a snapshot before the update runs.
        """
        return False

    def skip(self, state: Any, totals: Totals) -> None:  # noqa: B027
        """Called in the place of an update that is not made, since the loss or the gradient is not finite."""

    def loss_of(self, totals: Totals) -> float:
        """The loss of the global batch; 0 if there is none. For `on_nonfinite`."""
        return self.loss_of_one(totals.sums)

    def loss_of_one(self, sums: np.ndarray) -> float:
        """A replica's part of the loss. Default: the first of the sums."""
        return float(sums[0]) if sums.size else 0.0

    # Gradient accumulation.

    def accumulate(self, total: FlatBuffers, part: FlatBuffers) -> None:
        """Add `part` to `total`, on the worker of the device that holds both. For steps that are not reduced."""
        for dtype, buffer in total.buffers.items():
            buffer += part.buffers[dtype]

    def fold(self, state: Any) -> None:
        """Add reduced gradients to the slots before the end of their cycle, because the user reads the slots.

        Raises:
            NotImplementedError: the program has no slots for gradients.
        """
        raise NotImplementedError(
            f"A {type(self).__name__} has no slots for gradients: end the cycle by a step that reduces."
        )


class _Lookalike(Program):
    """Adds the defaults of `Program` to an object of a class that does not derive from it.

    Args:
        program: the object. Its members take precedence.
    """

    def __init__(self, program: object) -> None:
        object.__setattr__(self, "_given", program)

    def __getattribute__(self, name: str) -> Any:
        given = object.__getattribute__(self, "_given")
        return getattr(given, name) if hasattr(given, name) else object.__getattribute__(self, name)


_NEEDED = ("gradients", *sorted(Program.__abstractmethods__))
_Lookalike.__abstractmethods__ = frozenset()


def as_program(program: object) -> Program:
    """The program itself, or a wrapper that adds the defaults if its class does not derive from `Program`.

    Raises:
        TypeError: `program` lacks members that have no default.
    """
    if isinstance(program, Program):
        return program
    missing = [name for name in _NEEDED if not hasattr(program, name)]
    if missing:
        raise TypeError(
            "`program` must be a fastdp.program.base.Program: derive your class from it. "
            f"Received: a {type(program).__name__} without {missing}"
        )
    return _Lookalike(program)  # type: ignore[abstract]
