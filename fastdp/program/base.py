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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fastdp.buffers import Allocator, ArraySpec, FlatBuffers, Home, Memory
from fastdp.comm.rendezvous import Rendezvous
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.work_stealing import WorkStealing
from fastdp.shard import Rows


def _not_listening(bucket: int) -> None:
    """Nobody starts a reduction early in this step."""


def _no_graph() -> None:
    """Nobody has a graph of the whole step."""
    raise RuntimeError("This step has no graph with its collectives.")


@dataclass(slots=True)
class Context:
    """What a replica knows of the step it is in.

    `exchange(value)` gives every replica's value, in rank order, to every replica: it may be called any
    number of times in the middle of `train` or `predict`, by all replicas in the same order. `batch` is
    the whole global batch, `structure` what the caller of the step passed along with it.
    `wants_outputs` is False when nobody will look at the outputs of the step. `device` is the replica's, None
    outside any step.

    `ready(i)` says, on the replica's worker and in the middle of `train`, that bucket `i` of the flat gradient buffers
    (`FlatBuffers.buckets()`) has its values, of unused parameters too, on what is the device's compute stream so far:
    its reduction may start, and the program neither reads nor writes it again in this step. Buckets that are never
    announced are reduced when `train` is over on all replicas. It never waits for another replica.

    Where `whole` is there, it is what the program's `whole_step` gave for this step: the replica's graph reduces the
    gradients too. `launch()` launches it on the device's compute stream, and is called exactly once, by all replicas,
    when the inputs are in place; it waits on the host until all replicas call it, and raises if one of them failed.
    """

    rank: int
    rows: Rows
    step: int
    rendezvous: Rendezvous
    size: int
    batch: Sequence[np.ndarray]
    structure: Any = None
    wants_outputs: bool = True
    device: Any = None
    ready: Callable[[int], None] = _not_listening
    whole: Any = None
    launch: Callable[[], None] = _no_graph

    @classmethod
    def alone(cls, batch: Sequence[np.ndarray], structure: Any, start: int, stop: int, total: int) -> Context:
        """The context of rows `[start, stop)` of `total` outside any step: nobody to exchange with."""
        return cls(0, Rows(start, stop, total), 0, Rendezvous(1, 1.0), 1, batch, structure)

    @property
    def torch_device(self) -> str:
        """Where torch keeps what the replica works on."""
        return str(self.device.torch_device) if self.device is not None else "cpu"

    def exchange(self, value: Any) -> list[Any]:
        """Everyone's values, in rank order. Read-only, and valid for the step.

        Between GPUs tensors go through host memory: the way waits for what they hold, and needs no order between
        the streams of two threads. A class of values says by `moved(how)` what of it is to be moved.
        """
        if self.size == 1:
            return [value]
        if self.device is None or not self.device.on_gpu:
            return self.rendezvous.exchange(self.rank, value)
        name = self.torch_device
        values = self.rendezvous.exchange(self.rank, _moved(value, lambda tensor: tensor.cpu()))
        return [_moved(one, lambda tensor: tensor.to(name)) for one in values]


def _moved(value: Any, how: Callable[[Any], Any]) -> Any:
    """A nest of tuples, lists and such classes with its tensors moved; what is no tensor stays."""
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(one, how) for one in value)
    if hasattr(value, "moved"):
        return value.moved(lambda one: _moved(one, how))
    return how(value) if hasattr(value, "is_cuda") else value


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
