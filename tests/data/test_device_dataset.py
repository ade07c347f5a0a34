"""A data set on the devices gives the rows that its numbers name, cast on the way, to engines of any devices."""

from __future__ import annotations

import numpy as np
import pytest
from least_squares import line

import fastdp
from fastdp.data import DeviceDataset, Scaled
from fastdp.runtime.host.device import HostDevice

LIMIT = 10.0


@pytest.fixture
def devices():
    made = [HostDevice(i) for i in range(3)]
    yield made
    for device in made:
        device.close(LIMIT)


def arrays(rows=23):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (rows, 2, 3)).astype(np.uint8), rng.normal(size=(rows, 2)).astype("float32")]


def test_the_rows_of_a_batch_are_those_of_its_numbers(devices):
    pixels, targets = arrays()
    data = DeviceDataset([pixels, targets], devices, casts={0: Scaled(scale=1 / 255, offset=-0.5)})
    batch = data.rows([7, 0, 22, 7])
    assert (len(data), len(batch)) == (23, 2)
    assert [(column.shape, column.dtype, column.ndim) for column in batch] == [
        ((4, 2, 3), np.float32, 3),
        ((4, 2), np.float32, 2),
    ]
    expected = (pixels[[7, 0, 22, 7]].astype(np.float32) * np.float32(1 / 255) + np.float32(-0.5)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(batch[0]), expected)
    np.testing.assert_array_equal(np.asarray(batch[-1]), targets[[7, 0, 22, 7]])
    assert np.asarray(batch[1], np.float64).dtype == np.float64


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_engine_trains_on_it_as_on_the_arrays(devices, dtype):
    pixels, targets = arrays()
    casts = {0: Scaled(dtype)}
    engine, reference = (fastdp.DataParallel(line(2), devices, timeout=LIMIT) for _ in range(2))
    data = DeviceDataset([pixels, targets], engine.devices, casts)
    order = np.random.default_rng(5).permutation(23)
    scaled = (pixels.astype(np.float32) * np.float32(1 / 255)).astype(dtype)
    starts = list(range(0, 23, 6))
    batches = list(data.batches(6, seed=5))
    assert len(batches) == len(starts)
    for start, batch in zip(starts, batches, strict=True):
        index = order[start : start + 6]
        got = engine.train(batch, while_running=lambda b=batch: engine.stage(b))
        want = reference.train([scaled[index], targets[index]])
        np.testing.assert_array_equal(got.outputs[0], want.outputs[0])
        np.testing.assert_array_equal(got.sums, want.sums)
    np.testing.assert_array_equal(
        engine.predict(data.rows(np.arange(5))).outputs[0], reference.predict([scaled[:5], targets[:5]]).outputs[0]
    )


def test_an_epoch_has_each_row_once(devices):
    data = DeviceDataset(arrays(), devices)
    index = [batch.numbers for batch in data.batches(5, seed=1)]
    assert [len(part) for part in index] == [5, 5, 5, 5, 3]
    assert sorted(np.concatenate(index)) == list(range(23))
    again = [batch.numbers for batch in data.batches(5, seed=1)]
    other = [batch.numbers for batch in data.batches(5, seed=2)]
    assert all((a == b).all() for a, b in zip(index, again, strict=True))
    assert any((a != b).any() for a, b in zip(index, other, strict=True))
    assert [len(batch.numbers) for batch in data.batches(5, drop_last=True)] == [5] * 4
    straight = np.concatenate([batch.numbers for batch in data.batches(10, shuffle=False)])
    assert (straight == np.arange(23)).all()


def test_what_cannot_be_is_refused(devices):
    pixels, targets = arrays()
    with pytest.raises(ValueError, match="same number of rows"):
        DeviceDataset([pixels, targets[:3]], devices)
    for place in (1, 2):
        with pytest.raises(ValueError, match=r"Each key of `casts` must be .* exactly one uint8 array"):
            DeviceDataset([pixels, targets], devices, casts={place: Scaled()})
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        Scaled("float64")
    data = DeviceDataset([pixels, targets], devices)
    for index in ([23], [-1]):
        with pytest.raises(IndexError, match="numbers from 0 to 22"):
            data.rows(index)
    for index in ([], [[1]], [0.5]):
        with pytest.raises(ValueError, match="a vector of one or more row numbers"):
            data.rows(index)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        next(data.batches(0))
