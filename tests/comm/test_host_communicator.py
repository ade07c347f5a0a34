"""Collectives equal exact sums and give every replica the same bits; replicas meet, or are told why not."""

from __future__ import annotations

import itertools
import random
import threading
import time

import numpy as np
import pytest

from fastdp.buffers import ArraySpec, FlatBuffers
from fastdp.comm.host.communicator import REFRESH_NBYTES, SMALL_NBYTES, TILE, HostCommunicator
from fastdp.comm.rendezvous import Rendezvous
from fastdp.errors import DeviceTimeoutError, StepAborted
from fastdp.runtime.host.device import HostDevice
from fastdp.runtime.queue import QueueStream

LIMIT = 10.0
GRAIN = 1 << 12
LENGTHS = [1, 63, 64, 65, 1000, GRAIN - 1, GRAIN, GRAIN + 1, 3 * GRAIN + 9, TILE - 1, TILE, TILE + 1, 2 * TILE + 65]
TOLERANCE = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 1e-6, "float64": 1e-15, "int64": 0}


@pytest.fixture(scope="module")
def pool():
    devices = [HostDevice(index) for index in range(8)]
    yield devices
    for device in devices:
        device.close(LIMIT)


@pytest.fixture
def eight(pool):
    yield pool
    for device in pool:
        device.delay = None
        device.synchronize(LIMIT)
        device.recover()


def to_bfloat16(values):
    """fp32 rounded to the nearest bf16, by way of exact arithmetic: an oracle of its own."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    low, high = bits & 0xFFFF, bits >> 16
    up = (low > 0x8000) | ((low == 0x8000) & (high % 2 == 1))
    return (high + up).astype(np.uint16)


def stored(values, dtype):
    return to_bfloat16(values) if dtype == "bfloat16" else np.asarray(values).astype(dtype)


def read(bits, dtype):
    return (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits


def flats(devices, length, dtype, fill=None):
    made = [FlatBuffers([ArraySpec("a", (length,), dtype)], device) for device in devices]
    for flat, values in zip(made, fill or [], strict=False):
        flat.views[0][...] = values
    return made


def settle(devices):
    for device in devices:
        device.compute.record().synchronize(LIMIT)


def all_reduce(devices, sources, targets, **more):
    HostCommunicator(devices).all_reduce(sources, targets, targets[0].buckets(), **more)
    settle(devices)


def assert_all_equal(targets):
    assert all(targets[0].equals(other) for other in targets[1:])


def draws(dtype, count, length, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == "int64":
        return [rng.integers(-(2**40), 2**40, length) for _ in range(count)]
    return [stored(rng.normal(size=length), dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", range(1, 9))
def test_all_reduce_equals_the_exact_sum_and_every_replica_holds_the_same_bits(eight, count, dtype):
    devices = eight[:count]
    for length in LENGTHS if count in (1, 2, 3, 8) else [65, 1000]:
        values = draws(dtype, count, length)
        targets = flats(devices, length, dtype, values)
        all_reduce(devices, targets, targets)
        assert_all_equal(targets)
        terms = [read(v, dtype).astype(np.longdouble if dtype != "int64" else np.int64) for v in values]
        scale = sum(abs(term) for term in terms) if dtype != "int64" else 1
        error = abs(read(targets[0].views[0], dtype) - sum(terms)) / scale
        assert error.max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("active", [1, 2, 3])
def test_replicas_without_rows_get_the_sum_of_those_with_rows(eight, active, dtype):
    values = draws(dtype, 5, 300)
    targets = flats(eight[:5], 300, dtype, values)
    all_reduce(eight[:5], targets[:active], targets)
    expected = flats(eight[:active], 300, dtype, values[:active])
    all_reduce(eight[:active], expected, expected)
    assert_all_equal([*targets, *expected])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("count", range(2, 9))  # an even one gives a tie, rounded up or down to even
def test_16_bit_sums_are_rounded_once_and_to_even(eight, count, dtype):
    half = np.float32(2.0**-11 if dtype == "float16" else 2.0**-8)  # half a unit in the last place of 1.0
    values = [stored(np.full(70, half if rank else 1.0, np.float32), dtype) for rank in range(count)]
    targets = flats(eight[:count], 70, dtype, values)
    all_reduce(eight[:count], targets, targets)
    expected = stored(np.full(70, 1 + (count - 1) * half, np.float32), dtype)
    np.testing.assert_array_equal(targets[0].views[0], expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_infinities_nans_and_signed_zeros_add_up_as_floats_do_and_warn_of_nothing(eight, count, dtype):
    special = np.array([np.inf, -np.inf, np.nan, -0.0, 1.0], np.float32)
    columns = np.array(list(itertools.product(special, repeat=2)), np.float32).T
    values = [stored(columns[0], dtype)] + [stored(columns[1], dtype)] * (count - 1)
    targets = flats(eight[:count], columns.shape[1], dtype, values)
    all_reduce(eight[:count], targets, targets)
    assert_all_equal(targets)
    with np.errstate(invalid="ignore"):
        expected = columns[0].copy()
        for _ in range(count - 1):
            expected += columns[1]
    result = read(targets[0].views[0], dtype).astype(np.float32)
    np.testing.assert_array_equal(result, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(result[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_sum_beyond_the_largest_number_is_infinite(eight, dtype):
    largest = {"float16": 65504.0, "float32": np.finfo(np.float32).max, "bfloat16": 3.38e38}[dtype]
    targets = flats(eight[:2], 3, dtype, [stored(np.full(3, largest, np.float32), dtype)] * 2)
    all_reduce(eight[:2], targets, targets)
    assert np.isposinf(read(targets[1].views[0], dtype)).all()


def test_all_buckets_and_all_dtypes_are_reduced(eight):
    specs = [ArraySpec(f"{dtype}{n}", (90,), dtype) for n in range(5) for dtype in ("float32", "bfloat16", "int64")]
    targets = [FlatBuffers(specs, device) for device in eight[:3]]
    for target in targets:
        for view, spec in zip(target.views, specs, strict=True):
            view[...] = stored(np.full(90, 2.0), spec.dtype)
    buckets = targets[0].buckets(first=256, cap=700)
    assert len(buckets) > 6
    HostCommunicator(eight[:3]).all_reduce(targets, targets, buckets)
    settle(eight[:3])
    assert_all_equal(targets)
    assert all((read(view, spec.dtype) == 6).all() for view, spec in zip(targets[2].views, specs, strict=True))


@pytest.mark.parametrize("grains", [(5, 4), (4, 5), (1, 4), (0, 3)])
def test_every_part_of_every_bucket_is_reduced_whatever_the_other_buckets_lengths(eight, grains):
    specs = [ArraySpec(f"a{n}", (count * GRAIN,), "float32") for n, count in enumerate(grains)]
    targets = [FlatBuffers(specs, device) for device in eight[:4]]
    for target in targets:
        target.buffers["float32"][...] = 1
    buckets = targets[0].buckets(first=1, cap=1)
    HostCommunicator(eight[:4]).all_reduce(targets, targets, buckets)
    settle(eight[:4])
    assert len(buckets) == 2
    assert all((target.buffers["float32"] == 4).all() for target in targets)


def test_a_dtype_that_is_stored_as_bytes_is_refused(eight):
    targets = flats(eight[:2], 3, "float8_e5m2")
    with pytest.raises(TypeError, match="float8_e5m2 cannot be all-reduced"):
        all_reduce(eight[:2], targets, targets)


def own_parts(targets):
    """What each rank holds of its own part of every bucket, as one array."""
    bucket = targets[0].buckets()[0]
    parts = [bucket.part(rank, len(targets)) for rank in range(len(targets))]
    assert parts[0].start == bucket.start
    assert parts[-1].stop == bucket.stop
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    assert len({part.stop - part.start for part in parts[:-1]}) <= 1
    assert all(part.start * t.buffers[part.dtype].itemsize % 64 == 0 for t, part in zip(targets, parts, strict=True))
    return np.concatenate(
        [t.buffers[part.dtype][part.start : part.stop] for t, part in zip(targets, parts, strict=True)]
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("idle", [0, 1])
def test_reduce_scatter_leaves_each_rank_its_part_of_the_all_reduces_bits(eight, count, dtype, idle):
    devices = eight[:count]
    sources = max(1, count - idle)
    for length in [1, 17, 65, 1000, 4 * GRAIN + 9, 2 * TILE + 65]:
        values = draws(dtype, count, length)
        expected, targets = (flats(devices, length, dtype, values) for _ in range(2))
        all_reduce(devices, expected[:sources], expected)
        HostCommunicator(devices).reduce_scatter(targets[:sources], targets, targets[0].buckets())
        settle(devices)
        np.testing.assert_array_equal(own_parts(targets), expected[0].buffers[dtype])


@pytest.mark.parametrize("dtype", [*TOLERANCE, "float8_e4m3fn", "bool"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_all_gather_puts_every_ranks_part_everywhere(eight, count, dtype):
    devices, rng = eight[:count], np.random.default_rng(0)
    for length in [1, 65, 1000, 4 * GRAIN + 9]:
        targets = flats(devices, length, dtype)
        for target in targets:
            target.buffers[dtype][...] = rng.integers(0, 2, target.buffers[dtype].shape)
        expected = own_parts(targets)
        HostCommunicator(devices).all_gather(targets, targets[0].buckets())
        settle(devices)
        assert all((target.buffers[dtype] == expected).all() for target in targets)


@pytest.mark.parametrize("seed", range(3))
def test_a_reduce_scatter_and_an_all_gather_are_an_all_reduce_whatever_the_workers_timing(eight, seed):
    count, length = 8, 3 * GRAIN + 9
    values = draws("float32", count, length, seed)
    targets, expected = (flats(eight, length, "float32") for _ in range(2))
    for flat, one in zip(expected, values, strict=True):
        flat.views[0][...] = one
    all_reduce(eight, expected, expected)
    for number, device in enumerate(eight):
        draw = random.Random(100 * seed + number)
        device.delay = lambda draw=draw: time.sleep(draw.random() * 0.003)
    comm, buckets = HostCommunicator(eight), targets[0].buckets()
    read_back = [None] * count
    seen = []
    for rank, device in enumerate(eight):
        device.compute.enqueue(lambda r=rank: targets[r].views[0].__setitem__(..., values[r]))
    comm.reduce_scatter(targets, targets, buckets, once=lambda: seen.append("once"))
    comm.all_gather(targets, buckets)
    for rank, device in enumerate(eight):
        device.compute.enqueue(lambda r=rank: read_back.__setitem__(r, targets[r].views[0].copy()))
    settle(eight)
    assert seen == ["once"]
    for got in read_back:
        np.testing.assert_array_equal(got, expected[0].views[0])


@pytest.mark.parametrize("name", ["communication", "compute"])
@pytest.mark.parametrize("kind", ["reduce_scatter", "all_gather"])
def test_a_missing_wait_in_the_other_collectives_is_detected(eight, kind, name, monkeypatch):
    kept, length, count = QueueStream.wait, 512, 4
    monkeypatch.setattr(QueueStream, "wait", lambda self, event: None if self.name == name else kept(self, event))
    targets, read_back = flats(eight[:count], length, "float32"), [None] * count
    buckets = targets[0].buckets()
    slow = {"communication": {3}, "compute": {0, 1, 2, 3}}[name]

    def write(rank):
        time.sleep(0.03 if name == "communication" and rank in slow else 0)
        targets[rank].views[0][...] = rank + 1

    for rank, device in enumerate(eight[:count]):
        device.compute.enqueue(lambda r=rank: write(r))
        if name == "compute":
            device.communication.enqueue(lambda: time.sleep(0.05))
    comm = HostCommunicator(eight[:count])
    if kind == "reduce_scatter":
        comm.reduce_scatter(targets, targets, buckets)
    else:
        comm.all_gather(targets, buckets)
    for rank, device in enumerate(eight[:count]):
        device.compute.enqueue(lambda r=rank: read_back.__setitem__(r, targets[r].views[0].copy()))
    for device in eight[:count]:
        device.synchronize(LIMIT)
    parts = [buckets[0].part(rank, count) for rank in range(count)]
    if kind == "reduce_scatter":
        right = all((read_back[r][part.start : part.stop] == 10).all() for r, part in enumerate(parts))
    else:
        right = all((got[part.start : part.stop] == r + 1).all() for got in read_back for r, part in enumerate(parts))
    assert not right


def test_a_dtype_that_is_stored_as_bytes_is_not_reduce_scattered(eight):
    targets = flats(eight[:2], 3, "float8_e5m2")
    with pytest.raises(TypeError, match="float8_e5m2 cannot be all-reduced"):
        HostCommunicator(eight[:2]).reduce_scatter(targets, targets, targets[0].buckets())


@pytest.mark.parametrize("length", [1000, 100_000])  # copied by the first device, and by each
def test_broadcast_gives_all_the_first_devices_values(eight, length):
    buffers = flats(eight, length, "float32", [np.full(length, n + 1.0) for n in range(8)])
    assert (buffers[0].nbytes * 7 > SMALL_NBYTES) == (length > 1000)
    HostCommunicator(eight).broadcast(buffers)
    settle(eight)
    assert all((flat.views[0] == 1.0).all() for flat in buffers)


@pytest.mark.parametrize("length", [1000, 100_000, 400_000])
@pytest.mark.parametrize("busy", [None, 0, 2], ids=["none", "first", "last"])
def test_a_refresh_waits_for_work_that_is_left_and_else_copies_little_at_once(length, busy):
    devices = [HostDevice(index) for index in range(3)]
    buffers = flats(devices, length, "float32", [np.full(length, n + 1.0) for n in range(3)])
    begin = threading.Event()
    if busy is not None:
        devices[busy].compute.enqueue(lambda: begin.wait(LIMIT) and buffers[busy].views[0].fill(5.0))
    HostCommunicator(devices).refresh(buffers)
    if busy is None and buffers[0].nbytes * 2 <= REFRESH_NBYTES:
        assert all((flat.views[0] == 1.0).all() for flat in buffers)
        assert not any(device._thread for device in devices), "no worker was needed"
    begin.set()
    settle(devices)
    assert all((flat.views[0] == (5.0 if busy == 0 else 1.0)).all() for flat in buffers)
    for device in devices:
        device.close(LIMIT)


def test_once_runs_one_time_after_all_before_it_and_before_all_behind_it(eight):
    seen = []
    for number, device in enumerate(eight):
        draw = random.Random(number)
        device.delay = lambda draw=draw: time.sleep(draw.random() * 0.003)
        device.compute.enqueue(lambda: seen.append("before"))
    HostCommunicator(eight).once(lambda: seen.append("once"))
    for device in eight:
        device.compute.enqueue(lambda: seen.append("behind"))
    settle(eight)
    assert seen == ["before"] * 8 + ["once"] + ["behind"] * 8


def step_with_slow_devices(devices, slow, length=512):
    """Gradients written on the compute streams, reduced, and read there; `slow` devices write late."""
    count = len(devices)
    targets = flats(devices, length, "float32")
    read_back = [None] * count

    def write(rank):
        if rank in slow:
            time.sleep(0.03)
        targets[rank].views[0][...] = rank + 1

    def read_out(rank):
        read_back[rank] = targets[rank].views[0].copy()

    for rank, device in enumerate(devices):
        device.compute.enqueue(lambda r=rank: write(r))
    HostCommunicator(devices).all_reduce(targets, targets, targets[0].buckets())
    for rank, device in enumerate(devices):
        device.compute.enqueue(lambda r=rank: read_out(r))
    for device in devices:
        device.synchronize(LIMIT)
    return all((values == sum(range(count + 1))).all() for values in read_back)


@pytest.mark.parametrize("length", [1, 512, 4 * GRAIN])
@pytest.mark.parametrize("slow", [{0}, {3}, {0, 1}, set()])
def test_all_reduce_is_ordered_against_compute_before_and_behind_it(eight, slow, length):
    assert step_with_slow_devices(eight[:4], slow, length)


@pytest.mark.parametrize("length", [512, 4 * GRAIN])
@pytest.mark.parametrize(("name", "slow"), [("communication", {3}), ("compute", {0})])
def test_a_missing_wait_in_the_all_reduce_is_detected(eight, name, slow, length, monkeypatch):
    kept = QueueStream.wait
    monkeypatch.setattr(QueueStream, "wait", lambda self, event: None if self.name == name else kept(self, event))
    assert not step_with_slow_devices(eight[:4], slow, length)


def test_a_failure_before_the_all_reduce_reaches_every_device_and_changes_nothing(eight):
    targets = flats(eight[:3], 100, "float32", [np.full(100, n + 1.0) for n in range(3)])
    eight[1].compute.enqueue([].pop)
    with pytest.raises(IndexError):
        all_reduce(eight[:3], targets, targets)
    for device in eight[:3]:
        with pytest.raises(IndexError):
            device.compute.record().synchronize(LIMIT)
    assert [flat.views[0][0] for flat in targets] == [1.0, 2.0, 3.0]


# Rendezvous.


def participants(count, work):
    """Run `work(rank)` in one thread each; gives results, or what was raised."""
    results = [None] * count

    def run(rank):
        try:
            results[rank] = work(rank)
        except (RuntimeError, TimeoutError) as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("count", [1, 2, 8])
def test_values_arrive_in_rank_order_round_after_round(count):
    meeting = Rendezvous(count, LIMIT)

    def work(rank):
        draw = random.Random(rank)
        seen = []
        for turn in range(100):
            if draw.random() < 0.1:
                time.sleep(0.0005)
            seen.append(list(meeting.exchange(rank, (turn, rank), turn)))
        return seen

    expected = [[(turn, rank) for rank in range(count)] for turn in range(100)]
    assert participants(count, work) == [expected] * count


def test_abort_wakes_all_who_wait_and_refuses_all_who_come_later():
    meeting, cause = Rendezvous(5, LIMIT), ValueError("the cause")

    def work(rank):
        if rank < 3:
            return meeting.exchange(rank, rank, "here")
        if rank == 3:
            while len(meeting._waiting) < 3:
                time.sleep(0.001)
            assert not meeting.aborted
            meeting.abort(cause)
            meeting.abort(KeyError("a later one"))
        return None

    began = time.monotonic()
    results = participants(5, work)
    assert time.monotonic() - began < LIMIT / 2
    assert [type(result) for result in results[:3]] == [StepAborted] * 3
    assert all(result.__cause__ is cause for result in results[:3])
    assert meeting.aborted
    with pytest.raises(StepAborted, match="failure on another device"):
        meeting.exchange(4, 4, "here")


def test_a_timeout_names_how_many_are_missing_and_nobody_can_join_afterwards():
    meeting = Rendezvous(5, 0.2)
    results = participants(2, lambda rank: meeting.exchange(rank, rank, "here"))
    first = [result for result in results if isinstance(result, DeviceTimeoutError)]
    assert first
    assert "3 of 5 replicas did not reach here within 0.2 seconds" in str(first[0])
    assert all(isinstance(result, (DeviceTimeoutError, StepAborted)) for result in results)
    meeting._timeout = LIMIT  # a wait would be seen, however busy the machine is
    began = time.monotonic()
    with pytest.raises(StepAborted):
        meeting.exchange(2, 2, "here")
    assert time.monotonic() - began < LIMIT / 2
