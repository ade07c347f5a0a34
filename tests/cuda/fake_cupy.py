"""Modules that stand in for CuPy 14 in sys.modules: the names that fastdp uses, over a Simulation.

`tests/cuda/test_fake.py` holds the names and their parameters to the real CuPy's where that is installed.
Arrays are NumPy arrays on the simulated GPU's memory: torch.from_dlpack gives a CPU tensor on it. Their arithmetic is
NumPy's, at once and unseen by the race detector: `Simulation.submit` is the way to put work on a stream. And
NumPy takes them without `.get()`, which CuPy refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import types
from collections.abc import Iterator
from types import ModuleType

import kernel_models
import numpy as np
import pytest
from simulated_driver import loaded
from simulated_memory import SimulationError
from simulated_nccl import Gathering, NcclError, group_end, group_start, make_communicator
from simulation import CUDARuntimeError, Event, Simulation, Stream, site

MODULES = ("cupy", "cupy.cuda", "cupy.cuda.runtime", "cupy.cuda.nccl")
LEAST_PRIORITY, GREATEST_PRIORITY = 0, -5
CAPABILITY, MULTIPROCESSORS, TOTAL_NBYTES = 90, 4, 1 << 30


class CUDADriverError(RuntimeError):
    """As CuPy's."""


class MemoryPointer:
    """As cupy.cuda.MemoryPointer."""

    def __init__(self, mem, offset):
        self.mem = mem
        self.ptr = mem.ptr + offset
        self.device_id = mem.device_id


class UnownedMemory:
    """As cupy.cuda.UnownedMemory."""

    def __init__(self, ptr, size, owner, device_id=-1):
        self.ptr, self.size, self.device_id = ptr, size, device_id
        self._owner = owner


class Device:
    """As cupy.cuda.Device, its number only."""

    def __init__(self, device=None):
        self.id = device


class ndarray(np.ndarray):
    """As cupy.ndarray: a view of a simulated GPU's memory that keeps its owner alive."""

    def __new__(cls, shape, dtype=float, memptr=None, strides=None, order="C"):
        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(memptr.ptr) if count else None
        array = np.ndarray.__new__(cls, shape, dtype, buffer, 0, strides, order)
        array._mem = memptr.mem
        return array

    def __array_finalize__(self, obj):
        # A view keeps the memory; a copy is not on the GPU.
        memory = getattr(obj, "_mem", None)
        inside = memory is not None and memory.ptr <= self.ctypes.data < memory.ptr + max(memory.size, 1)
        self._mem = memory if inside else None

    @property
    def data(self):
        if self._mem is None:
            raise AttributeError("the result of arithmetic has no memory on the simulated GPU: write it into a buffer")
        return MemoryPointer(self._mem, self.ctypes.data - self._mem.ptr if self.size else 0)

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False), "version": 3}

    @property
    def device(self):
        return Device(self.data.device_id)

    def get(self):
        """A NumPy copy. As on a GPU it waits for the current stream only; here, for nothing."""
        return np.array(self.view(np.ndarray))


def _locked(sim: Simulation, function):
    """The call, counted and one at a time."""

    def call(*args, **kwargs):
        with sim.lock:
            sim.called(function.__name__)
            return function(*args, **kwargs)

    call.__name__ = function.__name__
    call.__wrapped__ = function
    return call


class _Runtime(ModuleType):
    """cupy.cuda.runtime."""

    CUDARuntimeError = CUDARuntimeError
    memcpyDefault = 4
    hostAllocPortable = 1
    streamNonBlocking = 1
    eventDisableTiming = 2
    streamCaptureModeGlobal, streamCaptureModeThreadLocal, streamCaptureModeRelaxed = 0, 1, 2
    cudaDevAttrMultiProcessorCount = 16


def _device_calls(sim: Simulation) -> list:
    def getDeviceCount():
        return sim.count

    def getDevice():
        return sim.thread.device

    def setDevice(device):
        sim.enter(device)
        sim.thread.device = device

    def deviceGetAttribute(attrib, device):
        sim.device(device)
        return {16: MULTIPROCESSORS, 75: CAPABILITY // 10, 76: CAPABILITY % 10}[attrib]

    def deviceGetPCIBusId(device):
        return f"0000:{0x3B + sim.device(device):02X}:00.0"

    def driverGetVersion():
        return 12090

    def runtimeGetVersion():
        return 12090

    def memGetInfo():
        sim.enter(sim.thread.device)
        return TOTAL_NBYTES - sum(a.nbytes for a in sim.memory.alive() if a.device == sim.thread.device), TOTAL_NBYTES

    def deviceCanAccessPeer(device, peerDevice):
        sim.device(device), sim.device(peerDevice)
        return int(device != peerDevice)

    def deviceEnablePeerAccess(peerDevice):
        sim.unsafe("deviceEnablePeerAccess")
        device = sim.thread.device
        sim.enter(device)
        sim.enter(peerDevice)
        if device == peerDevice:
            raise CUDARuntimeError(101)
        if (device, peerDevice) in sim.peers:
            raise CUDARuntimeError(704)
        sim.peers.add((device, peerDevice))

    def deviceSynchronize():
        sim.fail(SimulationError(f"deviceSynchronize at {site()}: fastdp waits for events, never for a whole GPU"))

    def check_status(status):
        if status:
            raise CUDARuntimeError(status)

    return [
        getDeviceCount, getDevice, setDevice, deviceGetAttribute, deviceGetPCIBusId, driverGetVersion,
        runtimeGetVersion, memGetInfo, deviceCanAccessPeer, deviceEnablePeerAccess, deviceSynchronize, check_status,
    ]  # fmt: skip


def _memory_calls(sim: Simulation) -> list:
    def malloc(size):
        return sim.allocate(size, pinned=False)

    def free(ptr):
        sim.release(ptr, pinned=False)

    def hostAlloc(size, flags):
        return sim.allocate(size, pinned=True)

    def freeHost(ptr):
        sim.release(ptr, pinned=True)

    def _copy(name, dst, src, size, stream):
        if size:
            sim.submit(stream, name, [(src, size)], [(dst, size)], lambda: ctypes.memmove(dst, src, size))

    def memcpyAsync(dst, src, size, kind, stream):
        _copy("memcpyAsync", dst, src, size, stream)

    def memcpyPeerAsync(dst, dstDevice, src, srcDevice, size, stream):
        for lo, device in ((dst, dstDevice), (src, srcDevice)):
            if size and sim.memory.find((lo, size), "memcpyPeerAsync").device != device:
                raise CUDARuntimeError(1)
        _copy("memcpyPeerAsync", dst, src, size, stream)

    def memsetAsync(ptr, value, size, stream):
        sim.submit(stream, "memsetAsync", [], [(ptr, size)], lambda: ctypes.memset(ptr, value, size), current=True)

    def pointerGetAttributes(ptr):
        return types.SimpleNamespace(device=sim.memory.find((ptr, 1), "pointerGetAttributes").device)

    return [pointerGetAttributes, malloc, free, hostAlloc, freeHost, memcpyAsync, memcpyPeerAsync, memsetAsync]


def _stream_calls(sim: Simulation) -> list:
    def streamCreateWithPriority(flags, priority):
        sim.enter(sim.thread.device)
        handle = sim.handle()
        priority = min(max(priority, GREATEST_PRIORITY), LEAST_PRIORITY)
        sim.streams[handle] = Stream(handle, sim.thread.device, priority, site())
        return handle

    def streamGetPriority(stream):
        return sim.stream(stream, current=False).priority

    def streamDestroy(stream):
        found = sim.stream(stream, current=False)
        sim.settle()
        if found.queue:
            sim.fail(SimulationError(f"{found} is destroyed at {site()} with work that has not run"))
        del sim.streams[stream]

    def streamSynchronize(stream):
        sim.synchronize(stream)

    def streamWaitEvent(stream, event, flags=0):
        sim.wait(stream, event)

    def eventCreateWithFlags(flags):
        sim.enter(sim.thread.device)
        handle = sim.handle()
        sim.events[handle] = Event(handle, sim.thread.device, site(), not flags & _Runtime.eventDisableTiming)
        return handle

    def eventDestroy(event):
        if sim.events.pop(event, None) is None:
            raise CUDARuntimeError(400)

    def eventRecord(event, stream):
        sim.record(event, stream)

    def eventElapsedTime(start, end):
        return sim.elapsed(start, end)

    def streamIsCapturing(stream):
        return sim.is_capturing(stream)

    def eventQuery(event):
        try:
            return 0 if sim.query(event) else 600
        except CUDARuntimeError as error:
            return error.status

    return [
        streamCreateWithPriority, streamGetPriority, streamDestroy, streamSynchronize, streamWaitEvent,
        eventCreateWithFlags, eventDestroy, eventRecord, eventQuery, eventElapsedTime, streamIsCapturing,
    ]  # fmt: skip


def _graph_calls(sim: Simulation) -> list:
    def streamBeginCapture(stream, mode=2):
        sim.capture_begin(stream, mode)

    def streamEndCapture(stream):
        return sim.capture_end(stream)

    def graphInstantiate(graph):
        handle = sim.handle()
        sim.execs[handle] = list(sim.graphs[graph])
        return handle

    def graphUpload(graphExec, stream):
        sim.stream(stream, current=True)
        if graphExec not in sim.execs:
            raise CUDARuntimeError(400)
        sim.unsafe("graphUpload")
        sim.uploaded.add(graphExec)

    def graphLaunch(graphExec, stream):
        sim.graph_launch(graphExec, stream)

    def graphDestroy(graph):
        if sim.graphs.pop(graph, None) is None:
            raise CUDARuntimeError(400)

    def graphExecDestroy(graphExec):
        if sim.execs.pop(graphExec, None) is None:
            raise CUDARuntimeError(400)

    return [
        streamBeginCapture, streamEndCapture, graphInstantiate, graphUpload, graphLaunch, graphDestroy,
        graphExecDestroy,
    ]  # fmt: skip


def _driver_calls(sim: Simulation) -> list:
    def ctxGetCurrent():
        return 0xC0 + sim.thread.device if sim.thread.context else 0

    def moduleLoadData(image):
        sim.unsafe("moduleLoadData")
        if not sim.thread.context:
            raise CUDADriverError("CUDA_ERROR_INVALID_CONTEXT: simulated")
        handle = sim.handle()
        sim.modules[handle] = (sim.thread.device, bytes(image))
        return handle

    def moduleUnload(module):
        del sim.modules[module]

    def moduleGetFunction(module, funcname):
        device, image = sim.modules[module]
        # A cubin holds the names of its kernels; a test may load a file's name instead.
        if funcname.encode() not in image and not funcname.encode().startswith(image):
            raise CUDADriverError("CUDA_ERROR_NOT_FOUND: named symbol not found")
        handle = sim.handle()
        sim.functions[handle] = (device, funcname)
        return handle

    def launchKernel(
        f, grid_dim_x, grid_dim_y, grid_dim_z, block_dim_x, block_dim_y, block_dim_z, shared_mem_bytes, stream,
        kernel_params, extra,
    ):  # fmt: skip
        device, name = sim.functions[f]
        found = sim.streams.get(stream)
        if found is None or not device == found.device == sim.thread.device:
            raise CUDADriverError("CUDA_ERROR_INVALID_HANDLE: invalid resource handle")
        if not grid_dim_x or not 0 < block_dim_x <= 1024:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        params = ctypes.c_void_p.from_address(kernel_params).value
        launch = kernel_models.decode(name, params, grid_dim_x, block_dim_x)
        meet = None
        if launch.ranks:
            ranks = sim.kernel_ranks.setdefault(launch.ranks, Gathering(len(launch.ranks)))

            def together(ops):
                launch.together([(ops[rank].reads[0][0], ops[rank].writes[0][0]) for rank in range(len(ops))])

            def meet(op):
                return ranks.meet(sim, launch.rank, op, launch.signature, together)

        sim.submit(stream, f"kernel {name}", launch.reads, launch.writes, launch.run, current=True, meet=meet)

    return [ctxGetCurrent, moduleLoadData, moduleUnload, moduleGetFunction, launchKernel]


def _stream_class(sim: Simulation) -> type:
    class CurrentStream:
        """cupy.cuda.Stream, as far as it takes streams of others."""

        def __init__(self, ptr):
            self.ptr = ptr

        @classmethod
        def from_external(cls, obj):
            return cls(obj.__cuda_stream__()[1])

        def __enter__(self):
            sim.stream(self.ptr, current=True)
            return self

        def __exit__(self, *_):
            pass

    return CurrentStream


def build(sim: Simulation) -> dict[str, ModuleType]:
    """The modules by name."""
    cupy, cuda, runtime = ModuleType("cupy"), ModuleType("cupy.cuda"), _Runtime("cupy.cuda.runtime")
    # In CuPy an attribute of cupy.cuda, and no module that can be imported by this name.
    driver, nccl = ModuleType("cupy.cuda.driver"), ModuleType("cupy.cuda.nccl")
    for call in (*_device_calls(sim), *_memory_calls(sim), *_stream_calls(sim), *_graph_calls(sim)):
        setattr(runtime, call.__name__, _locked(sim, call))
    for call in _driver_calls(sim):
        setattr(driver, call.__name__, _locked(sim, call))
    driver.CUDADriverError = CUDADriverError
    nccl.available, nccl.NcclError, nccl.NcclCommunicator = True, NcclError, make_communicator(sim)
    nccl.get_version = lambda: 22907
    nccl.get_unique_id = lambda: sim.handle().to_bytes(128, "little")
    nccl.groupStart, nccl.groupEnd = lambda: group_start(sim), lambda: group_end(sim)
    cuda.runtime, cuda.driver, cuda.nccl = runtime, driver, nccl
    cuda.MemoryPointer, cuda.UnownedMemory, cuda.Device = MemoryPointer, UnownedMemory, Device
    cuda.Stream = _stream_class(sim)
    cupy.cuda, cupy.ndarray, cupy.__version__ = cuda, ndarray, "14.2.0"
    cupy.__path__ = cuda.__path__ = []
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.runtime": runtime, "cupy.cuda.nccl": nccl}


def _forget() -> None:
    """fastdp's modules over CuPy are loaded anew with the next CuPy."""
    over_cupy = [n for n in sys.modules if n.startswith(("fastdp.runtime.cuda", "fastdp.comm.cuda."))]
    for name in over_cupy:
        del sys.modules[name]
        package, _, own = name.rpartition(".")
        if package in sys.modules:
            vars(sys.modules[package]).pop(own, None)


@contextlib.contextmanager
def installed(sim: Simulation) -> Iterator[Simulation]:
    """While it lasts `import cupy` gives the simulation, and Python's locks carry its clocks."""
    _forget()
    with pytest.MonkeyPatch.context() as patch, sim.hosts.carried_by_locks(), loaded(sim):
        for name, module in build(sim).items():
            patch.setitem(sys.modules, name, module)
        yield sim
    _forget()
