"""Reduce-scatter and all-gather between GPUs of the simulated CUDA, by every way; ranks that share a card."""

from __future__ import annotations

import gc
import importlib

import numpy as np
import pytest

from fastdp.buffers import ArraySpec, FlatBuffers
from fastdp.comm.algorithm import MULTI_RANK_VARIABLE
from fastdp.comm.host.communicator import HostCommunicator
from fastdp.runtime.host.device import HostDevice

LIMIT = 20.0
LENGTHS = {"one part": 1, "uneven": 70_003, "large": 700_009}


@pytest.fixture(scope="module")
def hosts():
    devices = [HostDevice(index) for index in range(4)]
    yield devices
    for device in devices:
        device.close(LIMIT)


def communicator(devices):
    return importlib.import_module("fastdp.comm.cuda.communicator").CudaCommunicator(devices, LIMIT)


def flats_on(devices, n, dtype, values):
    flats = [FlatBuffers([ArraySpec("g", (n,), dtype), ArraySpec("h", (5,), dtype)], device) for device in devices]
    for device, flat, own in zip(devices, flats, values, strict=True):
        for view, part in zip(flat.views, own, strict=True):
            device.copy(view, part)
    return flats


def whole_numbers(ranks, n, dtype, seed=0):
    """Small whole numbers: any order of sums has the same bits."""
    rng = np.random.default_rng(seed)
    numbers = [[rng.integers(-4, 5, k).astype("float32") for k in (n, 5)] for _ in range(ranks)]
    if dtype == "bfloat16":
        return [[(x.view(np.uint32) >> 16).astype(np.uint16) for x in own] for own in numbers]
    return [[x.astype(dtype) for x in own] for own in numbers]


def finish(devices):
    for device in devices:
        event = device.compute.record()
        event.finish(LIMIT)
        assert event.error is None, event.error
        device.synchronize(LIMIT)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("nccl", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("n", LENGTHS.values(), ids=LENGTHS)
def test_they_equal_those_of_the_host(gpus, hosts, monkeypatch, nccl, dtype, n, seed):
    box = gpus(2, seed=seed)
    monkeypatch.setattr(box.runtime, "nccl_available", lambda: nccl)
    ranks = 2 if nccl else 4
    devices, comm_of = box.devices(ranks), {}
    values = whole_numbers(ranks, n, dtype)
    gpu, host = flats_on(devices, n, dtype, values), flats_on(hosts[:ranks], n, dtype, values)
    buckets = gpu[0].buckets()
    sides = ((communicator(devices), devices, gpu), (HostCommunicator(hosts[:ranks]), hosts[:ranks], host))
    slow = dtype == "float64" and not nccl
    for comm, on, flats in sides:
        comm_of[comm] = on
        with pytest.warns(UserWarning, match="host memory") if slow and flats is gpu else nothing():
            comm.reduce_scatter(flats[:-1], flats, buckets)
            finish(on)
        comm.check()
    for rank in range(ranks):
        for bucket in buckets:
            part = bucket.part(rank, ranks)
            got = devices[rank].to_host(gpu[rank].buffers[dtype][part.start : part.stop])
            np.testing.assert_array_equal(got, host[rank].buffers[dtype][part.start : part.stop])
    for comm, on, flats in sides:
        comm.all_gather(flats, buckets)
        finish(on)
    for device, flat in zip(devices, gpu, strict=True):
        np.testing.assert_array_equal(device.to_host(flat.buffers[dtype]), host[0].buffers[dtype])
    del gpu, sides, comm, comm_of, flats, got
    gc.collect()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sums_of_kernels_are_in_rank_order_with_one_rounding(gpus, hosts, dtype):
    box = gpus(1)
    devices = box.devices(4)
    rng = np.random.default_rng(3)
    numbers = [[(rng.normal(size=n) * 100).astype("float32") for n in (40_001, 5)] for _ in range(4)]
    if dtype == "bfloat16":
        numbers = [[(x.view(np.uint32) >> 16).astype(np.uint16) for x in own] for own in numbers]
    values = [[x.astype(dtype if dtype != "bfloat16" else np.uint16) for x in own] for own in numbers]
    gpu, host = flats_on(devices, 40_001, dtype, values), flats_on(hosts, 40_001, dtype, values)
    comm = communicator(devices)
    for one, on, flats in ((comm, devices, gpu), (HostCommunicator(hosts), hosts, host)):
        one.reduce_scatter(flats, flats, flats[0].buckets())
        one.all_gather(flats, flats[0].buckets())
        finish(on)
    np.testing.assert_array_equal(devices[2].to_host(gpu[2].buffers[dtype]), host[2].buffers[dtype])
    del gpu, comm, one, flats
    gc.collect()


class nothing:
    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False


def test_float8_is_gathered_and_not_summed(gpus):
    box = gpus(2)
    devices = box.devices(2)
    values = [[np.full(n, 3 + rank, np.uint8) for n in (3_000_000, 5)] for rank in range(2)]
    flats = flats_on(devices, 3_000_000, "float8_e4m3fn", values)
    comm, buckets = communicator(devices), flats[0].buckets()
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        comm.reduce_scatter(flats, flats, buckets)
    comm.all_gather(flats, buckets)
    finish(devices)
    assert box.sim.calls["allGather"] > 0
    halves = [bucket.part(rank, 2) for bucket in buckets for rank in range(2)]
    for device, flat in zip(devices, flats, strict=True):
        whole = device.to_host(flat.buffers["float8_e4m3fn"])[:3_000_000]
        for i, part in enumerate(halves):
            span = whole[part.start : min(part.stop, len(whole))]
            assert (span == 3 + i % 2).all()
    del flats, comm
    gc.collect()


@pytest.mark.parametrize("collective", ["reduce_scatter", "all_gather"])
@pytest.mark.parametrize("missing", ["compute", "communication"])
def test_a_missing_wait_is_found(gpus, monkeypatch, collective, missing):
    box = gpus(2)
    streams = importlib.import_module("fastdp.runtime.cuda.streams")
    devices = box.devices(2)
    n = 5000
    flats = flats_on(devices, n, "float32", whole_numbers(2, n, "float32"))
    comm, buckets = communicator(devices), flats[0].buckets()
    comm.reduce_scatter(flats, flats, buckets)
    finish(devices)
    kept = streams.CudaStream._passed
    monkeypatch.setattr(
        streams.CudaStream, "_passed", lambda self, event: None if self.name == missing else kept(self, event)
    )

    def fill(rank):
        buffer = flats[rank].buffers["float32"]
        box.runtime.fill_async(box.runtime.array_pointer(buffer), rank, buffer.nbytes, devices[rank].compute.handle)

    def once():
        for rank, device in enumerate(devices):
            device.compute.enqueue(lambda rank=rank: fill(rank))
        if collective == "reduce_scatter":
            comm.reduce_scatter(flats, flats, buckets)
        else:
            comm.all_gather(flats, buckets)
        for rank, device in enumerate(devices):
            device.compute.enqueue(lambda rank=rank: fill(rank))
        finish(devices)

    with pytest.raises(AssertionError, match="orders it after"):
        once()
    assert box.sim.violations
    monkeypatch.undo()
    for device in devices:
        device.synchronize(LIMIT)
        device.recover()
    box.sim.violations.clear()  # those of what was still to run too
    flats = comm = None
    gc.collect()


def test_error_flags_are_copied_once_for_all_buckets_and_ways_are_decided_once(gpus):
    box = gpus(1)
    devices = box.devices(2)
    specs = [ArraySpec(f"g{i}", (5000,), "float32") for i in range(6)]
    flats = [FlatBuffers(specs, device) for device in devices]
    comm, buckets = communicator(devices), flats[0].buckets(first=1, cap=1)
    assert len(buckets) == 6
    comm.prepare(buckets)
    comm.how = None  # known since `prepare`
    before = dict(box.sim.calls)
    comm.all_reduce(flats, flats, buckets)
    finish(devices)
    assert box.sim.calls["launchKernel"] - before["launchKernel"] == 12
    assert box.sim.calls["memcpyAsync"] - before.get("memcpyAsync", 0) == 2
    assert box.sim.calls["malloc"] == before["malloc"]
    del flats, comm
    gc.collect()


def test_a_rank_that_gave_up_is_named(gpus):
    box = gpus(1)
    devices = box.devices(2)
    flats = [FlatBuffers([ArraySpec("g", (50,), "float32")], device) for device in devices]
    comm, buckets = communicator(devices), flats[0].buckets()
    comm.prepare(buckets)
    devices[1].copy(comm._kernels._ranks[1].error, np.full(1, 1, np.uint32))
    comm.reduce_scatter(flats, flats, buckets)
    finish(devices)
    with pytest.raises(RuntimeError, match="virtual:1 gave up waiting"):
        comm.check()
    del flats, comm
    gc.collect()


# Ranks that share a card.


@pytest.fixture
def late_nccl(monkeypatch):
    def start(box, variable="1", version=23003, most=2):
        monkeypatch.setattr(box.runtime, "nccl_version", lambda: version)
        if variable is None:
            monkeypatch.delenv(MULTI_RANK_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(MULTI_RANK_VARIABLE, variable)
        box.sim.ranks_on_a_card = most

    return start


def test_two_ranks_on_a_card_use_a_late_nccl_for_large_buckets(gpus, late_nccl):
    box = gpus(1)
    late_nccl(box)
    devices = box.devices(2)
    n = 700_009
    flats = flats_on(devices, n, "float32", whole_numbers(2, n, "float32"))
    comm, buckets = communicator(devices), flats[0].buckets()
    assert {comm.how(bucket) for bucket in buckets} == {"nccl", "one-shot"}
    comm.all_reduce(flats, flats, buckets)
    finish(devices)
    comm.check()
    want = sum(own[0] for own in whole_numbers(2, n, "float32"))
    for device, flat in zip(devices, flats, strict=True):
        np.testing.assert_array_equal(device.to_host(flat.views[0]), want)
    assert box.sim.calls["allReduce"] == 2
    del flats, comm
    gc.collect()


@pytest.mark.parametrize(("ranks", "variable", "version"), [(2, None, 23003), (2, "1", 22907), (3, "1", 23003)])
def test_otherwise_ranks_on_a_card_use_kernels(gpus, late_nccl, ranks, variable, version):
    box = gpus(1)
    late_nccl(box, variable, version)
    devices = box.devices(ranks)
    comm = communicator(devices)
    flats = [FlatBuffers([ArraySpec("g", (700_009,), "float32")], device) for device in devices]
    assert {comm.how(bucket) for bucket in flats[0].buckets()} == {"two-shot"}
    assert not box.sim.comms
    del flats, comm
    gc.collect()


def test_an_nccl_that_refuses_all_the_same_is_said_and_kernels_run(gpus, late_nccl):
    box = gpus(1)
    late_nccl(box, most=1)
    devices = box.devices(2)
    with pytest.warns(UserWarning, match=f"{MULTI_RANK_VARIABLE}=1 asks for it.*kernels over peer memory"):
        comm = communicator(devices)
    flats = [FlatBuffers([ArraySpec("g", (700_009,), "float32")], device) for device in devices]
    assert {comm.how(bucket) for bucket in flats[0].buckets()} == {"two-shot"}
    box.sim.comms.clear()  # the half-made clique of the simulation
    del flats, comm
    gc.collect()


@pytest.mark.parametrize("status", [2, 8])
def test_cards_that_nccl_does_not_connect_use_kernels(gpus, monkeypatch, status):
    box = gpus(2)
    nccl = importlib.import_module("fastdp.runtime.cuda.cupy_nccl").nccl

    def refuse(devices):
        raise nccl.NcclError(status)

    monkeypatch.setattr(nccl.NcclCommunicator, "initAll", staticmethod(refuse))
    devices = box.devices(2)
    with pytest.warns(UserWarning, match=r"does not connect these GPUs .*NCCL_ERROR_.*NCCL_DEBUG=WARN"):
        comm = communicator(devices)
    flats = flats_on(devices, 700_009, "float32", whole_numbers(2, 700_009, "float32"))
    assert {comm.how(bucket) for bucket in flats[0].buckets()} == {"one-shot", "two-shot"}
    comm.all_reduce(flats, flats, flats[0].buckets())
    finish(devices)
    comm.check()
    want = sum(own[0] for own in whole_numbers(2, 700_009, "float32"))
    for device, flat in zip(devices, flats, strict=True):
        np.testing.assert_array_equal(device.to_host(flat.views[0]), want)
    del flats, comm
    gc.collect()
