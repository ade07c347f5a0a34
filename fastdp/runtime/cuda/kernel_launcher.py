"""Launches fastdp's kernels on a GPU through the driver API."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from fastdp.launch import cubin, nvrtc
from fastdp.launch.loader import Kernels
from fastdp.runtime.cuda import cupy_api

__all__ = ["CudaLauncher", "kernels"]


class CudaLauncher:
    """Loads and launches kernels on one device; implements fastdp.launch.Launcher.

    Modules belong to the device's context, which lives as long as the process.
    """

    def __init__(self, device: int) -> None:
        self._device = device

    def load(self, cubin: bytes) -> int:
        """Load machine code into the device's context."""
        with cupy_api.on(self._device):
            return cupy_api.module_load(cubin)

    def function(self, module: int, name: str) -> int:
        """The kernel of this name in a module."""
        with cupy_api.on(self._device):
            return cupy_api.module_function(module, name)

    def launch(self, function: int, grid: int, block: int, args: ctypes.Structure, stream: int) -> None:
        """Enqueue a launch on one of the device's streams."""
        with cupy_api.on(self._device):
            self.bound(function, grid, block, args, stream)()

    def bound(self, function: int, grid: int, block: int, args: ctypes.Structure, stream: int) -> Callable[[], None]:
        """A launch to be made many times with the same arguments, while the device is current."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        at = ctypes.addressof(pointers)

        def launch(_kept: object = (pointers, args)) -> None:
            cupy_api.launch(function, grid, block, 0, stream, at)

        return launch


def kernels(device: int) -> Kernels:
    """The kernels of a device, compiled by an NVRTC whose machine code the driver accepts.

    Raises:
        fastdp.launch.nvrtc.NvrtcNotFoundError: raised at the first load if no such NVRTC is installed.
    """
    return Kernels(
        CudaLauncher(device), cupy_api.compute_capability(device), cupy_api.multiprocessors(device), _compiled
    )


def _compiled(name: str, architecture: int) -> bytes:
    """One kernel file's cubin, from the cache or the compiler."""
    return cubin.cubin(name, architecture, nvrtc.load(cupy_api.driver_version() // 1000, architecture))
