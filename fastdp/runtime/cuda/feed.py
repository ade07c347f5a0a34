"""Brings a batch to a GPU, through pinned memory or over a link, into one of two device buffers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastdp.launch import RowSlice, slice_rows
from fastdp.runtime.base import Work
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.batch_layout import BatchLayout, CopyPlace
from fastdp.runtime.cuda.memory import StagingRing
from fastdp.runtime.cuda.peer_access import reaches
from fastdp.runtime.cuda.row_gather import RowGather
from fastdp.runtime.cuda.streams import CudaEvent, CudaStream
from fastdp.runtime.queue import QueueEvent
from fastdp.shard import Rows
from fastdp.tracing import spans

# Two buffers: the rows of a step are copied in while the previous step still computes.
BATCHES_IN_FLIGHT = 2
MOST_LAYOUTS = 64


@dataclass(slots=True)
class _Staged:
    """Rows of a batch that no step has taken yet. Keeps the batch alive, so that its arrays keep their identity."""

    batch: list[Any]
    rows: Rows
    arrays: list[Any]
    arrived: QueueEvent

    def holds(self, batch: Sequence[Any], rows: Rows) -> bool:
        """Whether these are the same array objects and rows."""
        same = len(batch) == len(self.batch) and all(a is b for a, b in zip(batch, self.batch, strict=True))
        return same and rows == self.rows


class CallersWork:
    """An event on the current device's default stream, destroyed when the last reference goes."""

    def __init__(self) -> None:
        self.event = cupy_api.event_create()
        cupy_api.event_record(self.event, cupy_api.DEFAULT_STREAM)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            cupy_api.event_destroy(self.event)


class Feed:
    """Copies the rows of batches to one GPU.

    Args:
        device: a CudaDevice, on whose copy stream all copies run.
        timeout: seconds that a pinned buffer may stay in use.

    Rows of host arrays go through one pinned buffer and one copy. Rows of arrays on a GPU are copied over the link, or
    by one launch for all of them if this GPU's kernels can access their memory; the copies run after the work that the
    caller has enqueued on that GPU's default stream. One launch gathers rows by number (row_gather.py).
    A step's rows stay in one of two device buffers until the step after the next takes its rows; the other buffer
    is for rows that are staged meanwhile. Call it from the thread that runs steps.
    """

    def __init__(self, device: Any, timeout: float) -> None:
        self._device = device
        self._timeout = timeout
        self._ring = StagingRing(slots=BATCHES_IN_FLIGHT, timeout=timeout)
        self._buffers: list[Any] = [None] * BATCHES_IN_FLIGHT
        self._turn = 0  # the buffer with the rows taken last
        self._other_is_free: QueueEvent | None = None
        self._staged: _Staged | None = None
        self._layouts: dict[tuple[Any, ...], BatchLayout] = {}
        self._places: dict[tuple[int, int, int, Any], CopyPlace] = {}
        self._read: list[CudaEvent] = []  # by pinned buffer: the copy from it that `take_idle` has enqueued
        self._copying = False  # whether rows that were staged may be on their way
        self._error: Any = None  # the kernel's error flag; never read, since row numbers are checked before

    def take(self, batch: Sequence[Any], rows: Rows) -> list[Any]:
        """The rows of every array; compute work enqueued later waits for them.

        Staged rows have arrived or are being copied. Other rows are copied now; a larger batch than before allocates.
        """
        self._copying = False  # the copy stream has ended all copies before that of this step
        staged = self._staged
        if staged is not None and staged.holds(batch, rows):
            self._turn, self._staged = self._other, None
            # All work that reads the previous step's buffer is enqueued by now.
            self._other_is_free = self._device.compute.record()
        else:
            parts = _parts(batch, rows)
            layout = self._layout_of(parts)
            free = self._turn_over(layout.nbytes, layout.nbytes if layout.host else 0)
            if layout.cards:
                self._device.kernels.load("slice_rows")  # here, because CUDA may wait for the GPU to load it
            staged = self._send("scatter", batch, rows, parts, layout, self._turn, free)
        self._device.compute.wait(staged.arrived)
        return staged.arrays

    def take_idle(self, batch: Sequence[Any], rows: Rows, shapes: Any) -> list[Any] | None:
        """As `take`, on the thread that has the device by `lent`, while the GPU has nothing to do.

        One copy on the compute stream brings the rows, so that no stream waits for another, or for earlier steps.

        Args:
            shapes: the shape of a row and the dtype of each array.

        Returns:
            None where `take` is needed: rows are staged or on a GPU, memory would have to be allocated, or something
            is traced.
        """
        if self._copying or self._staged is not None or spans.now.recorder is not None:
            return None
        start, stop, turn, ring = rows.start, rows.stop, (self._turn + 1) % BATCHES_IN_FLIGHT, self._ring
        number = ring.turn
        place = self._places.get((turn, number, stop - start, shapes))
        if place is None or place.buffer is not self._buffers[turn] or place.pinned_at != ring.slots[number].ptr:
            place = self._placed(batch, rows, shapes)
            if place is None:
                return None
        for i, view in place.views:
            array = batch[i]
            if type(array) is not np.ndarray or array.dtype is not view.dtype:
                return None
            np.copyto(view, array[start:stop])
        read, handle = place.read, self._device.compute.handle
        cupy_api.copy_async(place.target, place.source, place.nbytes, handle)
        cupy_api.event_record(read.handle, handle)
        read.error = None
        ring.pass_on(read)
        self._turn, self._other_is_free = turn, None
        return place.arrays

    def _placed(self, batch: Sequence[Any], rows: Rows, shapes: Any) -> CopyPlace | None:
        """Where the rows that `take_idle` takes go; None if it must not take them."""
        layout = self._layout_of(_parts(batch, rows))
        ring, turn = self._ring, self._other
        number, buffer = ring.turn, self._buffers[turn]
        small = buffer is None or buffer.nbytes < layout.nbytes or ring.slots[number].nbytes < layout.nbytes
        if small or not layout.whole or not ring.all_free:
            return None
        if len(self._places) >= MOST_LAYOUTS:
            self._places.clear()
        if not self._read:
            cupy_api.switch_to(self._device.ordinal)
            self._read = [self._device.compute.reusable_event() for _ in range(BATCHES_IN_FLIGHT)]
        pinned = ring.view(number, layout.nbytes)
        place = layout.place(buffer, pinned, _parts(batch, rows), self._read[number])
        self._places[turn, number, rows.count, shapes] = place
        return place

    def gather(self, rows: RowGather) -> list[Any]:
        """Gather rows by number; later compute work waits for them."""
        free = self._turn_over(rows.nbytes, rows.pinned_room)
        if self._error is None:
            self._error = self._device.zeros((1,), np.dtype(np.uint32))
            self._device.kernels.load("slice_rows")
        buffer, copy_in = self._buffers[self._turn], self._device.copy_in
        results = rows.results(buffer, self._device.ordinal)
        copy_in.wait(free)
        gather = partial(self._gather, rows, cupy_api.array_pointer(buffer))
        traced = partial(self._traced, "scatter", len(results[0]), gather)
        copy_in.enqueue(gather if spans.now.recorder is None else traced)
        self._device.compute.wait(copy_in.record())
        return results

    def stage(self, batch: Sequence[Any], rows: Rows) -> bool:
        """Prefetch the rows of the next batch while a step computes; `take` then finds them.

        Returns:
            False, without copying, if memory would have to be allocated: CUDA may then wait for all GPUs, which may
            wait for each other in the middle of a step. Also False if an array lies on a GPU.
        """
        parts = _parts(batch, rows)
        layout = self._layout_of(parts)
        self._staged = None
        buffer, needed = self._buffers[self._other], layout.nbytes
        if buffer is None or buffer.nbytes < needed or (layout.host and self._ring.room < needed):
            return False
        if layout.cards:  # they do not use the host's link, and a kernel may have to be loaded
            return False
        self._copying = True
        self._staged = self._send("stage", batch, rows, parts, layout, self._other, self._other_is_free)
        return True

    def has_staged(self, batch: Sequence[Any], rows: Rows) -> bool:
        """Whether `take` would find these rows staged."""
        return self._staged is not None and self._staged.holds(batch, rows)

    def forget(self) -> None:
        """Discard the staged rows. Their copy may still run; later copies are ordered after it."""
        self._staged = None

    def recover(self) -> None:
        """Reset after a failure, when nothing runs: staged rows may be incomplete, and both buffers are free."""
        self._staged = self._other_is_free = None
        self._copying = False
        self._ring.recover()

    def close(self) -> None:
        """Free the memory once the GPU is done with it."""
        self.recover()
        self._error = None
        self._ring.close()
        self._read.clear()
        self._forget_layouts()
        self._buffers = [None] * BATCHES_IN_FLIGHT

    @property
    def _other(self) -> int:
        return (self._turn + 1) % BATCHES_IN_FLIGHT

    def _turn_over(self, nbytes: int, pinned_nbytes: int) -> QueueEvent:
        """Select a buffer for the next rows and reserve pinned memory; returns the event after which it is free."""
        # Staged rows for another step keep their buffer.
        if self._staged is None:
            self._turn = self._other
            self._grow(self._other, nbytes)
        self._grow(self._turn, nbytes)
        if self._ring.room < pinned_nbytes:
            self._device.copy_in.record().wait_issued(self._timeout)  # then the worker does not use the ring
            self._ring.reserve(pinned_nbytes)
        self._other_is_free = self._device.compute.record()
        return self._other_is_free

    def _grow(self, turn: int, nbytes: int) -> None:
        """Grow a device buffer to at least `nbytes`."""
        buffer = self._buffers[turn]
        if buffer is None or buffer.nbytes < nbytes:
            room = 1 << max(12, math.ceil(math.log2(max(1, nbytes))))
            self._forget_layouts()  # they hold the buffer
            self._buffers[turn] = self._device.empty((room,), np.dtype(np.uint8))

    def _forget_layouts(self) -> None:
        self._layouts.clear()
        self._places.clear()

    def _layout_of(self, parts: Sequence[Any]) -> BatchLayout:
        """Where these rows lie in a buffer."""
        key = tuple([(part.shape, part.dtype, type(part)) for part in parts])
        found = self._layouts.get(key)
        if found is None or found.cards:  # the cards are not in the key
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            found = self._layouts[key] = BatchLayout(parts)
        return found

    def _send(
        self,
        name: str,
        batch: Sequence[Any],
        rows: Rows,
        parts: Sequence[Any],
        layout: BatchLayout,
        turn: int,
        free: QueueEvent | None,
    ) -> _Staged:
        """Enqueue the copies into a buffer, after the event `free` that ends its use. `name`: theirs, in traces."""
        copy_in = self._device.copy_in
        arrays = layout.on(self._buffers[turn], parts, self._device.ordinal)
        if free is not None:
            copy_in.wait(free)
        callers = [_behind_caller(ordinal) for ordinal in layout.cards]
        copy = partial(self._copy, arrays, parts, layout, callers)
        copy_in.issue(copy if spans.now.recorder is None else partial(self._traced, name, rows.count, copy))
        return _Staged(list(batch), rows, list(arrays), copy_in.record())

    def _traced(self, name: str, rows: int, work: Work) -> None:
        """Run copy stream work that brings these rows, for a trace."""
        with spans.span(name, self._device.copy_in, rows=rows):
            work()

    def _copy(
        self, arrays: Sequence[Any], parts: Sequence[Any], layout: BatchLayout, callers: Sequence[CallersWork]
    ) -> None:
        """Fill a pinned buffer with the host rows, and enqueue the copies. Runs on the worker as copy stream work."""
        stream = self._device.copy_in
        assert isinstance(stream, CudaStream)
        if layout.host:
            pinned = self._ring.take(layout.nbytes)
            at = self._ring.address
            layout.fill(pinned, at, parts)
            if layout.whole:
                target = cupy_api.array_pointer(arrays[layout.host[0]])
                cupy_api.copy_async(target, at + layout.first, layout.length, stream.handle)
            else:
                for i in layout.host:
                    target, source = cupy_api.array_pointer(arrays[i]), at + layout.starts[i]
                    cupy_api.copy_async(target, source, parts[i].nbytes, stream.handle)
            self._ring.release(stream.now())
        if not layout.cards:
            return
        for caller in callers:
            cupy_api.stream_wait_event(stream.handle, caller.event)
        near: list[tuple[Any, Any]] = []
        far: list[tuple[Any, Any]] = []
        for target, part in zip(arrays, parts, strict=True):
            if part.nbytes and cupy_api.is_array(part):
                direct = reaches(self._device.ordinal, cupy_api.array_device(part))
                (near if direct else far).append((target, part))
        if len(near) > 1:
            slice_rows(self._device.kernels, [_whole(*pair) for pair in near], stream=stream.handle)
            near = []
        for target, part in near + far:
            self._device.copy_rows(target, part, stream.handle)

    def _gather(self, rows: RowGather, at: int) -> None:
        """Copy row numbers to a buffer of the GPU and launch the gather. Runs on the worker as copy stream work."""
        stream = self._device.copy_in
        assert isinstance(stream, CudaStream)
        pinned = self._ring.take(rows.pinned_nbytes)
        rows.fill(pinned)
        cupy_api.copy_async(at, pinned.ctypes.data, rows.pinned_nbytes, stream.handle)
        self._ring.release(stream.now())
        error = cupy_api.array_pointer(self._error)
        slice_rows(self._device.kernels, **rows.launch(at), error=error, stream=stream.handle)


def _whole(target: Any, part: Any) -> RowSlice:
    """The copy of all rows of an array to another place."""
    rows = part.shape[0]
    return RowSlice(
        source=cupy_api.array_pointer(part),
        destination=cupy_api.array_pointer(target),
        rows=rows,
        row_elements=part.nbytes // rows,
        source_rows=rows,
    )


def _behind_caller(ordinal: int) -> CallersWork:
    """An event after all work that the caller has enqueued on a GPU so far. Called on the caller's thread."""
    with cupy_api.on(ordinal):
        return CallersWork()


def _parts(batch: Sequence[Any], rows: Rows) -> list[Any]:
    """The rows of every array."""
    start, stop = rows.start, rows.stop
    return [(array if type(array) is np.ndarray else _adopted(array))[start:stop] for array in batch]


def _adopted(x: Any) -> Any:
    """Another library's GPU array (`__cuda_array_interface__`) as a cupy.ndarray; anything else unchanged.

    Raises:
        ValueError: the array is not C-contiguous; rows are copied as runs of bytes.
    """
    if cupy_api.is_array(x):
        straight = bool(x.flags.c_contiguous)
    elif hasattr(x, "__cuda_array_interface__"):
        found = x.__cuda_array_interface__
        ptr, shape, dtype = int(found["data"][0]), tuple(found["shape"]), np.dtype(found["typestr"])
        strides = found.get("strides")
        straight = strides is None or tuple(strides) == np.empty((0, *shape[1:]), dtype).strides
        x = cupy_api.array(ptr, shape, dtype, cupy_api.pointer_device(ptr), x)
    else:
        return x
    if not straight:
        raise ValueError(
            "An array on a GPU must be C-contiguous to be split by rows. Received: a non-contiguous array of shape "
            f"{tuple(x.shape)}. Pass cupy.ascontiguousarray(array), or tensor.contiguous()."
        )
    return x
