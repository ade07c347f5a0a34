"""Virtual devices in host memory: the worker of each device runs the work itself, on NumPy arrays."""

from __future__ import annotations

import numpy as np

from fastdp.backend.queue import QueueDevice

ALIGNMENT = 64


class HostDevice(QueueDevice):
    """One virtual device: a worker thread, four streams and NumPy memory.

    Args:
        index: ordinal among the virtual devices.
    """

    kind = "virtual"

    def __init__(self, index: int) -> None:
        super().__init__(index, f"virtual:{index}")

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Uninitialized memory of `shape` and `dtype`, 64-byte aligned, owned by the array."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = np.empty(nbytes + ALIGNMENT, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        return raw[offset : offset + nbytes].view(dtype).reshape(shape)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Memory as of `empty`, all zero."""
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy an array into another of the same shape and dtype, at once."""
        np.copyto(target, source)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        """The array itself: it is in host memory."""
        return array
