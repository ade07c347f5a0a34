"""Loads kernel files on first use, and defines what a device must do to launch them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

from fastdp.launch import args as ka
from fastdp.launch import cubin

__all__ = ["BoundLaunches", "Kernels", "Launcher"]


class Launcher(Protocol):
    """A device's operations for a launch. runtime/cuda/kernel_launcher.py implements them by the driver's calls."""

    def load(self, cubin: bytes) -> Any:
        """Load machine code into the device's context; returns the module."""

    def function(self, module: Any, name: str) -> Any:
        """The kernel of this name in a module."""

    def launch(self, function: Any, grid: int, block: int, args: ctypes.Structure, stream: int) -> None:
        """Enqueue a 1-D launch whose only parameter is `args`, by value; `args` may be dropped on return."""

    def bound(self, function: Any, grid: int, block: int, args: ctypes.Structure, stream: int) -> Callable[[], None]:
        """A launch to be made many times with the same arguments, while the device is current."""


class Kernels:
    """The kernels of one device, each file compiled and loaded on first use.

    Load before recording a CUDA graph or launching a collective: loading a module may synchronize.

    Args:
        launcher: the device's launcher.
        architecture: its compute capability, such as 90.
        sm_count: its number of multiprocessors.
        compile_file: compiles a kernel file, given its name and an architecture, to a cubin.

    Example: `kernels = Kernels(launcher, 90, 132); concat_rows(kernels, [RowPiece(x, y, 8, 4, 0)], stream=s)`
    """

    def __init__(
        self,
        launcher: Launcher,
        architecture: int,
        sm_count: int,
        compile_file: Callable[[str, int], bytes] = cubin.cubin,
    ) -> None:
        self.sm_count = sm_count
        self._launcher = launcher
        self._architecture = architecture
        self._compile_file = compile_file
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str], Any] = {}

    def load(self, *files: str) -> None:
        """Compile and load the named kernel files now, or all if none is named."""
        for file in files or cubin.kernel_names():
            if file not in self._modules:
                self._modules[file] = self._launcher.load(self._compile_file(file, self._architecture))

    def launch(
        self, file: str, entry: str, grid: int, args: ctypes.Structure, stream: int, block: int = ka.THREADS
    ) -> None:
        """Launch one entry of a kernel file on the stream."""
        self._launcher.launch(self._function(file, entry), grid, block, args, stream)

    def bound(
        self, file: str, entry: str, grid: int, args: ctypes.Structure, stream: int, block: int = ka.THREADS
    ) -> Callable[[], None]:
        """As `launch`, but return the launch, to be made many times while the device is current."""
        return self._launcher.bound(self._function(file, entry), grid, block, args, stream)

    def _function(self, file: str, entry: str) -> Any:
        function = self._functions.get((file, entry))
        if function is None:
            self.load(file)
            function = self._functions[file, entry] = self._launcher.function(self._modules[file], entry)
        return function


class BoundLaunches:
    """Stands in for a device's kernels where their functions are called, and keeps the launches instead of making them.

    Args:
        kernels: the device's.

    Attributes:
        made: the launches, in their order.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.sm_count = kernels.sm_count
        self.made: list[Callable[[], None]] = []
        self._kernels = kernels

    def launch(
        self, file: str, entry: str, grid: int, args: ctypes.Structure, stream: int, block: int = ka.THREADS
    ) -> None:
        """Keep a launch."""
        self.made.append(self._kernels.bound(file, entry, grid, args, stream, block))
