"""Memory, streams, events, graphs and peers as the CUDA layer uses them, on a real card."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

LIMIT = 30.0


@pytest.fixture
def torch():
    """Torch, where it reaches the card."""
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip("this torch is built without CUDA, or finds no GPU")
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("n", [0, 1, 1000, 5_000_000])
def test_arrays_go_to_the_card_and_back(gpus, dtype, n):
    (device,) = gpus(1)
    values = np.random.default_rng(0).integers(0, 2, (n,)).astype(dtype)
    array = device.empty(values.shape, values.dtype)
    device.copy(array, values)
    np.testing.assert_array_equal(device.to_host(array), values)
    np.testing.assert_array_equal(device.to_host(device.zeros(values.shape, values.dtype)), np.zeros_like(values))


def test_an_event_holds_back_another_stream(gpus):
    """Sixteen long copies on one stream; what waits for their event sees the last one's bytes."""
    from fastdp.runtime.cuda import cupy_api

    (device,) = gpus(1)
    n = 32 << 20
    sources = [device.empty((n,), np.dtype(np.uint8)) for _ in range(4)]
    for i, source in enumerate(sources):
        device.copy(source, np.full(n, i, np.uint8))
    target, seen = device.zeros((n,), np.dtype(np.uint8)), device.zeros((n,), np.dtype(np.uint8))
    a, b = device.compute, device.communication
    for _ in range(4):
        for source in sources:
            a.enqueue(lambda s=source: device.copy_rows(target, s, a.handle))
    event = a.record()
    b.wait(event)
    b.enqueue(lambda: device.copy_rows(seen, target, b.handle))
    done = b.record()
    done.finish(LIMIT)
    assert (device.to_host(seen) == 3).all()
    assert cupy_api.array_device(seen) == device.ordinal


def test_pinned_memory_comes_back_when_its_arrays_are_gone(gpus):
    (device,) = gpus(1)
    first = device.pinned.empty((1000,), np.dtype(np.float32))
    address, before = first.ctypes.data, device.pinned.allocations
    del first
    again = device.pinned.empty((1000,), np.dtype(np.float32))
    assert again.ctypes.data == address
    assert device.pinned.allocations == before


def test_no_room_is_a_memory_error_that_says_how_much_is_free(gpus):
    (device,) = gpus(1)
    with pytest.raises(MemoryError, match="has no room for"):
        device.empty((1 << 46,), np.dtype(np.uint8))
    assert device.to_host(device.zeros((3,), np.dtype(np.float32))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_rows_of_host_and_gpu_arrays_of_a_batch_arrive(gpus, count):
    from fastdp.shard import split_rows

    devices = gpus(count)
    x = np.random.default_rng(0).normal(size=(11, 7)).astype(np.float32)
    on_gpu = devices[0].empty(x.shape, x.dtype)
    devices[0].copy(on_gpu, x)
    for _ in range(4):  # the two batch buffers, each twice
        for device, shard in zip(devices, split_rows(11, count), strict=True):
            taken = device.take_rows([x, x.astype(np.float16), on_gpu], shard)
            device.compute.record().finish(LIMIT)
            want = x[shard.start : shard.stop]
            for got, expected in zip(taken, (want, want.astype(np.float16), want), strict=True):
                np.testing.assert_array_equal(device.to_host(got), expected)


def test_a_captured_graph_replays(gpus):
    from fastdp.launch import RowPiece, concat_rows
    from fastdp.runtime.cuda import cupy_api

    (device,) = gpus(1)
    device.kernels.load("concat_rows")
    x, y = (device.zeros((1000,), np.dtype(np.float32)) for _ in range(2))
    rows = [RowPiece(cupy_api.array_pointer(x), cupy_api.array_pointer(y), 1000, 4, 0)]
    stream = device.compute.handle
    concat_rows(device.kernels, rows, stream=stream)  # loads it
    device._wait_for(stream)
    with cupy_api.on(device.ordinal):
        cupy_api.capture_begin(stream)
        concat_rows(device.kernels, rows, stream=stream)
        graph = cupy_api.capture_end(stream)
        launchable = cupy_api.graph_instantiate(graph)
        cupy_api.graph_destroy(graph)
        for turn in (1.0, 5.0):
            device.copy(x, np.full(1000, turn, np.float32))
            cupy_api.graph_launch(launchable, stream)
            device._wait_for(stream)
            assert (device.to_host(y) == turn).all()
        cupy_api.graph_exec_destroy(launchable)


def test_torch_and_the_engine_share_memory_both_ways(gpus, torch):
    from fastdp.tensors.arrays import as_tensor, output_array

    (device,) = gpus(1)
    array = device.zeros((4, 3), np.dtype(np.float32))
    tensor = as_tensor(array)
    assert tensor.is_cuda
    tensor.fill_(7)
    torch.cuda.synchronize()
    assert (device.to_host(array) == 7).all()
    bits = as_tensor(device.zeros((5,), np.dtype(np.uint16)), "bfloat16")
    assert bits.dtype == torch.bfloat16
    other = output_array(torch.arange(6, device="cuda").reshape(2, 3).t(), device)
    torch.cuda.synchronize()
    np.testing.assert_array_equal(device.to_host(other), np.arange(6).reshape(2, 3).T)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_work_s_torch_operations_go_to_its_own_stream(gpus, torch, count):
    from fastdp.tensors.threads import prepare_worker

    devices, seen = gpus(count), {}

    def look(device):
        prepare_worker(1, device)
        seen[device.index] = torch.cuda.current_stream().cuda_stream

    for device in devices:
        device.compute.enqueue(lambda d=device: look(d))
        device.synchronize(LIMIT)
    assert seen == {device.index: device.compute.handle for device in devices}


def test_one_card_reaches_itself(gpus):
    from fastdp.runtime.cuda.peer_access import PeerAccess

    gpus(1)
    assert PeerAccess([0], LIMIT).complete


@pytest.mark.peer
def test_two_cards_reach_each_other_or_say_why_not(gpus, record_property, recwarn):
    from fastdp.runtime.cuda.peer_access import PeerAccess

    gpus(2)
    complete = PeerAccess([0, 1], LIMIT).complete
    record_property("complete", complete)
    assert complete == (not [w for w in recwarn if "No direct access" in str(w.message)])


def test_priorities_and_versions(gpus, record_property):
    from fastdp.runtime.cuda import cupy_api

    (device,) = gpus(1)
    least, greatest = cupy_api.stream_priority_range(device.ordinal)
    record_property("priorities", [least, greatest])
    assert greatest <= least
    assert cupy_api.driver_version() >= cupy_api.runtime_version() // 1000 * 1000
