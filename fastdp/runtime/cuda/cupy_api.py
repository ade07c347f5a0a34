"""CUDA's runtime as plain functions over integers. Only this module, cupy_nccl.py and cupy_timing.py import CuPy.

Pointers, streams, events, graphs and modules are CUDA's handles as ints; devices are CUDA ordinals. Functions that
take a device make it current during the call. The others act on the thread's current device, or on the device
of their handle. Nothing here waits for a GPU.

Errors are CuPy's: `CudaError`, `DriverError` and `NcclError`, each a RuntimeError with CUDA's error name and
description, such as "cudaErrorMemoryAllocation: out of memory". After an asynchronous failure, the next call of any
kind raises the failure, and so does `event_done`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np
from cupy.cuda import driver
from cupy.cuda import runtime as cudart

from fastdp.runtime.cuda.cupy_nccl import *  # noqa: F403  re-exported, so that callers use one namespace
from fastdp.runtime.cuda.driver import NOT_READY, event_status
from fastdp.runtime.environment import check_environment as check_environment

CudaError: type[RuntimeError] = cudart.CUDARuntimeError
DriverError: type[RuntimeError] = driver.CUDADriverError

# Constants that CuPy 14 lacks: cudaErrorPeerAccessAlreadyEnabled, and the two halves of the compute capability
# (cudaDevAttrComputeCapabilityMajor and -Minor).
_PEER_ACCESS_ALREADY_ENABLED = 704
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76

_CAPTURE_MODES = {
    "global": cudart.streamCaptureModeGlobal,
    "thread_local": cudart.streamCaptureModeThreadLocal,
    "relaxed": cudart.streamCaptureModeRelaxed,
}

# CUPY_CUDA_ARRAY_INTERFACE_SYNC is not changed. fastdp passes memory by pointers and DLPack and does not need it, but
# the user's arrays from other libraries would race without that synchronization.

# The devices whose context this process has entered by `on`.
_entered: set[int] = set()


# Devices


def device_count() -> int:
    """The number of GPUs that CUDA_VISIBLE_DEVICES leaves visible; creates no context."""
    return int(cudart.getDeviceCount())


_NOTHING = contextlib.nullcontext()


def on(device: int) -> contextlib.AbstractContextManager[None]:
    """Make a device current in this thread, and restore the previous one on exit.

    Since CUDA 12, making a device current creates its context, which takes hundreds of megabytes. A thread that
    has not used CUDA yet has device 0 as its default. Such a thread stays on `device`, so that device 0 gets no
    context unless it is in use.
    """
    # Without a current context, as in a thread new to CUDA, driver calls such as a launch would fail.
    is_current = cudart.getDevice() == device and device in _entered and driver.ctxGetCurrent()
    return _NOTHING if is_current else _made_current(device)


@contextlib.contextmanager
def _made_current(device: int) -> Iterator[None]:
    previous = int(cudart.getDevice())
    in_use = previous in _entered or driver.ctxGetCurrent() != 0
    cudart.setDevice(device)
    _entered.add(device)
    try:
        yield
    finally:
        if in_use and previous != device:
            cudart.setDevice(previous)


@contextlib.contextmanager
def restored_device(first: int) -> Iterator[None]:
    """For a thread that goes from device to device by `switch_to`: restore the present one on exit, as `on` does.

    Args:
        first: the device to begin with.
    """
    previous = int(cudart.getDevice())
    in_use = previous in _entered or has_context()
    cudart.setDevice(first)
    _entered.add(first)
    try:
        yield
    finally:
        if in_use:
            switch_to(previous)


def has_context() -> bool:
    """Whether this thread has a current context, of any device."""
    return bool(driver.ctxGetCurrent())


def switch_to(device: int) -> None:
    """Make a device current in this thread, inside `restored_device`."""
    cudart.setDevice(device)


def memory_info(device: int) -> tuple[int, int]:
    """Free and total bytes of a device's memory."""
    with on(device):
        free, total = cudart.memGetInfo()
    return int(free), int(total)


def compute_capability(device: int) -> int:
    """The compute capability as an integer, such as 90; creates no context."""
    major = cudart.deviceGetAttribute(_CAPABILITY_MAJOR, device)
    return int(major * 10 + cudart.deviceGetAttribute(_CAPABILITY_MINOR, device))


def multiprocessors(device: int) -> int:
    """The device's number of multiprocessors; creates no context."""
    return int(cudart.deviceGetAttribute(cudart.cudaDevAttrMultiProcessorCount, device))


def driver_version() -> int:
    """The newest CUDA version that the driver supports, as 1000 * major + 10 * minor; 0 without a driver."""
    return int(cudart.driverGetVersion())


def runtime_version() -> int:
    """The version of CuPy's CUDA runtime, as 1000 * major + 10 * minor."""
    return int(cudart.runtimeGetVersion())


def pci_bus_id(device: int) -> str:
    """The PCI bus ID in NVML's format, such as "00000000:3B:00.0"; creates no context.

    The device's UUID cannot serve as a key: CuPy truncates it at the first zero byte.
    """
    domain, rest = str(cudart.deviceGetPCIBusId(device)).split(":", 1)
    return f"{domain.zfill(8)}:{rest}".upper()


def can_access_peer(device: int, peer: int) -> bool:
    """Whether CUDA reports that `device` can access `peer`'s memory; on some platforms the report is wrong."""
    return bool(cudart.deviceCanAccessPeer(device, peer))


def enable_peer_access(device: int, peer: int) -> None:
    """Let work on `device` access `peer`'s memory. No error if it is already enabled, for example by torch."""
    with on(device):
        try:
            cudart.deviceEnablePeerAccess(peer)
        except CudaError as error:
            if getattr(error, "status", None) != _PEER_ACCESS_ALREADY_ENABLED:
                raise


def torch_device(device: int) -> str:
    """The device's name in torch, which numbers the visible devices as CUDA does."""
    return f"cuda:{device}"


# Memory


def malloc(device: int, nbytes: int) -> int:
    """cudaMalloc: memory that peers and NCCL can access. May wait for all GPUs, so not for the steady state."""
    with on(device):
        return int(cudart.malloc(nbytes))


def free(ptr: int) -> None:
    """Free memory from `malloc`; waits for the device."""
    cudart.free(ptr)


def host_alloc(nbytes: int) -> int:
    """Host memory that is pinned for every device. May wait for all GPUs, so not for the steady state."""
    return int(cudart.hostAlloc(nbytes, cudart.hostAllocPortable))


def host_free(ptr: int) -> None:
    """Free memory from `host_alloc`."""
    cudart.freeHost(ptr)


def copy_async(dst: int, src: int, nbytes: int, stream: int) -> None:
    """Enqueue a copy; CUDA infers the direction from the addresses. Host memory must be pinned."""
    cudart.memcpyAsync(dst, src, nbytes, cudart.memcpyDefault, stream)


def copy_peer_async(dst: int, dst_device: int, src: int, src_device: int, nbytes: int, stream: int) -> None:
    """Enqueue a copy between devices; it goes over their link if peer access is enabled."""
    cudart.memcpyPeerAsync(dst, dst_device, src, src_device, nbytes, stream)


def fill_async(ptr: int, value: int, nbytes: int, stream: int) -> None:
    """Set each byte to `value`. The stream's device must be current."""
    cudart.memsetAsync(ptr, value, nbytes, stream)


# Streams and events

# CUDA's legacy default stream of the current device, which torch and CuPy use by default.
DEFAULT_STREAM = 0


def stream_create(device: int, priority: int = 0) -> int:
    """A stream that the legacy default stream does not block; lower priorities run first, CUDA clamps them."""
    with on(device):
        return int(cudart.streamCreateWithPriority(cudart.streamNonBlocking, priority))


def stream_destroy(stream: int) -> None:
    """Destroy a stream; its enqueued work still runs."""
    cudart.streamDestroy(stream)


def stream_priority_range(device: int | None = None) -> tuple[int, int]:
    """(least, greatest) priority, such as (0, -5), of a device (None: the current one).

    CuPy lacks cudaDeviceGetStreamPriorityRange, so the range is read from how CUDA clamps extreme priorities.
    """
    ends = []
    for asked in (2**20, -(2**20)):
        stream = stream_create(int(cudart.getDevice()) if device is None else device, asked)
        try:
            ends.append(int(cudart.streamGetPriority(stream)))
        finally:
            cudart.streamDestroy(stream)
    return ends[0], ends[1]


@contextlib.contextmanager
def current_stream(device: int, stream: int) -> Iterator[None]:
    """Make third-party CuPy code run on this device and stream."""
    with on(device), cupy.cuda.Stream.from_external(_Handle(stream)):
        yield


def for_cupy(stream: int) -> contextlib.AbstractContextManager[object]:
    """CuPy's object for a stream of the current device: while it is entered, CuPy's code runs on the stream."""
    return cupy.cuda.Stream.from_external(_Handle(stream))


class _Handle:
    """A stream for other libraries, by the CUDA stream protocol, version 0."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream


def event_create() -> int:
    """An event of the current device, without timing."""
    return int(cudart.eventCreateWithFlags(cudart.eventDisableTiming))


def event_destroy(event: int) -> None:
    """Destroy an event; a stream that waits for it still does."""
    cudart.eventDestroy(event)


def event_record(event: int, stream: int) -> None:
    """Complete the event once all work enqueued on the stream so far is done. Both belong to one device.

    On DEFAULT_STREAM, the event also covers all blocking streams of the current device. fastdp's are non-blocking.
    """
    cudart.eventRecord(event, stream)


def event_done(event: int) -> bool:
    """Whether the work before the event is done; True for an event that was never recorded.

    Raises:
        CudaError: earlier work failed.
    """
    status = event_status(event)
    if status not in (0, NOT_READY):
        cudart.check_status(status)
    return status == 0


def stream_wait_event(stream: int, event: int) -> None:
    """Hold back work enqueued from now on until the event, as last recorded, is done."""
    cudart.streamWaitEvent(stream, event)


# Kernels


def module_load(image: bytes) -> int:
    """Load a cubin into the current device's context."""
    return int(driver.moduleLoadData(image))


def module_function(module: int, name: str) -> int:
    """The kernel of this name."""
    return int(driver.moduleGetFunction(module, name))


def launch(function: int, grid: int, block: int, shared: int, stream: int, arguments: int) -> None:
    """Launch a kernel on its device, which is current. CUDA has copied the arguments on return.

    Args:
        arguments: the address of an array that holds the address of each argument.
    """
    driver.launchKernel(function, grid, 1, 1, block, 1, 1, shared, stream, arguments, 0)


# Graphs


def capture_begin(stream: int, mode: str = "thread_local") -> None:
    """Record work enqueued from now on instead of running it; `mode` sets whose unsafe calls CUDA rejects."""
    cudart.streamBeginCapture(stream, _CAPTURE_MODES[mode])


def capture_end(stream: int) -> int:
    """End the recording on the stream where it began; returns the graph, which the caller destroys."""
    return int(cudart.streamEndCapture(stream))


def graph_instantiate(graph: int) -> int:
    """Create a launchable graph; the source graph may then be destroyed."""
    return int(cudart.graphInstantiate(graph))


def graph_upload(graph_exec: int, stream: int) -> None:
    """Prepare the GPU for a graph's first launch, which then allocates nothing. The device must be current."""
    cudart.graphUpload(graph_exec, stream)


def graph_launch(graph_exec: int, stream: int) -> None:
    """Enqueue a whole graph. The stream's device must be current."""
    cudart.graphLaunch(graph_exec, stream)


def graph_exec_destroy(graph_exec: int) -> None:
    """Destroy a launchable graph."""
    cudart.graphExecDestroy(graph_exec)


def graph_destroy(graph: int) -> None:
    """Destroy a graph."""
    cudart.graphDestroy(graph)


# Arrays


def array(ptr: int, shape: tuple[int, ...], dtype: Any, device: int, owner: object) -> Any:
    """A C-contiguous cupy.ndarray over memory of `owner`, which the array and its views keep alive."""
    dtype = np.dtype(dtype)
    nbytes = dtype.itemsize
    for length in shape:
        nbytes *= length
    memory = cupy.cuda.UnownedMemory(ptr, nbytes, owner, device)
    return cupy.ndarray(shape, dtype=dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))


def contiguous(x: Any) -> Any:
    """A cupy.ndarray itself if it is C-contiguous, else a copy made on CuPy's current stream of the current device.

    CuPy's allocator gives the copy's memory again to work of that stream, so it need not be kept for what is enqueued
    there.
    """
    return x if x.flags.c_contiguous else cupy.ascontiguousarray(x)


def is_array(x: object) -> bool:
    """Whether x is a cupy.ndarray."""
    return isinstance(x, cupy.ndarray)


def pointer_device(ptr: int) -> int:
    """The device of an address in device memory."""
    return int(cudart.pointerGetAttributes(ptr).device)


def array_pointer(x: Any) -> int:
    """The address of a cupy.ndarray's first element."""
    return int(x.data.ptr)


def array_device(x: Any) -> int:
    """The device of a cupy.ndarray's memory."""
    return int(x.data.device_id)
