"""A pytest plugin: `-p torch_on_rig` lets a torch without CUDA compute on the rig's cards, whose memory is host memory.

Torch's operations run on the worker that issues them, once its stream has come so far. Its tensors over the engine's
arrays are tensors over the same bytes, and its graphs are graphs of the rig with one node that runs its operations on
the stream's thread. All else is what it is on a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from host_outputs import Outputs
from torch_operations import Operations

from fastdp.engine.replicas import Replica
from fastdp.runtime.cuda import cupy_api, streams
from fastdp.runtime.cuda.device import CudaDevice

CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_enqueue = ctypes.CDLL("libcuda.so.1").cudaLaunchHostFunc
_enqueue.argtypes = (ctypes.c_void_p, CALLBACK, ctypes.c_void_p)
# Graphs may hold them until the process ends.
_callbacks: list[Any] = []
# What went wrong on a stream's thread, where nobody catches it.
_failures: list[BaseException] = []


def settle(handle: int) -> None:
    """Wait for a stream, as what torch computes next is computed at once."""
    cupy_api.cudart.streamSynchronize(handle)
    if _failures:
        raise _failures.pop()


class RigGraphs:
    """What TorchGraphs does."""

    def __init__(self, device: CudaDevice, parts: bool = False) -> None:
        self._stream, self._parts = device.compute.handle, parts
        self.nbytes = 0

    def record(self, work: Callable[[], Iterable[Any]]) -> tuple[RigGraph, list[Any]]:
        """As TorchGraphs.record."""
        operations = Operations()
        cupy_api.capture_begin(self._stream)
        recorded = False
        try:
            given = operations.note(work)
            _enqueue_operations(self._stream, operations)
            recorded = True
        finally:
            graph = cupy_api.capture_end(self._stream)
            if not recorded:
                cupy_api.graph_destroy(graph)
        self.nbytes += operations.nbytes()
        return RigGraph(self._stream, operations, graph, self._parts), given


def _enqueue_operations(stream: int, operations: Operations) -> None:
    """Torch's operations as work of a stream. It does not keep torch's memory: `operations` does."""
    itself = weakref.ref(operations)

    def run(_: object) -> None:
        found = itself()
        over = False
        try:
            assert found is not None, "a graph runs on memory that torch has given up"
            found.run()
            over = True
        finally:
            if not over:
                _failures.append(RuntimeError(f"torch's part of a graph failed: {sys.exc_info()[1]}"))

    _callbacks.append(CALLBACK(run))
    cupy_api.cudart.check_status(_enqueue(stream, _callbacks[-1], None))


class RigGraph:
    """What torch's CUDAGraph does."""

    def __init__(self, stream: int, operations: Operations, graph: int, parts: bool) -> None:
        self._stream, self._operations, self._graph = stream, operations, graph
        self._launchable = cupy_api.graph_instantiate(graph)
        weakref.finalize(self, cupy_api.graph_exec_destroy, self._launchable).atexit = False
        if not parts:  # torch destroys it, unless keep_graph is asked for
            cupy_api.graph_destroy(graph)
            self._graph = 0
        else:
            weakref.finalize(self, cupy_api.graph_destroy, graph).atexit = False

    def replay(self) -> None:
        """As CUDAGraph.replay."""
        runs = self._operations.runs
        cupy_api.graph_launch(self._launchable, self._stream)
        settle(self._stream)
        assert self._operations.runs == runs + 1

    def raw_cuda_graph(self) -> int:
        """As CUDAGraph.raw_cuda_graph."""
        assert self._graph, "torch has destroyed the graph: keep_graph was not asked for"
        return self._graph


class _Memory:
    """An array's memory for NumPy, which keeps the array alive."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.__array_interface__ = {
            "data": (int(array.data.ptr), False), "shape": array.shape, "strides": array.strides,
            "typestr": array.dtype.str, "version": 3,
        }  # fmt: skip


def _from_dlpack(array: Any, original: Callable[..., Any] = torch.from_dlpack, **options: Any) -> torch.Tensor:
    """torch.from_dlpack, for arrays of the rig's cards too."""
    if not isinstance(array, cupy.ndarray):
        return original(array, **options)
    array.__dlpack__(stream=1)  # CuPy's own checks
    return torch.from_numpy(np.asarray(_Memory(array)) if array.size else np.empty(array.shape, array.dtype))


def _settled(work: Callable[..., Any]) -> Callable[..., Any]:
    """A replica's work, once its stream has come so far."""

    def run(replica: Replica, *arguments: Any, **named: Any) -> Any:
        if replica.device.on_gpu:
            settle(replica.device.compute.handle)
        return work(replica, *arguments, **named)

    return run


def _looked_at_later(launch: Callable[..., Any]) -> Callable[..., Any]:
    """A replica's launched step, whose outputs are looked at when its graphs have run."""

    def run(replica: Replica, *arguments: Any) -> Any:
        launched = launch(replica, *arguments)
        outputs = launched.outputs

        def behind() -> Any:
            settle(replica.device.compute.handle)
            return outputs()

        launched.outputs = behind
        return launched

    return run


def patch_all(patch: pytest.MonkeyPatch) -> None:
    """Let torch compute in host memory."""
    patch.setattr(torch, "from_dlpack", _from_dlpack)
    patch.setattr(cupy_api, "torch_device", lambda ordinal: "cpu")
    outputs = Outputs()
    original, close = CudaDevice.wrap, CudaDevice.close

    def wrap(device: CudaDevice, pointer: int, shape: tuple[int, ...], dtype: Any, owner: Any) -> Any:
        on_card = cupy_api.cudart.pointerGetAttributes(pointer).type == 2
        return (original if on_card else outputs.wrap)(device, pointer, shape, dtype, owner)

    def closed(device: CudaDevice, *arguments: Any) -> None:
        outputs.forget(device)
        close(device, *arguments)

    patch.setattr(CudaDevice, "wrap", wrap)
    patch.setattr(CudaDevice, "close", closed)
    patch.setattr(Replica, "launch", _settled(_looked_at_later(Replica.launch)))
    for name in ("train", "predict", "call", "update", "rehearse_update", "accumulate"):
        patch.setattr(Replica, name, _settled(getattr(Replica, name)))
    graphs = "fastdp.capture.cuda_graphs"
    patch.setattr(importlib.import_module(f"{graphs}.recorder"), "TorchGraphs", RigGraphs)
    recording = importlib.import_module(f"{graphs}.recording").Recording
    replay = recording.replay_in_step_graph

    def replayed(itself: Any, *arguments: Any) -> Any:
        results = replay(itself, *arguments)
        stream = streams.current_stream()
        assert stream is not None
        settle(stream.handle)
        return results

    patch.setattr(recording, "replay_in_step_graph", replayed)


_patch = pytest.MonkeyPatch()


def pytest_configure(config: pytest.Config) -> None:
    """For the whole session."""
    patch_all(_patch)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what other numbers of cards have shown.

    With RIG_COUNTS the tests of so many devices are kept, and with 1 among them those that name no number. Of models
    those in RIG_MODELS, on the last of these numbers, and no steps that need a compiler.
    """
    counts, models = (os.environ.get(name, "").split() for name in ("RIG_COUNTS", "RIG_MODELS"))
    if not counts:
        return

    def wanted(item: pytest.Item) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if given.get("name", models[0]) not in models or given.get("kind") in ("eager", "compiled", "compiled graph"):
            return False
        of_models = item.path.name in ("test_models.py", "test_kinds.py")
        here = counts[-1:] if of_models and "count" in given else counts
        return str(given.get("count", 1)) in here or item.get_closest_marker("peer") is not None

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def pytest_unconfigure(config: pytest.Config) -> None:
    """As it was."""
    _patch.undo()
