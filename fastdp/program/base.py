"""`Program`: the base class of what a replica runs, a model as pure functions over explicit state.

    train(state, batch)   -> gradients, sums, outputs
    update(state, totals) -> parameters, slots and buffers written in place
    predict(state, batch) -> sums, outputs

The engine owns the memory: per replica, flat buffers for the variables (parameters and buffers), the
slots (the optimizer's variables) and the gradients. `bind` makes a replica's state from them. The first
replica lives in the program's *home*: the memory that the user's own model aliases, so that the model
is trained in place and is never copied back.

Exactness is the program's half of the bargain. `train` leaves in `state` the gradient of the replica's
own *contribution* to the loss of the global batch, such that the plain sum over replicas is the gradient
that one device would have had. `sums` are further numbers of which only the sum over replicas matters
(loss terms, moments of BatchNorm); their layout is the program's secret, as long as it is the same on
all replicas of a step.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdp.buffers import Allocator, ArraySpec, FlatBuffers, Home, Memory
from fastdp.comm.context import Context
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.work_stealing import WorkStealing


@dataclass(slots=True)
class Result:
    """What one replica gives back: output arrays, numbers to be summed, and notes for `update`.

    `notes` describe the layout of `sums` and whatever else `update` needs to know; those of the first
    replica serve all. They may have `agree(every)`, which raises if those of the replicas contradict each other, before
    any update.
    """

    outputs: list[np.ndarray] = field(default_factory=list)
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    notes: Any = None


@dataclass(slots=True)
class Totals:
    """The sums of a step over all replicas, and the first replica's notes.

    `reduced` is False where the step's gradients wait for a later reduction: each replica has its own. `work_stealing`,
    where it is there, runs the parts of an update on several devices' workers at a time
    (`fastdp.runtime.work_stealing`).
    """

    sums: np.ndarray
    notes: Any
    every_note: list[Any]
    reduced: bool = True
    work_stealing: WorkStealing | None = None


class Program(ABC):
    """A model that the engine can replicate.

    A subclass has to define `gradients`, `home`, `bind`, `train`, `update` and `predict`. Everything else has a default
    here. The state of a replica is what `bind` returns.

    Attributes:
        gradients: name, shape and dtype of each parameter that has a gradient.
        slots: likewise of the optimizer's variables.
        most_replicas: the largest number of replicas that may share a step. Read before each step.
        update_how: how the update is applied, in words, for `report()`.
        update_is_shared: `update` uses `Totals.work_stealing`. It then runs on its replica's share of the cores;
            other updates that the first replica makes for all get all cores in each operation.
        update_is_reliable: an `update` that has succeeded once will not raise, because it runs no code of the user's.

    These attributes may be properties.
    """

    gradients: Sequence[ArraySpec]
    slots: Sequence[ArraySpec] = ()
    most_replicas: int = sys.maxsize
    update_how: str = ""
    update_is_shared: bool = False
    update_is_reliable: bool = False

    # Memory.

    @abstractmethod
    def home(self, device: Allocator) -> Home:
        """The memory of the first replica, filled with the model's present values."""

    def home_slots(self, device: Allocator) -> FlatBuffers:
        """The slots of the first replica, filled with their present values. Default: zeros."""
        return FlatBuffers(self.slots, device)

    @abstractmethod
    def bind(self, memory: Memory, device: QueueDevice, rank: int) -> Any:
        """A replica's state over `memory`."""

    def changed_outside(self) -> bool:
        """Whether anything but `update` has changed the home's values since `committed()`. Default: no."""
        return False

    def committed(self) -> None:  # noqa: B027
        """The present values of the home are known to all replicas."""

    # Around a step.

    def prepare_thread(self, threads: int, device: QueueDevice) -> None:  # noqa: B027
        """Called on a device's worker: let it use `threads` cores inside one operation, and the device's streams."""

    def running(self, threads: int) -> AbstractContextManager[object]:
        """A context manager that the host thread holds while replicas run. Default: one that does nothing."""
        return nullcontext()

    # The step.

    @abstractmethod
    def train(self, state: Any, batch: list[np.ndarray], context: Context) -> Result:
        """Forward, loss and backward of one replica's rows; gradients go into the state's buffers."""

    def step_graph(self, contexts: Sequence[Context], why_not: str) -> Any:
        """Whether each replica runs a whole training step, with its all-reduce, as one graph. Default: it does not.

        Args:
            contexts: of the replicas, which are about to run, and whose rows are on their devices. Called on the host
                thread.
            why_not: why the engine cannot use such a graph in this step; empty if it can.

        Returns:
            None, or the value of `Context.step_graph` for all replicas. Its `begin()` returns the step's reduction
            (`fastdp.comm.base.Reduction`), which also has `launch(rank, rendezvous)`. The graph is launched once.
        """
        return None

    @abstractmethod
    def predict(self, state: Any, batch: list[np.ndarray], context: Context) -> Result:
        """Forward only."""

    # The update.

    @abstractmethod
    def update(self, state: Any, totals: Totals) -> None:
        """Apply the summed gradients, slots and buffers to the state, in place.

        Where `totals` are not reduced, it runs on every replica, also on those without slots, and must leave the
        gradients alone, and all replicas with the same variables.
        """

    def rehearse_update(self, state: Any) -> bool:
        """Try an update on copies of a few numbers, with the present settings and gradients. Runs on the worker.

        Raises what the update itself would raise.

        Returns:
            Whether it could be tried. Default: no; the engine then copies what the update changes before it runs.
        """
        return False

    # Gradient accumulation.

    def accumulate(self, total: FlatBuffers, part: FlatBuffers) -> None:
        """Add `part` to `total`, on the worker of the device that has both. For steps that are not reduced."""
        for dtype, buffer in total.buffers.items():
            buffer += part.buffers[dtype]

    def fold(self, state: Any) -> None:
        """Take over reduced gradients into the slots, before the end of their cycle: somebody looks at the slots.

        Raises:
            NotImplementedError: the program has no slots for gradients.
        """
        raise NotImplementedError(
            f"A {type(self).__name__} has no slots for gradients: end the cycle by a step that reduces."
        )


class _Lookalike(Program):
    """Adds the defaults of `Program` to an object of a class that does not derive from it.

    Args:
        program: the object. Its members come first.
    """

    def __init__(self, program: object) -> None:
        object.__setattr__(self, "_given", program)

    def __getattribute__(self, name: str) -> Any:
        given = object.__getattribute__(self, "_given")
        return getattr(given, name) if hasattr(given, name) else object.__getattribute__(self, name)


_NEEDED = ("gradients", *sorted(Program.__abstractmethods__))
_Lookalike.__abstractmethods__ = frozenset()


def as_program(program: object) -> Program:
    """The program itself, or, where its class does not derive from `Program`, a wrapper that adds the defaults.

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
