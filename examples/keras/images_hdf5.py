"""Classifies images that lie in an HDF5 file: augmentation, validation, checkpoints, one file at the end.

    python examples/keras/images_hdf5.py
    python examples/keras/images_hdf5.py --file train.h5 --epochs 50    # your own: data sets `images` and `labels`

Images stay uint8 on disk and are read a batch at a time. Kill the script at any moment and start it again: it goes on
from the newest checkpoint in `run/`, bit for bit. Without --file it writes scikit-learn's digits to a file first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import h5py
import numpy as np

import fastdp  # before keras: chooses its torch backend
from fastdp.callbacks import Checkpoint
from fastdp.utils import HDF5Matrix

import keras  # isort: skip


def write_digits(path: Path) -> None:
    """1,797 images of 8 x 8 pixels, in an order of their own."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  only without a file of your own

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    with h5py.File(path, "w") as file:
        file["images"] = (digits.images[order, ..., None] * 15).astype(np.uint8)
        file["labels"] = digits.target[order]


def make_model(shape: tuple[int, ...], classes: int) -> keras.Model:
    """A small convolutional network; shifts and scaling happen on the devices."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Rescaling(1 / 255),
            layers.RandomTranslation(0.1, 0.1, seed=1),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.2, seed=2),
            layers.Dense(classes, activation="softmax"),
        ]
    )


def main() -> None:
    """Train on nine tenths of the rows, validate on the rest, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--devices", type=int, default=4, help="virtual ones where there are not so many GPUs")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="global: each device gets its share")
    options = parser.parse_args()
    if len(fastdp.devices()) < options.devices:
        fastdp.set_virtual_devices(options.devices)
    path = options.file or Path("digits.h5")
    if options.file is None and not path.exists():
        write_digits(path)

    with h5py.File(path, "r") as file:
        rows, *shape = file["images"].shape
        classes = int(file["labels"][:].max()) + 1
    cut = rows * 9 // 10
    x, y = HDF5Matrix(str(path), "images", end=cut), HDF5Matrix(str(path), "labels", end=cut)
    validation = HDF5Matrix(str(path), "images", start=cut), HDF5Matrix(str(path), "labels", start=cut)

    keras.utils.set_random_seed(0)
    model = make_model(tuple(shape), classes)
    parallel = fastdp.wrap(model, gpus=options.devices, deterministic=True)
    parallel.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = parallel.fit(
        x,
        y,
        epochs=options.epochs,
        batch_size=options.batch_size,
        shuffle="batch",  # whole batches in a random order: HDF5 reads neighbouring rows faster
        validation_data=validation,
        callbacks=[Checkpoint("run", every_minutes=10, keep=2)],
        verbose=2,
    )
    print(f"accuracy on rows not trained on: {history.history['val_accuracy'][-1]:.3f}")
    model.save("images.keras")


if __name__ == "__main__":
    main()
