"""Tells which of Python's own modules a piece of text comes from: a bidirectional LSTM over pieces of unequal length.

    python examples/keras/text_lstm.py
    python examples/keras/text_lstm.py --devices 8 --epochs 20

Short pieces are padded by zeros, which `mask_zero` hides from the LSTM. The masks travel with the rows of each device.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import statistics
import textwrap

import numpy as np

import fastdp  # before keras: chooses its torch backend

import keras  # isort: skip

MODULES = (difflib, statistics, textwrap)
LONGEST = 40


def pieces(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the modules' sources (rows, LONGEST), padded by zeros, and the number of the module (rows,)."""
    generator = np.random.default_rng(0)
    sources = [inspect.getsource(module).encode("ascii", "replace") for module in MODULES]
    labels = generator.integers(0, len(MODULES), rows)
    tokens = np.zeros((rows, LONGEST), np.int64)
    for row, label in enumerate(labels):
        length = int(generator.integers(LONGEST // 2, LONGEST + 1))
        start = int(generator.integers(0, len(sources[label]) - length))
        tokens[row, :length] = list(sources[label][start : start + length])
    return tokens, labels


def main() -> None:
    """Train, and show the accuracy on pieces that were held back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="virtual ones where there are not so many GPUs")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64, help="global: each device gets its share")
    options = parser.parse_args()
    if len(fastdp.devices()) < options.devices:
        fastdp.set_virtual_devices(options.devices)

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((LONGEST,), dtype="int64"),
            layers.Embedding(128, 32, mask_zero=True),
            layers.Bidirectional(layers.LSTM(32)),
            layers.Dense(len(MODULES), activation="softmax"),
        ]
    )
    parallel = fastdp.wrap(model, gpus=options.devices)
    parallel.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    tokens, labels = pieces(options.rows)
    history = parallel.fit(
        tokens, labels, epochs=options.epochs, batch_size=options.batch_size, validation_split=0.1, verbose=2
    )
    losses = history.history["loss"]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {history.history['val_accuracy'][-1]:.3f}")


if __name__ == "__main__":
    main()
