"""A GPU behind the interface of tests/kernels/host_device.py, so that the same checks run on both."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastdp.launch import Kernels

GUARD, POISON, BOUNDARY = 64, 0xCD, 16


class KernelDevice:
    """Memory and launches on one CudaDevice.

    Args:
        device: a CudaDevice.
        streams: handles of CUDA streams; a launch on "stream" i goes to the i-th.
    """

    def __init__(self, device: Any, streams: list[int]) -> None:
        self._device, self._streams = device, streams
        self._arrays: dict[int, tuple[Any, int]] = {}
        self._own = device.kernels
        self.kernels = Kernels(self, self._own._architecture, self._own.sm_count, self._own._compile_file)
        self.launches: list[tuple[str, int, int, ctypes.Structure]] = []

    # fastdp.launch.Launcher

    def load(self, cubin: bytes) -> Any:
        return self._own._launcher.load(cubin)

    def function(self, module: Any, name: str) -> tuple[Any, str]:
        return self._own._launcher.function(module, name), name

    def launch(self, function: tuple[Any, str], grid: int, block: int, args: ctypes.Structure, stream: int) -> None:
        handle, name = function
        self.launches.append((name, grid, block, args))
        self._own._launcher.launch(handle, grid, block, args, self._streams[stream])

    # memory

    def empty(self, nbytes: int, lead: int = 0) -> int:
        """Address of poisoned memory, `lead` bytes past a 16-byte boundary, with guard zones around it."""
        before = GUARD + lead
        array = self._device.empty((before + nbytes + GUARD,), np.dtype(np.uint8))
        self._device.copy(array, np.full(array.shape, POISON, np.uint8))
        address = int(array.data.ptr) + before
        self._arrays[address] = array, before
        return address

    def put(self, array: np.ndarray, lead: int = 0) -> int:
        """Address of a copy of the array."""
        address = self.empty(array.nbytes, lead)
        self.write(address, array)
        return address

    def write(self, address: int, array: np.ndarray) -> None:
        if array.nbytes:
            self.synchronize()
            self._device.copy(
                self._bytes(address, array.nbytes), np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            )

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        """The array at this address, of the shape and dtype of `like`, after all launches."""
        self.synchronize()
        data = self._device.to_host(self._bytes(address, like.nbytes)) if like.nbytes else np.empty(0, np.uint8)
        return data.view(like.dtype).reshape(like.shape)

    def synchronize(self) -> None:
        """Wait until all launches are over."""
        for handle in self._streams:
            self._device._wait_for(handle)

    @contextlib.contextmanager
    def scope(self) -> Iterator[KernelDevice]:
        """Free at the end what was allocated inside, after checking the guard zones."""
        self._arrays.clear()
        self.launches.clear()
        yield self
        self.synchronize()
        for address, (array, before) in self._arrays.items():
            data = self._device.to_host(array)
            assert (data[:before] == POISON).all(), f"bytes before {address:#x} were written"
            assert (data[-GUARD:] == POISON).all(), f"bytes behind {address:#x} were written"
        self._arrays.clear()

    def _bytes(self, address: int, nbytes: int) -> Any:
        array, before = self._arrays[address]
        return array[before : before + nbytes]


def on_device(device: Any, count: int = 8) -> tuple[KernelDevice, list[int]]:
    """A kernel device with `count` streams of its own, which the caller destroys."""
    from fastdp.runtime.cuda import cupy_api

    streams = [cupy_api.stream_create(device.ordinal) for _ in range(count)]
    return KernelDevice(device, streams), streams
