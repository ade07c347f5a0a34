"""Memory of the GPU layer: aligned, given back, asked of CUDA once, never while it is in use."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.cuda import memory


class Done:
    """An event whose wait is written down."""

    error = None

    def __init__(self, done: bool = True) -> None:
        self.done, self.timeouts = done, []

    def finish(self, timeout=None) -> None:
        self.timeouts.append(timeout)
        if not self.done:
            raise DeviceTimeoutError("not done")

    synchronize = finish


# Arena


def test_an_arena_gives_aligned_memory_on_its_device(cards):
    arena = memory.Arena(1)
    arrays = [arena.empty(shape, dtype) for shape, dtype in [((3, 5), np.float32), ((), np.int64), ((0, 4), np.uint8)]]
    assert [a.shape for a in arrays] == [(3, 5), (), (0, 4)]
    assert [a.data.ptr % 512 for a in arrays if a.size] == [0, 0]
    assert arrays[0].data.device_id == 1
    assert arena.allocations == cards.calls["malloc"] == 3
    arena.close()
    arena.close()
    assert cards.alive() == []
    with pytest.raises(RuntimeError, match="memory of GPU 1 is closed"):
        arena.empty((1,), np.uint8)


def test_memory_lives_as_long_as_a_view_and_is_freed_at_the_next_allocation(cards):
    arena = memory.Arena(0)
    view = arena.empty((64,), np.float32)[8:].reshape(7, 8)[1:]
    gc.collect()
    arena.trim()
    assert len(cards.alive()) == 1
    del view
    gc.collect()
    assert cards.calls["free"] == 0  # never by the garbage collector
    kept = arena.empty((8,), np.float32)
    assert cards.calls["free"] == 1
    assert kept.size == 8
    arena.close()


def test_a_full_gpu_is_a_memory_error_with_its_numbers(cards):
    arena = memory.Arena(0)
    with pytest.raises(
        MemoryError, match=r"GPU 0 has no room for 3,221,225,984 bytes: [\d,]+ of 2,147,.* are free.*size"
    ):
        arena.empty((3 << 30,), np.uint8)
    arena.close()


# StagingRing


def test_a_ring_alternates_and_waits_for_the_event_of_the_turn_before(cards):
    ring = memory.StagingRing(timeout=7)
    events = [Done() for _ in range(4)]
    places = []
    for event in events:
        view = ring.take(100)
        assert (view.shape, view.dtype) == ((100,), np.uint8)
        places.append(view.ctypes.data)
        ring.release(event)
    assert places[:2] == places[2:]
    assert places[0] != places[1]
    assert [event.timeouts for event in events] == [[7], [7], [], []]
    assert ring.allocations == cards.calls["hostAlloc"] == 2
    ring.close()
    assert [event.timeouts for event in events[2:]] == [[7], [7]]


def test_a_ring_refuses_what_is_in_use_and_what_is_not_taken(cards):
    ring = memory.StagingRing()
    with pytest.raises(RuntimeError, match="no staging buffer is taken"):
        ring.release(Done())
    ring.take(1), ring.take(1)
    with pytest.raises(RuntimeError, match="all 2 staging buffers are taken"):
        ring.take(1)
    late = Done(done=False)
    ring.release(late), ring.release(Done())
    with pytest.raises(DeviceTimeoutError):
        ring.take(1)
    late.done = True
    ring.close()
    with pytest.raises(ValueError, match="slots=0"):
        memory.StagingRing(slots=0)


def test_a_ring_keeps_its_order_after_a_time_out(cards):
    ring = memory.StagingRing()
    late, places = Done(done=False), []
    for event in (late, Done()):
        places.append(ring.take(10).ctypes.data)
        ring.release(event)
    with pytest.raises(DeviceTimeoutError):
        ring.take(10)
    late.done = True
    assert ring.take(10).ctypes.data == places[0]
    ring.release(Done())
    ring.close()


def test_a_ring_grows_once_and_then_asks_for_nothing(cards):
    ring = memory.StagingRing()
    for nbytes in (10, 10, 50_000, 50_000, 49_000, 50_000, 0, 7):
        assert ring.take(nbytes).nbytes == nbytes
        ring.release(Done())
    assert ring.allocations == 4
    assert cards.calls["freeHost"] == 2
    ring.close()


# PinnedPool


def test_pinned_memory_comes_back_when_the_array_and_all_its_views_are_gone(cards):
    pool = memory.PinnedPool()
    array = pool.empty((4, 256), np.float32)
    assert type(array) is np.ndarray
    assert array.flags.writeable
    first, view = array.ctypes.data, array[1:, ::2].T
    del array
    gc.collect()
    other = pool.empty((4, 256), np.float32)
    assert other.ctypes.data != first
    raw = memoryview(view[:1])
    del view
    gc.collect()
    assert pool.empty((4, 256), np.float32).ctypes.data != first
    del raw
    gc.collect()
    assert first in {pool.empty((4, 256), np.float32).ctypes.data for _ in range(2)}
    del other
    gc.collect()
    pool.close()
    assert cards.calls["hostAlloc"] == cards.calls["freeHost"] == pool.allocations == 3


def test_a_tensor_on_a_pinned_array_keeps_it(cards):
    torch = pytest.importorskip("torch")
    pool = memory.PinnedPool()
    array = pool.empty((512,), np.float32)
    tensor, first = torch.from_numpy(array), array.ctypes.data
    del array
    gc.collect()
    assert pool.empty((512,), np.float32).ctypes.data != first
    del tensor
    gc.collect()
    pool.close()


def test_the_steady_state_of_a_pool_asks_for_nothing(cards):
    pool = memory.PinnedPool()
    for rows in (1000, 1000, 1001, 999, 1000):  # sizes that differ a little share memory
        result = pool.empty((rows, 10), np.float32)
        result[:] = rows
        del result
    assert pool.allocations == 1
    pool.close()
    assert cards.alive() == []


def test_a_pool_keeps_no_more_than_its_cache_holds(cards):
    pool = memory.PinnedPool(cache_nbytes=10_000)
    arrays = [pool.empty((8192,), np.uint8) for _ in range(3)]
    del arrays
    gc.collect()
    small = pool.empty((16,), np.uint8)
    assert sum(a.nbytes for a in cards.alive()) == 8192 + 4096
    assert pool.empty((0, 3), np.float32).shape == (0, 3)
    pool.close()
    assert len(cards.alive()) == 1
    with pytest.raises(RuntimeError, match="closed"):
        pool.empty((1,), np.uint8)
    del small
    gc.collect()
    pool.close()


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 65_536, 65_537, 1_000_000, 3 << 30])
def test_asize_class_wastes_at_most_an_eighth_or_a_page(nbytes):
    size = memory.size_class(nbytes)
    assert nbytes <= size <= max(nbytes + 4095, nbytes * 9 / 8)
    assert memory.size_class(size) == size
