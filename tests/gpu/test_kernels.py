"""Every kernel against its NumPy twin on the card, from one element to more than all multiprocessors hold."""

from __future__ import annotations

import os

import kernel_checks as checks
import pytest
from kernel_device import on_device

pytestmark = pytest.mark.gpu

# Under compute-sanitizer, which is many times slower, the large sizes are left out, and so are ranks that wait for each
# other, since it may run one kernel at a time.
SMALL, ALONE = (bool(os.environ.get(name)) for name in ("FASTDP_GPU_SMALL", "FASTDP_GPU_ALONE"))
SIZES = [1, 7, 130, 10_007] if SMALL else [1, 7, 130, 10_007, 2_200_003]  # the last: each block has several turns
ROWS = [1, 12, 784, 1030] if SMALL else [1, 12, 16, 784, 1023, 3072, 20_001, 150_528]


@pytest.fixture(scope="module")
def device():
    from fastdp.runtime.cuda import cupy_api
    from fastdp.runtime.cuda.device import CudaDevice

    one = CudaDevice(0, 0)
    ready, streams = on_device(one)
    yield ready
    ready.synchronize()
    for stream in streams:
        cupy_api.stream_destroy(stream)
    one.close()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("cast", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_slice_rows(device, row, cast, shuffled):
    for leads in ((0, 0), (3, 4), (1, 0)):
        checks.slice_rows(device, row, cast, shuffled=shuffled, leads=leads, seed=row)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("cast", [None, "float32", "float16", "bfloat16"])
def test_slice_rows_to_places(device, row, cast):
    for leads in ((0, 0), (3, 4)):
        checks.slice_rows_to_places(device, row, cast, leads)


def test_slice_rows_finds_a_row_number_out_of_range(device):
    checks.slice_rows_out_of_range(device)


@pytest.mark.parametrize("row", ROWS)
def test_concat_rows(device, row):
    checks.concat_rows(device, [3, 0, 5, 4], row, 0, row)
    checks.concat_rows(device, [1, 2], row, 5, row)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number_is_known(device, dtype):
    checks.all_16_bit_numbers(device, dtype)


@pytest.mark.skipif(ALONE, reason="the sanitizer may run one kernel at a time, and ranks wait for each other")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fp32_is_rounded_to_the_nearest_16_bit_number_and_ties_to_even(device, dtype):
    checks.rounding(device, dtype)
    checks.overflow_and_nan(device, dtype)


@pytest.mark.parametrize("kind", ["one_shot", "two_shot", "reduce_scatter"])
@pytest.mark.parametrize("dtype", checks.FLOATS)
def test_all_reduce_of_one_rank(device, kind, dtype):
    for n in SIZES[:4]:
        checks.all_reduce(device, kind, 1, n, dtype, blocks=4, threads=128, turns=2)


@pytest.mark.skipif(ALONE, reason="the sanitizer may run one kernel at a time, and ranks wait for each other")
@pytest.mark.parametrize("kind", ["one_shot", "two_shot", "reduce_scatter"])
@pytest.mark.parametrize("dtype", checks.FLOATS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_all_reduce_between_virtual_ranks(device, kind, dtype, ranks):
    for n in (1, 1000) if SMALL else (1, 1000, 65_536 if kind == "one_shot" else 500_001):
        checks.all_reduce(device, kind, ranks, n, dtype, blocks=8, threads=512, turns=4 if n < 100_000 else 2)
