"""Parts of the engine: scatter, merge, all-reduce, and what a step of a program that computes nothing costs."""

from __future__ import annotations

import driver_overhead  # before NumPy, because it limits BLAS to one thread
import numpy as np
import pytest
from all_reduce import fastdp_step, numpy_step

from fastdp import DataParallel
from fastdp.comm.scatter_merge import Merger, scatter
from fastdp.shard import split_rows

DEVICES = (1, 2, 4, 8)
ROWS, COLUMNS = 1024, 1000
MEGABYTES = (1, 4, 16, 64)


@pytest.mark.parametrize("count", DEVICES)
def test_scatter(benchmark, devices, count):
    """A batch of three arrays, 1,024 rows, 8 MB."""
    made = devices(count)
    batch = [np.ones((ROWS, COLUMNS), np.float32), np.ones((ROWS, COLUMNS), np.float32), np.ones(ROWS)]
    shards = split_rows(ROWS, count)
    batches = benchmark(scatter, batch, shards, made)
    assert sum(len(arrays[0]) for arrays in batches) == ROWS


@pytest.mark.parametrize("count", DEVICES)
def test_merge(benchmark, devices, count):
    """Outputs of 1,024 rows, 4 MB, written one replica after the other by one thread."""
    made = devices(count)
    shards = split_rows(ROWS, count)
    outputs = [np.full((rows.count, COLUMNS), rank, np.float32) for rank, rows in enumerate(shards)]

    def merge() -> list[np.ndarray]:
        merger = Merger(shards, made, made[0])
        for rank, output in enumerate(outputs):
            merger.write(rank, [output])
        return merger.result()

    (merged,) = benchmark(merge)
    assert merged[-1, -1] == count - 1


@pytest.mark.parametrize("megabytes", MEGABYTES)
def test_all_reduce_over_4_devices(benchmark, megabytes):
    """fp32, every device's buffer of this size."""
    step, made = fastdp_step(megabytes << 20, 4)
    benchmark(step)
    for device in made:
        device.close()


@pytest.mark.parametrize("megabytes", MEGABYTES)
def test_numpy_add(benchmark, megabytes):
    """Two arrays of this size into a third on one thread, as a baseline of the all-reduce."""
    benchmark(numpy_step(megabytes << 20))


@pytest.mark.parametrize("count", DEVICES)
def test_driver_overhead(benchmark, devices, count):
    """A training step of a program that computes nothing."""
    functions = (driver_overhead.train, driver_overhead.update, driver_overhead.predict)
    program = driver_overhead.EmptyProgram(driver_overhead.parameters(), *functions)
    engine, data = DataParallel(program, devices(count)), driver_overhead.batch()
    result = benchmark(engine.train, data, wants_outputs=False)
    assert result.rows == driver_overhead.ROWS
