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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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

    `reduced` is False where the step's gradients wait for a later reduction: each replica has its own. `share`, where
    it is there, runs the parts of an update on several devices' workers at a time (`fastdp.runtime.work_stealing`).
    """

    sums: np.ndarray
    notes: Any
    every_note: list[Any]
    reduced: bool = True
    share: WorkStealing | None = None


class Program(Protocol):
    """A model that the engine can replicate. State is whatever `bind` returns.

    A program may also have `update_is_shared`, true where its `update` uses `Totals.share`: it then gets its replica's
    share of the cores, where other updates that are made for all replicas get all cores for each operation.

    Likewise `most_replicas`, asked before each step: how many replicas may share its rows.

    And it may have `whole_step(batches, contexts, why_not)`, asked on the host thread before the replicas of a training
    step run on these rows: whether each of them does all of it, its gradients' all-reduce too, by one graph that is
    launched once. `why_not` is why that is out of the question in this step, if it is. It gives None, or what goes into
    `Context.whole` of all replicas, whose `begin()` gives the step's reduction (`fastdp.comm.base.Reduction`) with
    `launch(rank, rendezvous)`.
    """

    gradients: Sequence[ArraySpec]
    slots: Sequence[ArraySpec]

    @property
    def update_is_reliable(self) -> bool:
        """Whether an `update` that has succeeded once will not raise: no code of the user's runs in it."""

    def rehearse_update(self, state: Any) -> bool:
        """Try an update on copies of a few numbers, with the settings and gradients of now; whether that is possible.

        Raises what the update itself would raise. On the replica's worker.
        """

    def home(self, device: Allocator) -> Home:
        """The memory of the first replica, filled with the model's present values."""

    def home_slots(self, device: Allocator) -> FlatBuffers:
        """The slots of the first replica, filled with their present values."""

    def changed_outside(self) -> bool:
        """Whether the home's values were changed, since `committed()`, by someone else than `update`."""

    def committed(self) -> None:
        """The present values of the home are known to all replicas."""

    def bind(self, memory: Memory, device: QueueDevice, rank: int) -> Any:
        """A replica's state over `memory`."""

    def prepare_thread(self, threads: int, device: QueueDevice) -> None:
        """Called on a device's worker: let it use `threads` cores inside one operation, and the device's streams."""

    def running(self, threads: int) -> Any:
        """A context manager held by the host thread while replicas run."""

    def train(self, state: Any, batch: list[np.ndarray], context: Context) -> Result:
        """Forward, loss and backward of one replica's rows; gradients go into the state's buffers."""

    def update(self, state: Any, totals: Totals) -> None:
        """Apply the summed gradients, slots and buffers to the state, in place.

        Where `totals` are not reduced, it runs on every replica, also on those without slots, and must leave the
        gradients alone, and all replicas with the same variables.
        """

    def accumulate(self, total: FlatBuffers, part: FlatBuffers) -> None:
        """Add `part` to `total`, on the worker of the device that has both. For steps that are not reduced."""

    def fold(self, state: Any) -> None:
        """Take over reduced gradients into the slots, before the end of their cycle: somebody looks at the slots."""

    def predict(self, state: Any, batch: list[np.ndarray], context: Context) -> Result:
        """Forward only."""
