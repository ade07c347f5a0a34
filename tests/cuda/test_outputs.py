"""Outputs that are merged on a GPU: their memory comes back, and never while somebody may still read it."""

from __future__ import annotations

import gc
import importlib

import numpy as np
import pytest

import fastdp
from fastdp.program.functions import FunctionProgram

LIMIT = 20.0


@pytest.fixture
def layer(fake_cuda):
    """The simulation and its modules."""

    def start(**options):
        sim = fake_cuda(2, **options)
        modules = ("memory", "outputs", "cupy_api")
        return sim, *(importlib.import_module(f"fastdp.runtime.cuda.{name}") for name in modules)

    return start


def address(array):
    return array.data.ptr


def test_memory_comes_back_when_the_array_and_all_its_views_are_gone(layer):
    sim, memory, outputs, _ = layer()
    arena = memory.Arena(1)
    pool = outputs.OutputPool(arena)
    array = pool.empty((4, 256), np.float32)
    assert (array.shape, array.dtype, array.data.device_id) == ((4, 256), np.float32, 1)
    first, view = address(array), array[1:].reshape(-1)[3:]
    del array
    gc.collect()
    other = pool.empty((4, 256), np.float32)
    assert address(other) != first
    before = dict(sim.calls)
    del view
    gc.collect()
    assert dict(sim.calls) == before  # the garbage collector calls nothing of CUDA's
    again = pool.empty((4, 250), np.float32)  # sizes that differ a little share memory
    assert address(again) == first
    assert sim.calls["malloc"] == 2
    del other, again
    pool.close()
    gc.collect()
    arena.close()


def test_memory_that_the_caller_still_reads_is_left_alone(layer):
    sim, memory, outputs, rt = layer()
    arena = memory.Arena(0)
    pool = outputs.OutputPool(arena)
    array, pinned = pool.empty((64,), np.uint8), rt.host_alloc(64)
    first = address(array)
    sim.held = True
    with rt.on(0):  # as torch and CuPy do by default
        rt.copy_async(pinned, first, 64, rt.DEFAULT_STREAM)
    del array
    gc.collect()
    second = pool.empty((64,), np.uint8)
    assert address(second) != first
    sim.held = False
    third = pool.empty((64,), np.uint8)
    assert address(third) == first
    with rt.on(0):
        stream = rt.stream_create(0)
        rt.fill_async(first, 1, 64, stream)  # the race detector finds it ordered after the caller's copy
    sim.synchronize(stream)
    rt.stream_destroy(stream)
    rt.host_free(pinned)
    del second, third
    pool.close()
    gc.collect()
    arena.close()


def test_more_than_the_cache_holds_goes_back_to_the_arena(layer):
    sim, memory, outputs, _ = layer()
    arena = memory.Arena(0)
    pool = outputs.OutputPool(arena, cache_nbytes=10_000)
    arrays = [pool.empty((8192,), np.uint8) for _ in range(3)]
    del arrays
    gc.collect()
    small = pool.empty((16,), np.uint8)
    arena.trim()
    assert len(sim.memory.alive()) == 2
    pool.close()
    arena.trim()
    assert len(sim.memory.alive()) == 1
    assert small.shape == (16,)
    del small
    gc.collect()
    arena.trim()
    assert not sim.memory.alive()
    arena.close()


def scaled():
    """A program whose outputs are three times its rows, and whose loss is their mean."""

    def forward(p, batch):
        return [np.array(3 * batch[0], subok=False)]

    def train(p, batch):
        return float(batch[0].mean()), {"w": np.ones(1, "float32")}, forward(p, batch)

    def update(p, slots, gradients):
        return {"w": p["w"] - gradients["w"]}, {}

    return FunctionProgram({"w": np.zeros(1, "float32")}, train, update, forward)


@pytest.mark.parametrize("seed", [None, 0])
def test_steps_that_merge_on_a_gpu_allocate_nothing_once_they_are_under_way(gpus, seed):
    box = gpus(2, seed=seed)
    devices = box.devices(2)
    engine = fastdp.DataParallel(scaled(), devices, timeout=LIMIT, cpu_merge=False)
    x = np.arange(40, dtype=np.float32).reshape(8, 5)
    kept, before = engine.train([x]).outputs[0], None
    for i in range(16):
        if i == 8:
            before = dict(box.sim.calls)
        (output,) = engine.train([x + i]).outputs
        np.testing.assert_array_equal(devices[0].to_host(output), 3 * (x + i))
        del output
    for name in ("malloc", "free", "hostAlloc", "freeHost"):
        assert box.sim.calls[name] == before.get(name, 0), name
    np.testing.assert_array_equal(devices[0].to_host(kept), 3 * x)
    del kept, engine


def test_the_garbage_collector_makes_no_call_of_cuda_that_frees(gpus):
    """Not for arrays, pools and rings, nor for a whole engine with its NCCL communicators."""
    box = gpus(2)
    devices = box.devices(2)
    engine = fastdp.DataParallel(scaled(), devices, timeout=LIMIT, cpu_merge=False)
    outputs = engine.train([np.ones((4, 5), np.float32)]).outputs
    assert box.sim.comms
    before = dict(box.sim.calls)
    del engine, outputs
    gc.collect()
    for name in ("free", "freeHost", "destroy", "streamDestroy", "malloc", "hostAlloc"):
        assert box.sim.calls[name] == before.get(name, 0), name
    assert not any(comm.closed for comm in box.sim.comms)
    devices[0].arena.trim()
    assert all(comm.closed for comm in box.sim.comms)
