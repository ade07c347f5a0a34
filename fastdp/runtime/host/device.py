"""A virtual device: a worker thread that runs its work on NumPy arrays in host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdp.runtime.host.resources import LARGE_NBYTES, keep_freed_memory, large_memory
from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Rows
from fastdp.tracing import spans

ALIGNMENT = 64


class HostDevice(QueueDevice):
    """One virtual device: a worker thread, four streams and NumPy memory.

    Args:
        index: ordinal among the virtual devices.
        name: shown in messages; None: "virtual:" and the ordinal.

    The first device makes malloc keep the memory that steps free, for the next step (host/resources.py).
    """

    kind = "virtual"
    on_gpu = False
    space = "host"
    torch_device = "cpu"
    peak_nbytes = None  # all devices share the process's memory

    def __init__(self, index: int, name: str | None = None) -> None:
        keep_freed_memory()
        super().__init__(index, name or f"virtual:{index}")

    def answers(self) -> bool:
        """Yes: a virtual device is a thread, and another one takes its place."""
        return True

    def part(self, name: str) -> HostDevice:
        """Another virtual device, for a shard."""
        return HostDevice(self.index, name)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Uninitialized memory of `shape` and `dtype`, 64-byte aligned, owned by the array."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = large_memory(nbytes) if nbytes >= LARGE_NBYTES else np.empty(nbytes + ALIGNMENT, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        return raw[offset : offset + nbytes].view(dtype).reshape(shape)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Memory as from `empty`, filled with zeros."""
        array = self.empty(shape, dtype)
        if array.nbytes < LARGE_NBYTES:  # the system zeroes the pages of large arrays when they are first touched
            array[...] = 0
        return array

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy an array into another of the same shape and dtype, synchronously."""
        np.copyto(target, source)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        """The array itself, which is already in host memory."""
        return array

    def host_home(self) -> HostDevice:
        """The device itself, whose memory is host memory."""
        return self

    # A batch in, outputs out.

    def take_rows(self, batch: Sequence[np.ndarray], rows: Rows) -> list[np.ndarray]:
        """This device's rows of every array, as views; valid as long as the batch is."""
        if spans.now.recorder is not None:
            with spans.span("scatter", self.copy_in, rows=rows.stop - rows.start):
                return [array[rows.start : rows.stop] for array in batch]
        return [array[rows.start : rows.stop] for array in batch]

    def stage_rows(self, batch: Sequence[np.ndarray], rows: Rows) -> bool:
        """Does nothing: rows are views, so there is nothing to copy ahead."""
        return True

    def forget_staged(self) -> None:
        """Nothing is staged."""

    def merged(self, shape: tuple[int, ...], dtype: np.dtype, *, on_host: bool) -> np.ndarray:
        """An uninitialized array for a merged output, owned by the caller. Always in host memory."""
        return np.empty(shape, dtype)

    def prepare_to_merge(self) -> None:
        """Does nothing."""

    def put_rows(self, targets: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Copy a replica's outputs to their rows of the merged arrays, synchronously."""
        for target, output in zip(targets, outputs, strict=True):
            target[...] = output
