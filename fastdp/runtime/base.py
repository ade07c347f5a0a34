"""The rules of streams and events, and `DeviceMemory`: what a device offers besides its streams.

A device runs work on *streams*. Work on one stream runs in order. Streams run independently; only *events*
order them against each other: `stream.record()` returns an event that completes when all work enqueued so
far has, and `other.wait(event)` holds back work that is enqueued on `other` afterwards.

A failure propagates the same way. Once work on a stream has raised, the stream skips the rest, and every
event recorded on it carries the exception to its waiters, so nothing downstream of a failure ever runs.
`recover()` clears the stream when the caller has handled the failure.

`fastdp.runtime.queue` implements streams, and `fastdp.runtime.events` their events.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastdp.buffers import Allocator
from fastdp.shard import Rows

Work = Callable[[], Any]


class DeviceMemory(ABC):
    """The memory of a device, with the copies of a batch to it and of outputs from it.

    Arrays are numpy.ndarray or cupy.ndarray. Every device is an `Allocator` (fastdp.buffers).

    Attributes:
        kind: "virtual", "gpu" or "virtual gpu".
        on_gpu: whether its memory is a GPU's.
        space: the memory of its arrays: "host", or "cuda:N" for a card.
        torch_device: torch's name of the device that holds the tensors of its replicas.
    """

    kind: str
    on_gpu: bool
    space: str
    torch_device: str

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An uninitialized array, aligned to at least 64 bytes, that owns its memory."""

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """As `empty`, filled with zeros on return."""

    @abstractmethod
    def copy(self, target: Any, source: Any) -> None:
        """Copy an array of any device or of the host into one of this device, of the same shape and dtype."""

    @abstractmethod
    def to_host(self, array: Any) -> np.ndarray:
        """The array's current values in host memory; may share the array's memory."""

    @abstractmethod
    def host_home(self) -> Allocator:
        """An allocator of host memory for a model's own weights; this device copies to and from it."""

    # A batch in, outputs out.

    @abstractmethod
    def take_rows(self, batch: Sequence[Any], rows: Rows) -> list[Any]:
        """This device's rows of every array of a batch; compute work enqueued later waits for them."""

    def take_idle_rows(self, batch: Sequence[Any], rows: Rows, shapes: Any) -> list[Any] | None:
        """As `take_rows`, on a thread that has a GPU which does nothing. None where only `take_rows` can.

        Args:
            shapes: the shape of a row and the dtype of each array.
        """
        return None

    @abstractmethod
    def stage_rows(self, batch: Sequence[Any], rows: Rows) -> bool:
        """Prefetch the rows for the next `take_rows` of the same arrays; False if there is no room for them."""

    def has_staged(self, batch: Sequence[Any], rows: Rows) -> bool:
        """Whether the rows are staged for the next `take_rows` of these arrays."""
        return False

    @abstractmethod
    def forget_staged(self) -> None:
        """Discard the staged rows."""

    @abstractmethod
    def merged(self, shape: tuple[int, ...], dtype: np.dtype, *, on_host: bool) -> Any:
        """An uninitialized array for a merged output, owned by the caller: in host memory or this device's own."""

    @abstractmethod
    def prepare_to_merge(self) -> None:
        """Load what `put_rows` needs. Called between steps."""

    @abstractmethod
    def put_rows(self, targets: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Copy a replica's outputs to their rows of the merged arrays. Called on the worker."""
