"""Pinned host memory in which a model's own weights live while its replicas run on GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.streams import current_stream


class HostHome:
    """An allocator (fastdp.buffers) of pinned host memory that the first GPU copies to and from.

    Args:
        device: the CudaDevice that runs the copies.
    """

    on_gpu = False
    torch_device = "cpu"
    space = "host"

    def __init__(self, device: Any) -> None:
        self._device = device

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A pinned array of zeros."""
        array: np.ndarray = self._device.pinned.empty(shape, dtype)
        array[...] = 0
        return array

    def copy(self, target: np.ndarray, source: Any) -> None:
        """Copy a host or GPU array and wait. On a worker, a GPU copy keeps the order of the stream it issues to."""
        if cupy_api.is_array(source):
            # The weights may belong to another engine by now, whose first GPU is a different one.
            stream = current_stream()
            (self._device if stream is None else stream.device).fetch(target, source)
        else:
            np.copyto(target, source)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array
