"""A data set that is sharded over virtual devices gives the batches of a replicated one; each has its part."""

from __future__ import annotations

import numpy as np
import pytest
from least_squares import line

import fastdp
from fastdp.data import DeviceDataset, Scaled
from fastdp.data.row_parts import RowParts
from fastdp.runtime.host.device import HostDevice

LIMIT = 10.0
CASTS = {0: Scaled(scale=1 / 255, offset=-0.5)}


@pytest.fixture
def devices():
    made = [HostDevice(i) for i in range(8)]
    yield made
    for device in made:
        device.close(LIMIT)


def arrays(rows=23):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (rows, 2, 3)).astype(np.uint8)
    return [pixels, rng.normal(size=(rows, 2)).astype("float32"), rng.integers(0, 9, rows), pixels[:, 0] > 99]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [23, 5])  # more rows than devices, and fewer
@pytest.mark.parametrize("casts", [{}, CASTS, {0: Scaled("float16", 2.0, -1.0)}])
def test_devices_gather_the_rows_that_a_replicated_one_gives(devices, count, rows, casts):
    sharded, whole = (DeviceDataset(arrays(rows), devices[:count], casts, sharded=one) for one in (True, False))
    assert (sharded.sharded, whole.sharded) == (True, False)
    rng = np.random.default_rng(1)
    for index in (rng.permutation(rows), np.arange(rows), rng.integers(0, rows, 9), np.array([rows - 1]), [2, 2, 0]):
        ours, theirs = (
            [data.gather(device, np.asarray(index, np.int64), range(4)) for device in devices[:count]]
            for data in (sharded, whole)
        )
        for device in devices[:count]:
            device.synchronize(LIMIT)
        for got, want in zip(ours, theirs, strict=True):
            for a, b in zip(got, want, strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_an_engine_trains_on_it_as_on_the_arrays(devices, count):
    pixels, targets = arrays()[:2]
    engine, reference = (fastdp.DataParallel(line(2), devices[:count], timeout=LIMIT) for _ in range(2))
    data = DeviceDataset([pixels, targets], engine, {0: Scaled()}, sharded=True)
    order, scaled = np.random.default_rng(5).permutation(23), pixels.astype(np.float32) * np.float32(1 / 255)
    batches = list(data.batches(6, seed=5))
    for start, batch in zip(range(0, 23, 6), batches, strict=True):
        index = order[start : start + 6]
        got, want = engine.train(batch), reference.train([scaled[index], targets[index]])
        np.testing.assert_array_equal(got.outputs[0], want.outputs[0])
        np.testing.assert_array_equal(got.sums, want.sums)
    assert len(batches) == 4


def test_each_device_has_its_part(devices):
    given = arrays(20)
    total = sum(array.nbytes for array in given)
    data = DeviceDataset(given, devices, CASTS, sharded=True)
    held = data.nbytes
    assert held.pop("host") == total
    assert list(held) == [f"virtual:{i}" for i in range(8)]
    assert [nbytes * 20 // total for nbytes in held.values()] == [3] * 4 + [2] * 4
    assert sum(held.values()) == total
    assert data.held.startswith("whose rows the devices have in parts: 0.0 MB on virtual:0, ")
    assert "of 20 rows in parts in host memory" in repr(data)
    more = data.with_array(np.ones((20, 2)))
    assert more.nbytes["virtual:0"] == data.nbytes["virtual:0"] + 3 * 16
    few = DeviceDataset(arrays(3), devices, sharded=True).nbytes
    assert [few[f"virtual:{i}"] > 0 for i in range(8)] == [True] * 3 + [False] * 5


def test_only_the_owner_is_asked_for_a_row(devices):
    """The parts are what is read: an owner's rows change, and those alone."""
    given = arrays(9)
    parts = RowParts(9, ["a", "b", "c"])
    numbers, places = parts.by_owner(np.array([8, 0, 3, 1, 8]))
    assert {name: list(found) for name, found in numbers.items()} == {"a": [0, 1], "b": [0], "c": [2, 2]}
    assert list(places) == [1, 3, 2, 0, 4]
    numbers, places = parts.by_owner(np.array([3, 5]))
    assert ({name: list(found) for name, found in numbers.items()}, places) == ({"b": [0, 2]}, None)
    target = np.empty((3, 2), "float32")
    parts.take(given[1], np.array([7, 0, 7]), target)
    np.testing.assert_array_equal(target, given[1][[7, 0, 7]])


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_what_is_no_answer_is_refused(devices, wrong):
    with pytest.raises(TypeError, match=r"`sharded` must be True .* or False .*Received: "):
        DeviceDataset(arrays(), devices, sharded=wrong)
