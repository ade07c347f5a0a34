"""The data and the model of the demo: 1,797 handwritten digits, and a convolutional network for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fastdp.cli.optional import load
from fastdp.data.hdf5 import HDF5Matrix

SEED = 7
TRAIN_ROWS = 1500
LARGEST_PIXEL = 16


@dataclass(frozen=True)
class Digits:
    """Images of shape (rows, 8, 8, 1), scaled to [0, 1], and labels 0 to 9; both are read from disk by rows."""

    x_train: HDF5Matrix
    y_train: HDF5Matrix
    x_test: HDF5Matrix
    y_test: HDF5Matrix


def write_digits(path: Path) -> None:
    """Write scikit-learn's digits, shuffled once, as data sets `x` (uint8) and `y` (int64)."""
    bunch = load("sklearn.datasets", "demo").load_digits()
    order = np.random.default_rng(SEED).permutation(len(bunch.target))
    with h5py.File(path, "w") as file:
        file["x"] = bunch.images[order, :, :, np.newaxis].astype(np.uint8)
        file["y"] = bunch.target[order].astype(np.int64)


def open_digits(path: Path) -> Digits:
    """Open the file: the first 1,500 rows are for training, the rest for testing."""
    return Digits(
        HDF5Matrix(path, "x", end=TRAIN_ROWS, normalizer=_scale),
        HDF5Matrix(path, "y", end=TRAIN_ROWS),
        HDF5Matrix(path, "x", start=TRAIN_ROWS, normalizer=_scale),
        HDF5Matrix(path, "y", start=TRAIN_ROWS),
    )


def build_model() -> Any:
    """A new convolutional network with the same weights and dropout masks each time.

    The layers are chosen so that rounding differences stay small. BatchNormalization normalizes by each replica's own
    rows unless `sync_batch_norm=True`. In trials with ReLU and max pooling, the losses on one and on four devices
    drifted apart by 1e-3 and more, perhaps at ReLU's kink, where the blank margins lie; SiLU is smooth.
    """
    keras = load("keras", "keras")
    keras.utils.set_random_seed(SEED)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(24, 3, padding="same", activation="silu"),
            layers.Conv2D(48, 3, padding="same", activation="silu"),
            layers.AveragePooling2D(2),
            layers.Dropout(0.25, seed=SEED),
            layers.Flatten(),
            layers.Dense(64, activation="silu"),
            layers.Dropout(0.25, seed=SEED + 1),
            layers.Dense(10, activation="softmax"),
        ],
        name="digits",
    )


def _scale(block: np.ndarray) -> np.ndarray:
    """Pixels 0 to 16 as fp32 in [0, 1]."""
    return np.asarray(block, np.float32) / LARGEST_PIXEL
