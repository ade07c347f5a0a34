"""CUDA's runtime as plain functions over integers: with cupy_nccl.py all that imports CuPy.

Pointers, streams, events, graphs and modules are the handles that CUDA gives, as ints; devices are CUDA
ordinals. Functions that name a device make it current for their own time; the others act on the thread's
current device, or where their handle belongs. Nothing here waits for a GPU.

Errors are CuPy's: `CudaError`, `DriverError` and `NcclError`, each a RuntimeError whose text is CUDA's own name
and sentence, such as "cudaErrorMemoryAllocation: out of memory". An asynchronous failure of earlier work is
raised by whatever call comes next, and by `event_done`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import Any

import cupy
import numpy as np
from cupy.cuda import driver
from cupy.cuda import runtime as cudart

from fastdp.runtime.cuda.cupy_nccl import *  # noqa: F403  the other half, one namespace

CudaError: type[RuntimeError] = cudart.CUDARuntimeError
DriverError: type[RuntimeError] = driver.CUDADriverError

# What CuPy 14 does not name: cudaErrorNotReady, cudaErrorPeerAccessAlreadyEnabled, the two halves of the
# compute capability (cudaDevAttrComputeCapabilityMajor and -Minor).
_NOT_READY = 600
_PEER_ACCESS_ALREADY_ENABLED = 704
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76

_CAPTURE_MODES = {
    "global": cudart.streamCaptureModeGlobal,
    "thread_local": cudart.streamCaptureModeThreadLocal,
    "relaxed": cudart.streamCaptureModeRelaxed,
}

# Set where several GPUs work together, unless the user chose otherwise.
_SEVERAL_GPUS_ENVIRONMENT = {
    # A kernel that is loaded at its first launch may wait for the whole GPU, and so for a collective that waits
    # for that very launch. Counts only before CUDA's first call in the process.
    "CUDA_MODULE_LOADING": "EAGER",
    # NCCL otherwise orders captured against eager collectives with extra events; fastdp mixes them on no communicator.
    "NCCL_GRAPH_MIXING_SUPPORT": "0",
}
# CUPY_CUDA_ARRAY_INTERFACE_SYNC stays as it is: fastdp hands memory over by pointers and DLPack, and without that
# synchronization the user's own arrays from other libraries would race.

# The devices whose context this process has entered by `on`.
_entered: set[int] = set()


# Devices


def device_count() -> int:
    """How many GPUs CUDA_VISIBLE_DEVICES leaves; makes no context."""
    return int(cudart.getDeviceCount())


@contextlib.contextmanager
def on(device: int) -> Iterator[None]:
    """Make a device current in this thread, and give back the one before.

    Since CUDA 12, to make a device current gives it a context, which takes hundreds of megabytes. So a thread
    that has not used CUDA yet, and stands at device 0 by default, stays on `device`: device 0 gets no context
    unless it is in use.
    """
    previous = int(cudart.getDevice())
    if previous == device and device in _entered and driver.ctxGetCurrent():
        # In a thread that is new to CUDA the driver's own calls, such as a launch, would find no context.
        yield
        return
    in_use = previous in _entered or driver.ctxGetCurrent() != 0
    cudart.setDevice(device)
    _entered.add(device)
    try:
        yield
    finally:
        if in_use and previous != device:
            cudart.setDevice(previous)


def check_environment(devices: Sequence[int]) -> None:
    """Refuse settings under which these devices cannot work together, and choose those that the user left open.

    Call before the first CUDA work. Sets CUDA_MODULE_LOADING and NCCL_GRAPH_MIXING_SUPPORT where there are
    several devices and neither is set.

    Raises:
        RuntimeError: CUDA_LAUNCH_BLOCKING=1 with several devices.
    """
    if len(set(devices)) < 2:
        return
    blocking = os.environ.get("CUDA_LAUNCH_BLOCKING", "0").strip()
    if blocking not in ("", "0"):
        raise RuntimeError(
            f"CUDA_LAUNCH_BLOCKING={blocking!r} with {len(set(devices))} GPUs in one process: each launch would wait "
            "until its kernel is over, and a collective is over only when all GPUs have launched theirs. Unset it, "
            "or use one GPU."
        )
    for name, value in _SEVERAL_GPUS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def memory_info(device: int) -> tuple[int, int]:
    """Free and total bytes of a device's memory."""
    with on(device):
        free, total = cudart.memGetInfo()
    return int(free), int(total)


def compute_capability(device: int) -> int:
    """Such as 90; makes no context."""
    major = cudart.deviceGetAttribute(_CAPABILITY_MAJOR, device)
    return int(major * 10 + cudart.deviceGetAttribute(_CAPABILITY_MINOR, device))


def multiprocessors(device: int) -> int:
    """How many multiprocessors the device has; makes no context."""
    return int(cudart.deviceGetAttribute(cudart.cudaDevAttrMultiProcessorCount, device))


def driver_version() -> int:
    """The newest CUDA that the driver runs, as 1000 * major + 10 * minor; 0 without a driver."""
    return int(cudart.driverGetVersion())


def runtime_version() -> int:
    """The CUDA runtime in CuPy, as 1000 * major + 10 * minor."""
    return int(cudart.runtimeGetVersion())


def pci_bus_id(device: int) -> str:
    """Such as "00000000:3B:00.0", as NVML writes it; makes no context.

    The device's UUID would be no key: CuPy cuts it off at its first zero byte.
    """
    domain, rest = str(cudart.deviceGetPCIBusId(device)).split(":", 1)
    return f"{domain.zfill(8)}:{rest}".upper()


def can_access_peer(device: int, peer: int) -> bool:
    """Whether CUDA says that `device` can reach `peer`'s memory; some platforms say so and cannot."""
    return bool(cudart.deviceCanAccessPeer(device, peer))


def enable_peer_access(device: int, peer: int) -> None:
    """Let work on `device` reach `peer`'s memory. Fine if it is enabled already, by torch for example."""
    with on(device):
        try:
            cudart.deviceEnablePeerAccess(peer)
        except CudaError as error:
            if getattr(error, "status", None) != _PEER_ACCESS_ALREADY_ENABLED:
                raise


def torch_device(device: int) -> str:
    """How torch names a device. Torch and CUDA count the visible ones alike."""
    return f"cuda:{device}"


# Memory


def malloc(device: int, nbytes: int) -> int:
    """Plain cudaMalloc: memory that peers and NCCL may reach. May wait for all GPUs: never in the steady state."""
    with on(device):
        return int(cudart.malloc(nbytes))


def free(ptr: int) -> None:
    """Free what malloc gave; waits for the device."""
    cudart.free(ptr)


def host_alloc(nbytes: int) -> int:
    """Pinned host memory, pinned for every device. May wait for all GPUs: never in the steady state."""
    return int(cudart.hostAlloc(nbytes, cudart.hostAllocPortable))


def host_free(ptr: int) -> None:
    """Free what host_alloc gave."""
    cudart.freeHost(ptr)


def copy_async(dst: int, src: int, nbytes: int, stream: int) -> None:
    """Copy; CUDA sees by the addresses where they lie. Host memory must be pinned."""
    cudart.memcpyAsync(dst, src, nbytes, cudart.memcpyDefault, stream)


def copy_peer_async(dst: int, dst_device: int, src: int, src_device: int, nbytes: int, stream: int) -> None:
    """Copy between devices, over their link where peer access is enabled."""
    cudart.memcpyPeerAsync(dst, dst_device, src, src_device, nbytes, stream)


def fill_async(ptr: int, value: int, nbytes: int, stream: int) -> None:
    """Set each byte to `value`. The stream's device must be current."""
    cudart.memsetAsync(ptr, value, nbytes, stream)


# Streams and events

# CUDA's own, on which torch and CuPy work unless told otherwise; of the device that is current.
DEFAULT_STREAM = 0


def stream_create(device: int, priority: int = 0) -> int:
    """A stream that the legacy default stream does not block; lower numbers go first, CUDA clamps them."""
    with on(device):
        return int(cudart.streamCreateWithPriority(cudart.streamNonBlocking, priority))


def stream_destroy(stream: int) -> None:
    """Destroy it; its enqueued work still runs."""
    cudart.streamDestroy(stream)


def stream_priority_range(device: int | None = None) -> tuple[int, int]:
    """(least, greatest) priority, such as (0, -5), of a device (None: the current one).

    CuPy does not have cudaDeviceGetStreamPriorityRange: CUDA's clamping tells the same.
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
    """Run CuPy code of others on this device and stream."""
    with on(device), cupy.cuda.Stream.from_external(_Handle(stream)):
        yield


class _Handle:
    """A stream as other libraries exchange them: the CUDA stream protocol, version 0."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream


def event_create() -> int:
    """An event of the current device, without timing."""
    return int(cudart.eventCreateWithFlags(cudart.eventDisableTiming))


def event_destroy(event: int) -> None:
    """Destroy it; a stream that waits for it still does."""
    cudart.eventDestroy(event)


def event_record(event: int, stream: int) -> None:
    """Have the event done once all work of the stream so far is. Both belong to one device.

    On DEFAULT_STREAM: once all work of the current device's streams that do not exclude themselves is (as ours do).
    """
    cudart.eventRecord(event, stream)


def event_done(event: int) -> bool:
    """Whether the work before the event is over; True for one that was never recorded.

    Raises:
        CudaError: earlier work failed.
    """
    # CuPy gives this call's status back instead of raising.
    status = int(cudart.eventQuery(event))
    if status not in (0, _NOT_READY):
        cudart.check_status(status)
    return status == 0


def stream_wait_event(stream: int, event: int) -> None:
    """Hold back what is enqueued from now on until the event, as last recorded, is done."""
    cudart.streamWaitEvent(stream, event)


# Kernels


def module_load(image: bytes) -> int:
    """Load a cubin into the current device's context."""
    return int(driver.moduleLoadData(image))


def module_unload(module: int) -> None:
    """Unload it; no kernel of it may be running."""
    driver.moduleUnload(module)


def module_function(module: int, name: str) -> int:
    """The kernel of this name."""
    return int(driver.moduleGetFunction(module, name))


def launch(function: int, grid: int, block: int, shared: int, stream: int, params: bytes | ctypes.Structure) -> None:
    """Launch a kernel whose one parameter is a struct by value; CUDA has copied it on return.

    The stream's device must be current.
    """
    argument = ctypes.create_string_buffer(params, len(params)) if isinstance(params, bytes) else params
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    driver.launchKernel(function, grid, 1, 1, block, 1, 1, shared, stream, ctypes.addressof(pointers), 0)


# Graphs


def capture_begin(stream: int, mode: str = "thread_local") -> None:
    """Record what is enqueued from now on instead of running it; `mode` says whose unsafe calls are refused."""
    cudart.streamBeginCapture(stream, _CAPTURE_MODES[mode])


def capture_end(stream: int) -> int:
    """End the recording on the stream that it began on; gives the graph, which the caller destroys."""
    return int(cudart.streamEndCapture(stream))


def graph_instantiate(graph: int) -> int:
    """Make it launchable; the graph itself may be destroyed then."""
    return int(cudart.graphInstantiate(graph))


def graph_upload(graph_exec: int, stream: int) -> None:
    """Have the GPU get ready for a graph's first launch, which then allocates nothing. The device must be current."""
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
    """A cupy.ndarray, C-contiguous, over memory that `owner`, kept alive by the array and its views, frees."""
    dtype = np.dtype(dtype)
    nbytes = dtype.itemsize
    for length in shape:
        nbytes *= length
    memory = cupy.cuda.UnownedMemory(ptr, nbytes, owner, device)
    return cupy.ndarray(shape, dtype=dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))


def is_array(x: object) -> bool:
    """Whether x is a cupy.ndarray."""
    return isinstance(x, cupy.ndarray)


def pointer_device(ptr: int) -> int:
    """The device that an address of device memory lies on."""
    return int(cudart.pointerGetAttributes(ptr).device)


def array_pointer(x: Any) -> int:
    """The address of a cupy.ndarray's first element."""
    return int(x.data.ptr)


def array_device(x: Any) -> int:
    """The device that a cupy.ndarray's memory lies on."""
    return int(x.data.device_id)
