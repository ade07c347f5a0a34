"""Small data sets of every kind that Keras's loops take, with the same batches each time, for tests of feeding."""

import keras
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastdp.data import prefetch

ROWS, BATCHES = 4, 7


def batch(i):
    rng = np.random.default_rng(i)
    return rng.normal(size=(ROWS, 3)).astype("float32"), rng.normal(size=(ROWS, 2)).astype("float32")


X, Y = (np.concatenate(parts) for parts in zip(*map(batch, range(BATCHES)), strict=True))


class Data(keras.utils.PyDataset):
    def __len__(self):
        return BATCHES

    def __getitem__(self, i):
        return batch(i)


def generator(count=1000, asked=None):
    for i in range(count):
        if asked is not None:
            asked.append(i)
        yield batch(i)


class Chunked:
    """By the protocol of zarr: shape, dtype, chunks, rows by slices and numbers."""

    chunks = (3, 3)

    def __init__(self, array):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, rows):
        return self._array[rows]


LOADER = {"batch_size": ROWS, "shuffle": True}
SOURCES = {
    "dataset": lambda: {"x": Data()},
    "tensors": lambda: {"x": DataLoader(TensorDataset(torch.tensor(X), torch.tensor(Y)), **LOADER)},
    "rows": lambda: {"x": DataLoader(list(zip(X, Y, strict=True)), **LOADER)},
    "generator": lambda: {"x": generator(), "steps_per_epoch": 6, "shuffle": False},
    "prefetch": lambda: {"x": prefetch(DataLoader(list(zip(X, Y, strict=True)), **LOADER))},
    "arrays": lambda: {"x": X, "y": Y, "batch_size": ROWS},
    "torch": lambda: {"x": torch.tensor(X), "y": torch.tensor(Y), "batch_size": ROWS},
    "zarr": lambda: {"x": Chunked(X), "y": Y, "batch_size": ROWS, "shuffle": "chunks"},
}


class Stop(keras.callbacks.Callback):
    def __init__(self, at, error=None):
        super().__init__()
        self._at, self._error = at, error

    def on_train_batch_end(self, step, logs=None):
        if step == self._at:
            if self._error is not None:
                raise self._error
            self.model.stop_training = True
