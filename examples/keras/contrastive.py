"""Contrastive learning (SimCLR): two noisy views of each digit, and a loss that compares all rows of the global batch.

    python examples/keras/contrastive.py
    python examples/keras/contrastive.py --devices 8 --epochs 50

Such a loss needs the whole batch: on each device's rows alone it would have fewer negatives, and other gradients. A
loss function that returns one number is computed on the merged outputs, and its gradient scattered back. So the losses
of 1 and 8 devices are the same. It needs scikit-learn. Source: Chen et al., "A Simple Framework for Contrastive
Learning of Visual Representations", 2020.
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.datasets import load_digits

import fastdp  # before keras: chooses its torch backend

import keras  # isort: skip

PIXELS, WIDTH, TEMPERATURE = 64, 16, 0.2
ops = keras.ops


def info_nce(_: keras.KerasTensor, views: keras.KerasTensor) -> keras.KerasTensor:
    """One number for the batch: how well each first view finds its second one among those of all rows.

    `views` (rows, 2, WIDTH) have length one. The targets are not used.
    """
    scores = ops.matmul(views[:, 0], ops.transpose(views[:, 1])) / TEMPERATURE
    right = ops.arange(ops.shape(scores)[0])
    forth = keras.losses.sparse_categorical_crossentropy(right, scores, from_logits=True)
    back = keras.losses.sparse_categorical_crossentropy(right, ops.transpose(scores), from_logits=True)
    return ops.mean(forth + back) / 2


def make_encoder() -> keras.Model:
    """Pixels to a vector of length one."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((PIXELS,)),
            layers.Dense(128, activation="relu"),
            layers.Dense(WIDTH),
            layers.UnitNormalization(),
        ]
    )


def accuracy_of_neighbours(encoder: keras.Model, x: np.ndarray, labels: np.ndarray) -> float:
    """How often the nearest other image has the same digit."""
    vectors = encoder.predict(x, verbose=0)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    return float((labels[scores.argmax(axis=1)] == labels).mean())


def main() -> None:
    """Train without labels, and see whether neighbours show the same digit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="virtual ones where there are not so many GPUs")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128, help="global: each device gets its share")
    options = parser.parse_args()
    if len(fastdp.devices()) < options.devices:
        fastdp.set_virtual_devices(options.devices)

    digits = load_digits()
    x = digits.data.astype(np.float32) / 16
    noise = np.random.default_rng(0).normal(0, 0.15, (2, *x.shape)).astype(np.float32)

    keras.utils.set_random_seed(0)
    encoder = make_encoder()
    first, second = keras.Input((PIXELS,)), keras.Input((PIXELS,))
    model = keras.Model([first, second], keras.layers.Lambda(_stacked)([encoder(first), encoder(second)]))
    parallel = fastdp.wrap(model, gpus=options.devices)
    parallel.compile(keras.optimizers.Adam(2e-3), info_nce)
    history = parallel.fit(
        [x + noise[0], x + noise[1]], np.zeros(len(x)), epochs=options.epochs, batch_size=options.batch_size, verbose=2
    )
    losses = history.history["loss"]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"neighbours with the same digit: {accuracy_of_neighbours(encoder, x, digits.target):.3f}")


def _stacked(views: list[keras.KerasTensor]) -> keras.KerasTensor:
    """Two vectors a row (rows, 2, WIDTH)."""
    return ops.stack(views, axis=1)


if __name__ == "__main__":
    main()
