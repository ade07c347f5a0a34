"""What it takes to bring a shuffled batch of images to 4 devices: from arrays, as Keras's `fit` does, and by number."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras.src.backend.torch.trainer import TorchEpochIterator

from fastdp.comm.scatter_merge import scatter
from fastdp.data import DeviceDataset, Scaled
from fastdp.keras.fit.device_dataset import ResidentRows
from fastdp.program.keras.batch import flatten_batch, unpack
from fastdp.shard import split_rows

COUNT, ROWS, BATCH = 4, 2048, 256
SECONDS = 60.0


@pytest.mark.parametrize("held", ["float_arrays", "data_set", "data_set_of_bytes"])
def test_feed(benchmark, devices, held):
    """256 rows of 32 x 32 x 3 in fp32 with labels: Keras's iterator, the engine's scatter, until the rows arrive."""
    made = devices(COUNT)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (ROWS, 32, 32, 3)).astype(np.uint8), rng.integers(0, 10, ROWS)
    casts = {0: Scaled()} if held == "data_set_of_bytes" else {}
    x = images if casts else images.astype(np.float32)
    if held == "float_arrays":
        epochs = TorchEpochIterator(x, labels, batch_size=BATCH, shuffle=True)
    else:
        data = DeviceDataset((x, labels), made, casts)
        epochs = TorchEpochIterator(ResidentRows(data, made, np.arange(ROWS), [BATCH], shuffle=True))
    shards = split_rows(BATCH, COUNT)
    batches = iter(())

    def feed() -> list[list[np.ndarray]]:
        nonlocal batches
        with keras.device("cpu"):
            batch = next(batches, None)
            if batch is None:
                batches = iter(epochs._get_iterator())
                batch = next(batches)
        arrays, _ = flatten_batch(unpack(batch))
        rows = scatter(arrays, shards, made)
        for device in made:
            device.synchronize(SECONDS)
        return rows

    rows = benchmark(feed)
    assert [part[0].shape for part in rows] == [(BATCH // COUNT, 32, 32, 3)] * COUNT
    assert {part[0].dtype for part in rows} == {np.dtype(np.float32)}
