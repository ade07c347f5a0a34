"""A replica's view of the current step: its rows, its device, exchanges with other replicas, and ready buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdp.comm.batch import Batch
from fastdp.comm.rendezvous import Rendezvous
from fastdp.errors import CannotSplitError
from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Rows, dealt_rows


def _not_listening(bucket: int) -> None:
    """In this step no reduction starts early."""


def _no_graph() -> None:
    """This step has no step graph."""
    raise RuntimeError("This step has no graph with its collectives.")


@dataclass(slots=True)
class Context:
    """A replica's view of the current step.

    `exchange(value, place)` gives every replica's value, in rank order, to every replica. All replicas may call it any
    number of times in the middle of `train` or `predict`, at the same places in the same order. `batch` is the whole
    global batch, a sequence of arrays; `structure` was passed along with it by the caller of the step. `wants_outputs`
    is False when nobody will use the outputs of the step. `device` is the replica's device; None outside any step.

    `ready(i)` announces, on the replica's worker and in the middle of `train`, that the work enqueued so far on the
    compute stream completes bucket `i` of the flat gradient buffers (`FlatBuffers.buckets()`), unused parameters
    included. Its reduction may start, and the program neither reads nor writes the bucket again in this step. Buckets
    that are never announced are reduced when `train` is over on all replicas. `ready` never waits for another replica.

    `step_graph` is the result of the program's `step_graph` for this step, or None. With it, the replica's graph also
    reduces the gradients. `launch()` launches the graph on the device's compute stream. Each replica calls it exactly
    once, when its inputs are in place. It waits on the host until all replicas call it, and raises if one has failed.

    `found` is the program's: what its `launches` has found for the replica's rows, for its `launch`.

    `rank` and `size` count the replicas of all processes that train together. `first` is the rank of this process's
    first replica, `here` the number of its replicas, and `index` the replica's place among them.

    `is_cut`: the rows of the replica's device run in parts, one after the other, since it has run out of memory.
    `among_cut`: so do those of another replica of the step, or its own.
    """

    rank: int
    rows: Rows
    step: int
    rendezvous: Rendezvous
    size: int
    batch: Batch
    structure: Any = None
    wants_outputs: bool = True
    device: QueueDevice | None = None
    ready: Callable[[int], None] = _not_listening
    step_graph: Any = None
    launch: Callable[[], None] = _no_graph
    found: Any = None
    first: int = 0
    here: int = 0
    is_cut: bool = False
    among_cut: bool = False

    def __post_init__(self) -> None:
        self.here = self.here or self.size

    @property
    def listens(self) -> bool:
        """Whether anybody asks for `ready`. Where nobody does, a program need not find out."""
        return self.ready is not _not_listening

    @property
    def index(self) -> int:
        """The replica's place among those of this process."""
        return self.rank - self.first

    @property
    def shards(self) -> Sequence[Rows]:
        """The rows of every replica of the step, of all processes."""
        dealt = self.batch.shards
        return dealt if len(dealt) == self.size else dealt_rows(self.rows.total, self.size)

    def check_whole(self, what: str, *, unless: bool = False) -> None:
        """Check that the replica has all rows of its device, which `what` is computed from unless that is set.

        Raises:
            CannotSplitError: they are cut.
        """
        if self.is_cut and not unless:
            raise CannotSplitError(
                f"{what} uses the moments of all rows of a device, and those of parts are others. With "
                "sync_batch_norm=True they are those of the global batch, in train_step and in fit."
            )

    @classmethod
    def alone(cls, batch: Any, structure: Any, start: int, stop: int, total: int) -> Context:
        """The context of rows `[start, stop)` of `total` outside any step, without other replicas.

        `batch` is a `Batch` or a list of arrays.
        """
        given = batch if type(batch) is Batch else Batch(batch, structure, total)
        return cls(0, Rows(start, stop, total), 0, Rendezvous(1, 1.0), 1, given, structure)

    @property
    def torch_device(self) -> str:
        """Torch's name of the device that holds the replica's tensors."""
        return str(self.device.torch_device) if self.device is not None else "cpu"

    def exchange(self, value: Any, place: object) -> list[Any]:
        """The values of all replicas, in rank order. Read-only, and valid during the step.

        Args:
            value: this replica's.
            place: names this exchange, as in `Rendezvous.exchange`.

        Raises:
            RuntimeError: the replicas are at different places.
            StepAborted, DeviceTimeoutError: as in `Rendezvous.exchange`.

        Between GPUs, tensors go through host memory: such a copy waits for the tensor's value, so the streams of two
        threads need no ordering. A class of values implements `moved(how)` to have its tensors moved.
        """
        if self.size == 1:
            return [value]
        if self.device is None or not self.device.on_gpu:
            return self.rendezvous.exchange(self.index, value, place)
        name = self.torch_device
        values = self.rendezvous.exchange(self.index, _moved(value, lambda tensor: tensor.cpu()), place)
        return [_moved(one, lambda tensor: tensor.to(name)) for one in values]


def _moved(value: Any, how: Callable[[Any], Any]) -> Any:
    """A nest of tuples, lists and classes with `moved`, with its tensors moved. Other values stay as they are."""
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(one, how) for one in value)
    if hasattr(value, "moved"):
        return value.moved(lambda one: _moved(one, how))
    return how(value) if hasattr(value, "is_cuda") else value
