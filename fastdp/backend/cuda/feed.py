"""How a batch comes to a GPU: through pinned memory or over a link, into one of two device buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdp.backend.cuda import runtime
from fastdp.backend.cuda.memory import StagingRing
from fastdp.backend.cuda.streams import CudaStream
from fastdp.backend.queue import QueueEvent
from fastdp.shard import Rows

# Where arrays begin in a staging buffer: what the widest loads of the kernels like.
ALIGNMENT = 256
# Two: the rows of a step are copied in while the step before still computes.
BATCHES_IN_FLIGHT = 2


@dataclass(slots=True)
class _Staged:
    """Rows of a batch that nobody has taken yet. Holds the batch: its arrays stay the ones that they are."""

    batch: list[Any]
    rows: Rows
    arrays: list[Any]
    arrived: QueueEvent

    def holds(self, batch: Sequence[Any], rows: Rows) -> bool:
        """Whether these are the very same arrays and rows."""
        same = len(batch) == len(self.batch) and all(a is b for a, b in zip(batch, self.batch, strict=True))
        return same and rows == self.rows


class Feed:
    """The rows of batches on their way to one GPU.

    Args:
        device: a CudaDevice, on whose copy stream all copies run.
        timeout: seconds that a pinned buffer may stay in use.

    Rows of host arrays go through one pinned buffer and one copy; those of arrays on a GPU are copied over the link.
    A step's rows lie in one of two device buffers until the step after the next takes its own; the other one is for
    rows that are staged meanwhile. Called from the thread that runs steps.
    """

    def __init__(self, device: Any, timeout: float) -> None:
        self._device = device
        self._timeout = timeout
        self._ring = StagingRing(slots=BATCHES_IN_FLIGHT, timeout=timeout)
        self._buffers: list[Any] = [None] * BATCHES_IN_FLIGHT
        self._turn = 0  # the buffer of the rows that were taken last
        self._other_is_free: QueueEvent | None = None
        self._staged: _Staged | None = None

    def take(self, batch: Sequence[Any], rows: Rows) -> list[Any]:
        """The rows of every array; compute that is enqueued later waits for them.

        Rows that were staged are there already, or on their way. Others that are larger than before allocate.
        """
        staged = self._staged
        if staged is not None and staged.holds(batch, rows):
            self._turn, self._staged = self._other, None
            # What reads the buffer of the step before is enqueued by now.
            self._other_is_free = self._device.compute.record()
        else:
            parts, sizes = _parts(batch, rows)
            # Rows that wait for another step keep their buffer.
            if staged is None:
                self._turn = self._other
                self._grow(self._other, sum(sizes))
            self._grow(self._turn, sum(sizes))
            if _from_host(parts) and self._ring.room < sum(sizes):
                self._device.copy_in.record().wait_issued(self._timeout)  # the worker has nothing to do with the ring
                self._ring.reserve(sum(sizes))
            self._other_is_free = self._device.compute.record()
            staged = self._send(batch, rows, parts, sizes, self._turn, self._other_is_free)
        self._device.compute.wait(staged.arrived)
        return staged.arrays

    def stage(self, batch: Sequence[Any], rows: Rows) -> bool:
        """Begin to copy the rows of the batch that comes next, while a step computes; `take` then finds them.

        Returns:
            False, and nothing is done, where memory would have to be allocated: CUDA may wait for all GPUs then, which
            in the middle of a step may wait for each other.
        """
        parts, sizes = _parts(batch, rows)
        self._staged = None
        buffer = self._buffers[self._other]
        if buffer is None or buffer.nbytes < sum(sizes) or (_from_host(parts) and self._ring.room < sum(sizes)):
            return False
        self._staged = self._send(batch, rows, parts, sizes, self._other, self._other_is_free)
        return True

    def forget(self) -> None:
        """Nobody will take what is staged. Its copy may still run: the next one is behind it."""
        self._staged = None

    def recover(self) -> None:
        """After a failure, when nothing runs: what was staged may not have come, and both buffers are free."""
        self._staged = self._other_is_free = None

    def close(self) -> None:
        """Give the memory back, when the GPU is done with it."""
        self.recover()
        self._ring.close()
        self._buffers = [None] * BATCHES_IN_FLIGHT

    @property
    def _other(self) -> int:
        return (self._turn + 1) % BATCHES_IN_FLIGHT

    def _grow(self, turn: int, nbytes: int) -> None:
        """Have a buffer of at least `nbytes`."""
        buffer = self._buffers[turn]
        if buffer is None or buffer.nbytes < nbytes:
            room = 1 << max(12, math.ceil(math.log2(max(1, nbytes))))
            self._buffers[turn] = self._device.empty((room,), np.dtype(np.uint8))

    def _send(
        self,
        batch: Sequence[Any],
        rows: Rows,
        parts: Sequence[Any],
        sizes: Sequence[int],
        turn: int,
        free: QueueEvent | None,
    ) -> _Staged:
        """Enqueue the copies into a buffer, behind the event after which nothing reads it."""
        buffer, copy_in = self._buffers[turn], self._device.copy_in
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        base = runtime.array_pointer(buffer)
        arrays = [
            runtime.array(base + start, part.shape, part.dtype, self._device.ordinal, buffer)
            for start, part in zip(starts, parts, strict=True)
        ]
        if free is not None:
            copy_in.wait(free)
        copy_in.enqueue(lambda: self._copy(arrays, parts, starts, sum(sizes)))
        return _Staged(list(batch), rows, arrays, copy_in.record())

    def _copy(self, arrays: Sequence[Any], parts: Sequence[Any], starts: Sequence[int], nbytes: int) -> None:
        """Fill a pinned buffer with the host rows, and enqueue the copies. On the worker, as the copy stream's work."""
        stream = self._device.copy_in
        assert isinstance(stream, CudaStream)
        host = _from_host(parts)
        if host:
            pinned = self._ring.take(nbytes)
            for i in host:
                room = pinned[starts[i] : starts[i] + parts[i].nbytes]
                np.copyto(room.view(parts[i].dtype).reshape(parts[i].shape), parts[i])
            # One copy where all rows come from the host; the gaps between arrays go along.
            if len(host) == len([part for part in parts if part.nbytes]):
                first, last = host[0], host[-1]
                length = starts[last] + parts[last].nbytes - starts[first]
                source = pinned.ctypes.data + starts[first]
                runtime.copy_async(runtime.array_pointer(arrays[first]), source, length, stream.handle)
            else:
                for i in host:
                    source = pinned.ctypes.data + starts[i]
                    runtime.copy_async(runtime.array_pointer(arrays[i]), source, parts[i].nbytes, stream.handle)
            self._ring.release(stream.mark_now())
        for target, part in zip(arrays, parts, strict=True):
            if part.nbytes and runtime.is_array(part):
                self._device.copy_rows(target, part, stream.handle)


def _parts(batch: Sequence[Any], rows: Rows) -> tuple[list[Any], list[int]]:
    """The rows of every array, and the bytes that each takes in a buffer."""
    parts = [array[rows.start : rows.stop] for array in batch]
    return parts, [-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in parts]


def _from_host(parts: Sequence[Any]) -> list[int]:
    """Which of the parts lie in host memory, and are not empty."""
    return [i for i, part in enumerate(parts) if part.nbytes and not runtime.is_array(part)]
