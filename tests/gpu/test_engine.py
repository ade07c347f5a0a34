"""The engine on virtual GPUs of a real card equals the engine in host memory."""

from __future__ import annotations

import os
import subprocess
import sys

import engine_checks as checks
import numpy as np
import pytest

pytestmark = pytest.mark.gpu

COUNTS = [1, 2, 4, 8]
SIZES = [1, 70_000, 700_000] if os.environ.get("FASTDP_GPU_SMALL") else [1, 70_000, 700_000, 5_000_000]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("n", [1, 7, 64])
def test_a_function_program_trains_as_on_the_host(gpus, compute, hosts, count, n):
    checks.trains_as_on_the_host(gpus(count), hosts(count), n, compute)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_shards_do_not_know_their_devices(gpus, compute, hosts, count):
    devices = gpus(count)
    checks.shards_do_not_know_their_devices([devices[:1], devices[:-1], devices], hosts(1), compute)


@pytest.mark.parametrize("count", COUNTS)
def test_the_steady_state_allocates_nothing(gpus, compute, count, record_property):
    record_property("allocations", checks.allocates_nothing_in_the_steady_state(gpus(count), compute))


@pytest.mark.parametrize("count", COUNTS)
def test_a_failed_step_changes_no_weight_and_the_next_one_works(gpus, compute, count):
    checks.recovers_from_a_failure(gpus(count), compute)


@pytest.mark.parametrize("count", COUNTS)
def test_buckets_are_reduced_during_backward(gpus, compute, hosts, count, record_property):
    record_property("early", checks.reduces_during_backward(gpus(count), hosts(count), compute))


@pytest.mark.parametrize("count", [1, 3])
def test_outputs_are_merged_where_they_are_asked_for(gpus, compute, count):
    checks.merges_where_asked(gpus(count), compute)


@pytest.mark.parametrize("count", [1, 3])
def test_outputs_of_any_strides_are_merged_by_rows(gpus, compute, hosts, count):
    checks.merges_outputs_of_any_order(gpus(count), hosts(count), compute)


@pytest.mark.parametrize("count", [1, 2])
def test_parameters_may_be_arrays_of_the_card(gpus, compute, count):
    import cupy

    checks.takes_arrays_of_the_card_for_parameters(gpus(count), compute, cupy.asarray)


@pytest.mark.parametrize("idle", [0, 1])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_all_reduce_by_kernels(gpus, count, dtype, n, idle, record_property):
    way = checks.all_reduces(gpus(count), n, dtype, idle=idle)
    record_property("way", way)
    if len({device.ordinal for device in gpus(count)}) < count:  # NCCL wants a card for each
        assert set(way.split("+")) <= {"one-shot", "two-shot"}


@pytest.mark.parametrize("count", [2, 4, 8])
def test_all_reduce_through_the_host(gpus, count):
    way = checks.all_reduces(gpus(count), 100_000, "float64")
    if len({device.ordinal for device in gpus(count)}) < count:
        assert way == "host"


NCCL_RANKS = """
import sys
import numpy as np, cupy
from cupy.cuda import nccl
from fastdp.runtime.cuda import cupy_api as runtime
cards = [int(text) for text in sys.argv[1:]]
# 7 and 0: ncclFloat32 and ncclSum. As comm/cuda/communicator.py connects them.
if len(set(cards)) == len(cards):
    comms = runtime.nccl_init_all(cards)
else:
    comms = runtime.nccl_init_ranks(cards, runtime.on)
arrays, streams = [], []
for rank, card in enumerate(cards):
    with cupy.cuda.Device(card):
        arrays.append(cupy.asarray(np.arange(1 << 20, dtype=np.float32) * (rank + 1)))
        streams.append(cupy.cuda.Stream(non_blocking=True))
        cupy.cuda.runtime.deviceSynchronize()
nccl.groupStart()
for comm, array, stream in zip(comms, arrays, streams):
    comm.allReduce(array.data.ptr, array.data.ptr, array.size, 7, 0, stream.ptr)
nccl.groupEnd()
for stream in streams:
    stream.synchronize()
want = np.arange(1 << 20, dtype=np.float32) * sum(range(1, len(cards) + 1))
for array in arrays:
    np.testing.assert_array_equal(array.get(), want)
print("nccl", nccl.get_version())
"""


def nccl_in_a_process(*cards: int, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NCCL_RANKS, *map(str, cards)]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def needs_nccl(at_least: int = 0) -> None:
    from fastdp.runtime.cuda import cupy_api

    if not cupy_api.nccl_available():
        pytest.skip("CuPy finds no libnccl")
    if cupy_api.nccl_version() < at_least:
        pytest.skip(f"NCCL {cupy_api.nccl_version()} is older than {at_least}")


def test_nccl_with_one_rank(gpus):
    needs_nccl()
    from fastdp.runtime.cuda import cupy_api

    (device,) = gpus(1)
    (comm,) = cupy_api.nccl_init_all([device.ordinal])
    try:
        for dtype in ("float32", "float16", "bfloat16", "float64", "int32"):
            stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)
            values = np.arange(1000).astype(stored)
            array = device.empty(values.shape, stored)
            device.copy(array, values)
            pointer = cupy_api.array_pointer(array)
            with cupy_api.nccl_group(), cupy_api.on(device.ordinal):
                cupy_api.all_reduce(comm, pointer, pointer, 1000, dtype, device.communication.handle)
            np.testing.assert_array_equal(device.read(array, device.communication), values)
        assert cupy_api.nccl_async_error(comm) is None
    finally:
        cupy_api.nccl_destroy(comm)


def test_nccl_with_two_ranks_on_one_card(record_property):
    needs_nccl(23003)
    done = nccl_in_a_process(0, 0, NCCL_MULTI_RANK_GPU_ENABLE="1")
    record_property("said", (done.stdout + done.stderr)[-300:])
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.peer
def test_nccl_between_two_cards():
    needs_nccl()
    done = nccl_in_a_process(0, 1)
    assert done.returncode == 0, done.stderr[-2000:]
