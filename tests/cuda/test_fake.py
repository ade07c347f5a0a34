"""The simulated CUDA catches what it is there to catch, and has CuPy's names."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
import threading
import time
import types

import numpy as np
import pytest
from fake_cupy import build
from simulated_memory import AddressError, PeerError, RaceError, SimulationError
from simulation import Simulation

from fastdp.launch import RowPiece, RowSlice, all_reduce_one_shot, concat_rows, slice_rows
from fastdp.launch.args import SIGNALS_NBYTES
from fastdp.launch.peer_group import PeerGroup

N = 256


class Box:
    """Streams, events and memory of one test, freed at its end after all work is over."""

    def __init__(self, sim: Simulation, rt) -> None:
        self.sim, self.rt = sim, rt
        self.stack = contextlib.ExitStack()

    def stream(self, device: int = 0) -> int:
        handle = self.rt.stream_create(device)
        self.stack.callback(self.rt.stream_destroy, handle)
        return handle

    def memory(self, device: int = 0, nbytes: int = N) -> int:
        ptr = self.rt.malloc(device, nbytes)
        self.stack.callback(self.rt.free, ptr)
        return ptr

    def pinned(self, nbytes: int = N) -> int:
        ptr = self.rt.host_alloc(nbytes)
        self.stack.callback(self.rt.host_free, ptr)
        return ptr

    def event(self, device: int = 0) -> int:
        with self.rt.on(device):
            handle = self.rt.event_create()
        self.stack.callback(self.rt.event_destroy, handle)
        return handle

    def fill(self, ptr: int, value: int, stream: int, device: int = 0) -> None:
        with self.rt.on(device):
            self.rt.fill_async(ptr, value, N, stream)

    def order(self, before: int, after: int, device: int = 0) -> None:
        event = self.event(device)
        self.rt.event_record(event, before)
        self.rt.stream_wait_event(after, event)

    def finish(self) -> None:
        for handle in list(self.sim.streams):
            self.sim.synchronize(handle)

    def close(self) -> None:
        self.finish()
        self.stack.close()


@pytest.fixture
def box(fake_cuda):
    opened = []

    def open_box(count: int = 2, **options) -> Box:
        sim = fake_cuda(count, **options)
        from fastdp.runtime.cuda import cupy_api as rt

        opened.append(Box(sim, rt))
        return opened[-1]

    yield open_box
    for one in opened:
        one.close()


@contextlib.contextmanager
def caught(sim: Simulation, error: type[BaseException], match: str):
    """The violation is raised; it is taken out of the list that the end of the test looks at."""
    with pytest.raises(error, match=match):
        yield
    sim.violations.clear()


# Order


def test_two_streams_that_write_the_same_bytes_race(box):
    b = box()
    p, s, t = b.memory(), b.stream(), b.stream()
    b.fill(p, 1, s)
    with caught(b.sim, RaceError, r"memsetAsync .* writes bytes 0 to 256 .*nothing orders it after memsetAsync"):
        b.fill(p, 2, t)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_an_event_between_them_orders_them(box, seed):
    b = box(seed=seed)
    p, h, s, t = b.memory(), b.pinned(), b.stream(), b.stream()
    b.fill(p, 1, s)
    b.order(s, t)
    b.fill(p, 2, t)
    b.rt.copy_async(h, p, N, t)
    b.finish()
    b.sim.host_access(h, N, write=False)
    assert b.rt.array(h, (N,), "uint8", 0, None).view(np.ndarray).tolist() == [2] * N


def test_an_event_recorded_before_the_work_orders_nothing(box):
    b = box()
    p, s, t = b.memory(), b.stream(), b.stream()
    b.order(s, t)
    b.fill(p, 1, s)
    with caught(b.sim, RaceError, "nothing orders"):
        b.fill(p, 2, t)


def test_two_reads_do_not_race_and_neighbours_do_not(box):
    b = box()
    p, q, s, t = b.memory(), b.memory(nbytes=2 * N), b.stream(), b.stream()
    b.rt.copy_async(q, p, N, s)
    b.rt.copy_async(q + N, p, N, t)


def test_the_host_orders_by_asking_an_event_and_not_without(box):
    b = box()
    p, s, t, e = b.memory(), b.stream(), b.stream(), b.event()
    b.fill(p, 1, s)
    b.rt.event_record(e, s)
    assert b.rt.event_done(e)
    b.fill(p, 2, t)
    b.fill(p, 3, t)
    with caught(b.sim, RaceError, "nothing orders"):
        b.fill(p, 4, s)


def test_what_one_thread_knows_another_knows_only_by_a_lock(box):
    b = box()
    p, s, t, e = b.memory(), b.stream(), b.stream(), b.event()
    b.fill(p, 1, s)
    b.rt.event_record(e, s)
    told = threading.Event()

    def asker(tell: bool) -> None:
        assert b.rt.event_done(e)
        if tell:
            told.set()

    def start(tell: bool) -> threading.Thread:
        asked = b.sim.calls["eventQuery"]
        thread = threading.Thread(target=asker, args=(tell,))
        thread.start()
        while b.sim.calls["eventQuery"] == asked:  # join() would tell what it knows
            time.sleep(0.001)
        return thread

    silent = start(False)
    with caught(b.sim, RaceError, "nothing orders"):
        b.fill(p, 2, t)
    talking = start(True)
    assert told.wait(10)
    b.fill(p, 3, t)
    silent.join()
    talking.join()


def test_with_a_seed_a_missing_wait_reads_old_bytes_too(box):
    b = box(seed=3)
    p, h, s, e = b.memory(), b.pinned(), b.stream(), b.event()
    b.sim.held = True
    b.fill(p, 1, s)
    b.rt.copy_async(h, p, N, s)
    b.rt.event_record(e, s)
    assert not b.rt.event_done(e)
    with caught(b.sim, SimulationError, "the host at .* does not wait for memcpyAsync"):
        b.sim.host_access(h, N, write=False)
    b.sim.held = False
    while not b.rt.event_done(e):
        pass
    b.sim.host_access(h, N, write=False)


def test_the_host_that_refills_a_buffer_too_early_races(box):
    b = box()
    p, h, s = b.memory(), b.pinned(), b.stream()
    b.sim.host_access(h, N, write=True)
    b.rt.copy_async(p, h, N, s)
    with caught(b.sim, RaceError, "the host at .* writes bytes 0 to 256 of pinned host memory"):
        b.sim.host_access(h, N, write=True)


# Handles, memory, contexts


def test_foreign_memory_needs_peer_access(box):
    b = box()
    p, q, s = b.memory(0), b.memory(1), b.stream(0)
    with caught(b.sim, PeerError, "GPU 1 without peer access of GPU 0"):
        b.rt.copy_async(q, p, N, s)
    with caught(b.sim, PeerError, "without peer access"):
        b.rt.copy_peer_async(q, 1, p, 0, N, s)
    b.rt.enable_peer_access(0, 1)
    b.rt.copy_async(q, p, N, s)


def test_use_after_free_freeing_in_use_and_twice(box):
    b = box()
    s, p, q = b.stream(), b.rt.malloc(0, N), b.memory()
    b.fill(p, 1, s)
    with caught(b.sim, AddressError, "nobody has waited for memsetAsync"):
        b.rt.free(p)
    b.finish()
    b.rt.free(p)
    with caught(b.sim, AddressError, "freed at test_fake.py"):
        b.rt.copy_async(q, p, N, s)
    with caught(b.sim, AddressError, "freed already"):
        b.rt.free(p)


def test_pageable_memory_and_the_end_of_an_allocation_are_no_places_to_copy_from(box):
    b = box()
    s, p, array = b.stream(), b.memory(), np.zeros(N, np.uint8)
    with caught(b.sim, AddressError, "pageable"):
        b.rt.copy_async(p, array.ctypes.data, N, s)
    with caught(b.sim, AddressError, "not inside one allocation"):
        b.rt.copy_async(p, p + N // 2, N, s)


def test_leaks_and_unfinished_work_are_listed(fake_cuda):
    sim = fake_cuda(2)
    from fastdp.runtime.cuda import cupy_api as rt

    p, h, s = rt.malloc(0, 64), rt.host_alloc(64), rt.stream_create(0)
    with rt.on(0):
        e = rt.event_create()
    found = " ".join(sim.check_end())
    assert [re.search(what, found) is not None for what in ("64 bytes of memory of GPU 0 from test_fake.py", "pinned",
            "stream 0x", "an event of GPU 0")] == [True] * 4  # fmt: skip
    rt.free(p), rt.host_free(h), rt.stream_destroy(s), rt.event_destroy(e)


def test_a_device_wide_wait_is_refused(box):
    b = box()
    with caught(b.sim, SimulationError, "deviceSynchronize at test_fake.py"):
        b.rt.cudart.deviceSynchronize()


# NCCL


def ranks(b: Box, count: int = 2, n: int = 4):
    comms = b.rt.nccl_init_all(range(count))
    for comm in comms:
        b.stack.callback(comm.destroy)
    sends = [b.memory(device, max(N, 64 * count)) for device in range(count)]
    streams = [b.stream(device) for device in range(count)]
    for device, (p, s) in enumerate(zip(sends, streams, strict=True)):
        value = np.full(n * count, device + 1, np.float32)
        h = b.pinned(value.nbytes)
        b.rt.array(h, value.shape, np.float32, 0, None)[:] = value
        b.rt.copy_async(p, h, value.nbytes, s)
    return comms, sends, streams


def values(b: Box, ptr: int, n: int) -> list[float]:
    return b.rt.array(ptr, (n,), np.float32, 0, None).get().tolist()


@pytest.mark.parametrize("seed", [None, 0, 5])
def test_collectives_compute(box, seed):
    b = box(2, seed=seed)
    comms, sends, streams = ranks(b)
    gathered = [b.memory(device) for device in (0, 1)]
    with b.rt.nccl_group():
        for comm, p, q, s in zip(comms, sends, gathered, streams, strict=True):
            b.rt.all_gather(comm, p, q, 4, "float32", s)
    with b.rt.nccl_group():
        for comm, p, s in zip(comms, sends, streams, strict=True):
            b.rt.all_reduce(comm, p, p, 4, "float32", s)
    with b.rt.nccl_group():
        for comm, p, s in zip(comms, sends, streams, strict=True):
            b.rt.broadcast(comm, p + 16, p + 16, 4, "float32", s, root=1)
    b.finish()
    assert [values(b, q, 8) for q in gathered] == [[1.0] * 4 + [2.0] * 4] * 2
    assert [values(b, p, 8) for p in sends] == [[3.0] * 4 + [2.0] * 4] * 2
    with b.rt.nccl_group():
        for rank, (comm, p, s) in enumerate(zip(comms, sends, streams, strict=True)):
            b.rt.reduce_scatter(comm, p, p + rank * 16, 4, "float32", s)
    b.finish()
    assert [values(b, p + 16 * rank, 4) for rank, p in enumerate(sends)] == [[6.0] * 4, [4.0] * 4]


def test_a_collective_orders_the_ranks(box):
    b = box()
    b.rt.enable_peer_access(1, 0)
    comms, sends, streams = ranks(b)
    x = b.memory(0)
    b.fill(x, 1, streams[0])
    with b.rt.nccl_group():
        for comm, p, s in zip(comms, sends, streams, strict=True):
            b.rt.all_reduce(comm, p, p, 4, "float32", s)
    b.fill(x, 2, streams[1], 1)  # after rank 0's first fill, by the collective
    with caught(b.sim, RaceError, "nothing orders"):
        b.fill(x, 3, streams[0])


def test_a_collective_that_does_not_wait_for_the_gradient_races(box):
    b = box()
    comms, sends, streams = ranks(b)
    other = b.stream(0)
    b.order(streams[0], other)
    b.fill(sends[0], 1, other)
    with caught(b.sim, RaceError, "allReduce of rank 0"), b.rt.nccl_group():
        for comm, p, s in zip(comms, sends, streams, strict=True):
            b.rt.all_reduce(comm, p, p, 4, "float32", s)


def test_collectives_of_one_thread_need_a_group(box):
    b = box()
    comms, sends, streams = ranks(b)
    b.rt.all_reduce(comms[0], sends[0], sends[0], 4, "float32", streams[0])
    with caught(b.sim, SimulationError, r"ranks \[0, 1\] outside a group"):
        b.rt.all_reduce(comms[1], sends[1], sends[1], 4, "float32", streams[1])
    b.rt.nccl_abort(comms[0])


@pytest.mark.parametrize(("count", "dtype"), [(3, "float32"), (4, "float16")])
def test_counts_and_dtypes_must_agree(box, count, dtype):
    b = box()
    comms, sends, streams = ranks(b)
    with caught(b.sim, SimulationError, "other ranks"), b.rt.nccl_group():
        b.rt.all_reduce(comms[0], sends[0], sends[0], 4, "float32", streams[0])
        b.rt.all_reduce(comms[1], sends[1], sends[1], count, dtype, streams[1])
    b.rt.nccl_abort(comms[0])


def test_nothing_is_enqueued_inside_a_group_and_a_missing_rank_hangs(box):
    b = box()
    comms, sends, streams = ranks(b)
    b.finish()
    e = b.event(0)
    with b.rt.nccl_group():
        b.rt.all_reduce(comms[0], sends[0], sends[0], 4, "float32", streams[0])
        b.rt.event_record(e, streams[0])
    assert b.rt.event_done(e)  # recorded before the collective
    b.rt.event_record(e, streams[0])
    assert not b.rt.event_done(e)
    with caught(b.sim, SimulationError, "malloc .* waits for other ranks"):
        b.rt.malloc(1, 64)
    b.rt.nccl_abort(comms[0])
    assert b.rt.event_done(e)


def test_groups_are_balanced_after_an_exception_too(box):
    b = box()
    with pytest.raises(KeyError), b.rt.nccl_group():
        raise KeyError
    assert b.sim.check_end() == []
    from cupy.cuda import nccl

    nccl.groupStart()
    assert b.sim.check_end() == ["a group of collectives was never ended"]
    nccl.groupEnd()
    with pytest.raises(b.rt.NcclError, match="INVALID_USAGE"):
        nccl.groupEnd()
    b.sim.violations.clear()


# Capture


@pytest.mark.parametrize("seed", [None, 2])
def test_a_graph_replays_and_is_checked_at_each_launch(box, seed):
    b = box(seed=seed)
    p, q, s, t = b.memory(), b.memory(), b.stream(), b.stream()
    fork, back = b.event(), b.event()
    b.rt.capture_begin(s)
    b.rt.event_record(fork, s)
    b.rt.stream_wait_event(t, fork)
    b.fill(p, 5, t)
    b.rt.event_record(back, t)
    b.rt.stream_wait_event(s, back)
    b.rt.copy_async(q, p, N, s)
    graph = b.rt.capture_end(s)
    assert set(values_of(b, q)) == {0xCD}  # nothing ran
    launchable = b.rt.graph_instantiate(graph)
    b.rt.graph_destroy(graph)
    with b.rt.on(0):
        b.rt.graph_launch(launchable, s)
        b.rt.graph_launch(launchable, s)
    b.finish()
    assert set(values_of(b, q)) == {5}
    b.fill(q, 1, t)
    with caught(b.sim, RaceError, "of a graph launched at"), b.rt.on(0):
        b.rt.graph_launch(launchable, s)
        b.sim.settle()
    b.sim.settle()
    b.rt.graph_exec_destroy(launchable)


def values_of(b: Box, ptr: int) -> list[int]:
    return b.rt.array(ptr, (N,), "uint8", 0, None).get().tolist()


def test_branches_of_a_graph_race(box):
    b = box()
    p, s, t, fork, back = b.memory(), b.stream(), b.stream(), b.event(), b.event()
    b.rt.capture_begin(s)
    b.rt.event_record(fork, s)
    b.rt.stream_wait_event(t, fork)
    b.fill(p, 1, t)
    b.fill(p, 2, s)
    b.rt.event_record(back, t)
    b.rt.stream_wait_event(s, back)
    graph = b.rt.capture_end(s)
    launchable = b.rt.graph_instantiate(graph)
    with caught(b.sim, RaceError, "nothing orders"), b.rt.on(0):
        b.rt.graph_launch(launchable, s)
    b.rt.graph_destroy(graph), b.rt.graph_exec_destroy(launchable)


def test_a_side_stream_must_rejoin(box):
    b = box()
    p, s, t, fork = b.memory(), b.stream(), b.stream(), b.event()
    b.rt.capture_begin(s)
    b.rt.event_record(fork, s)
    b.rt.stream_wait_event(t, fork)
    b.fill(p, 1, t)
    with pytest.raises(b.rt.CudaError, match="StreamCaptureUnjoined"):
        b.rt.capture_end(s)


@pytest.mark.parametrize("call", ["malloc", "query"])
def test_calls_that_capture_forbids(box, call):
    b = box()
    s, e = b.stream(), b.event()
    b.rt.capture_begin(s)
    with pytest.raises(b.rt.CudaError, match="StreamCaptureUnsupported"):
        b.rt.malloc(0, 64) if call == "malloc" else b.rt.event_done(e)
    assert "while a stream is being captured" in str(b.sim.violations.pop())
    with pytest.raises(b.rt.CudaError, match="StreamCaptureInvalidated"):
        b.rt.capture_end(s)


def test_captured_collectives_run_when_all_ranks_are_launched(box):
    b = box()
    comms, sends, streams = ranks(b)
    for s in streams:
        b.rt.capture_begin(s)
    with b.rt.nccl_group():
        for comm, p, s in zip(comms, sends, streams, strict=True):
            b.rt.all_reduce(comm, p, p, 4, "float32", s)
    graphs = [b.rt.capture_end(s) for s in streams]
    launchable = [b.rt.graph_instantiate(graph) for graph in graphs]
    for _ in range(2):
        for device, (graph, s) in enumerate(zip(launchable, streams, strict=True)):
            with b.rt.on(device):
                b.rt.graph_launch(graph, s)
    b.finish()
    assert [values(b, p, 4) for p in sends] == [[6.0] * 4] * 2
    for graph, launch in zip(graphs, launchable, strict=True):
        b.rt.graph_destroy(graph), b.rt.graph_exec_destroy(launch)


# Kernels


def test_kernels_run_their_twins_and_declare_what_they_touch(box):
    b = box()
    from fastdp.runtime.cuda.kernel_launcher import kernels

    k, s, t = kernels(0), b.stream(), b.stream()
    x, y, z = b.memory(), b.memory(), b.memory()
    b.rt.array(x, (8,), np.float32, 0, None)[:] = np.arange(8)
    concat_rows(k, [RowPiece(x, y, 2, 16, 0)], stream=s)
    slice_rows(k, [RowSlice(y, z, 1, 16, 2, 1)], stream=s)
    b.finish()
    assert values(b, y, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert values(b, z, 4) == [4, 5, 6, 7]
    b.fill(x, 0, t)
    with caught(b.sim, RaceError, "kernel concat_rows .* reads .* GPU 0"):
        concat_rows(k, [RowPiece(x, y, 2, 16, 0)], stream=s)


def test_a_kernel_needs_its_own_device(box):
    b = box()
    from fastdp.runtime.cuda.kernel_launcher import kernels

    with pytest.raises(b.rt.DriverError, match="INVALID_HANDLE"):
        concat_rows(kernels(0), [RowPiece(b.memory(), b.memory(), 1, 4, 0)], stream=b.stream(1))


@pytest.mark.parametrize("seed", [None, 4])
def test_peer_all_reduces_meet(box, seed):
    b = box(2, seed=seed)
    from fastdp.runtime.cuda.kernel_launcher import kernels

    xs, streams = [b.memory(d) for d in (0, 1)], [b.stream(d) for d in (0, 1)]
    staging = tuple(b.memory(d, 1024) for d in (0, 1))
    signals = tuple(b.memory(d, SIGNALS_NBYTES) for d in (0, 1))
    errors = [b.memory(d) for d in (0, 1)]
    for d in (0, 1):
        b.rt.array(xs[d], (8,), np.float32, d, None)[:] = d + 1
        group = PeerGroup(d, staging, 1024, signals, errors[d], max_blocks=2)
        all_reduce_one_shot(kernels(d), group, x=xs[d], y=xs[d], n=8, dtype="float32", stream=streams[d])
        assert d == 1 or values(b, xs[0], 8) == [1.0] * 8  # waits for the other rank
    b.finish()
    assert [values(b, x, 8) for x in xs] == [[3.0] * 8] * 2


def test_arrays_keep_their_memory_through_views_and_reach_torch(box):
    torch = pytest.importorskip("torch")
    b = box()
    owner = types.SimpleNamespace()
    array = b.rt.array(b.memory(1), (4, 8), np.float32, 1, owner)
    array[...] = 1
    part = array[1:].reshape(3, 2, 4).transpose(1, 0, 2)[1]
    assert b.rt.is_array(part)
    assert b.rt.array_pointer(part) == b.rt.array_pointer(array) + 32 + 16
    assert b.rt.array_device(part) == 1
    tensor = torch.from_dlpack(array[2:])
    tensor.fill_(7)
    assert array.get().sum() == 16 + 7 * 16


def _parameters(function) -> list[str]:
    """Parameter names, of a Python function or of a Cython one by its docstring's first line."""
    if getattr(function, "__wrapped__", None) is not None or inspect.isfunction(function):
        return [name for name in inspect.signature(function).parameters if name != "self"]
    inside = (function.__doc__ or "").split("\n")[0].split("(", 1)[1].rsplit(")", 1)[0]
    parts = [part.split("=")[0].split() for part in inside.split(",")]
    return [part[-1] for part in parts if part and part != ["self"]]


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed: nothing to compare with")
def test_the_simulation_has_cupys_names_and_parameters():
    import cupy
    from cupy.cuda import nccl

    fake = build(Simulation())["cupy"]
    for part in ("runtime", "driver"):
        real, simulated = getattr(cupy.cuda, part), getattr(fake.cuda, part)
        for name, value in vars(simulated).items():
            if inspect.isfunction(value) and name != "check_status":
                assert _parameters(value) == _parameters(getattr(real, name)), f"{part}.{name}"
    for name in ("memcpyDefault", "hostAllocPortable", "streamNonBlocking", "eventDisableTiming",
                 "streamCaptureModeThreadLocal", "cudaDevAttrMultiProcessorCount"):  # fmt: skip
        assert getattr(fake.cuda.runtime, name) == getattr(cupy.cuda.runtime, name), name
    assert _parameters(fake.cuda.nccl.groupStart) == []
    if nccl.available:
        real_comm, comm = nccl.NcclCommunicator, fake.cuda.nccl.NcclCommunicator
        for name in ("allReduce", "reduceScatter", "allGather", "broadcast", "abort", "destroy", "check_async_error"):
            assert _parameters(getattr(comm, name)) == _parameters(getattr(real_comm, name)), name
