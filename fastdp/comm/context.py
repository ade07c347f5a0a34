"""What a replica knows of the step it is in: its rows, its device, how it meets the others and hands gradients on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastdp.comm.batch import Batch
from fastdp.comm.rendezvous import Rendezvous
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
    the whole global batch, a sequence of arrays, `structure` what the caller of the step passed along with it.
    `wants_outputs` is False when nobody will look at the outputs of the step. `device` is the replica's, None
    outside any step.

    `ready(i)` says, on the replica's worker and in the middle of `train`, that bucket `i` of the flat gradient buffers
    (`FlatBuffers.buckets()`) has its values, of unused parameters too, on what is the device's compute stream so far:
    its reduction may start, and the program neither reads nor writes it again in this step. Buckets that are never
    announced are reduced when `train` is over on all replicas. It never waits for another replica.

    `step_graph` is what the program's `step_graph` gave for this step, if anything: the replica's graph reduces the
    gradients too. `launch()` launches it on the device's compute stream, and is called exactly once, by all replicas,
    when the inputs are in place; it waits on the host until all replicas call it, and raises if one of them failed.
    """

    rank: int
    rows: Rows
    step: int
    rendezvous: Rendezvous
    size: int
    batch: Batch
    structure: Any = None
    wants_outputs: bool = True
    device: Any = None
    ready: Callable[[int], None] = _not_listening
    step_graph: Any = None
    launch: Callable[[], None] = _no_graph

    @classmethod
    def alone(cls, batch: Any, structure: Any, start: int, stop: int, total: int) -> Context:
        """The context of rows `[start, stop)` of `total` outside any step, without other replicas.

        `batch` is a `Batch` or a list of arrays.
        """
        given = batch if type(batch) is Batch else Batch(batch, structure, total)
        return cls(0, Rows(start, stop, total), 0, Rendezvous(1, 1.0), 1, given, structure)

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
