"""A variational autoencoder of handwritten digits: a layer draws noise and adds its divergence by `add_loss`.

    python examples/keras/vae.py
    python examples/keras/vae.py --devices 8 --epochs 50

What a layer adds is a mean over its rows, and counts as that of the whole batch on any number of devices. The noise is
drawn by the row of the whole batch, so 1 and 8 devices give the same losses. It needs scikit-learn.
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.datasets import load_digits

import fastdp  # before keras: chooses its torch backend

import keras  # isort: skip

PIXELS, LATENT = 64, 4


class Sampling(keras.layers.Layer):
    """Draws from the normal distribution that the encoder names, and adds its divergence from the standard one."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, inputs: tuple[keras.KerasTensor, keras.KerasTensor]) -> keras.KerasTensor:
        """Means and logarithms of variances, each (rows, LATENT), to a draw (rows, LATENT)."""
        mean, log_variance = inputs
        ops = keras.ops
        divergence = 0.5 * ops.sum(mean**2 + ops.exp(log_variance) - 1 - log_variance, axis=1)
        self.add_loss(ops.mean(divergence))
        return mean + keras.random.normal(ops.shape(mean), seed=self.seeds) * ops.exp(0.5 * log_variance)


def reconstruction(pixels: keras.KerasTensor, decoded: keras.KerasTensor) -> keras.KerasTensor:
    """The cross-entropy of each image (rows,)."""
    return PIXELS * keras.losses.binary_crossentropy(pixels, decoded)


def main() -> None:
    """Train an encoder and a decoder, and make images from noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="virtual ones where there are not so many GPUs")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="global: each device gets its share")
    options = parser.parse_args()
    if len(fastdp.devices()) < options.devices:
        fastdp.set_virtual_devices(options.devices)

    keras.utils.set_random_seed(0)
    layers = keras.layers
    images = keras.Input((PIXELS,))
    hidden = layers.Dense(64, activation="relu")(images)
    code = Sampling()([layers.Dense(LATENT)(hidden), layers.Dense(LATENT)(hidden)])
    decoder = keras.Sequential([layers.Dense(64, activation="relu"), layers.Dense(PIXELS, activation="sigmoid")])
    model = keras.Model(images, decoder(code))

    parallel = fastdp.wrap(model, gpus=options.devices)
    parallel.compile(keras.optimizers.Adam(2e-3), reconstruction)
    x = load_digits().data.astype(np.float32) / 16
    history = parallel.fit(x, x, epochs=options.epochs, batch_size=options.batch_size, verbose=2)
    losses = history.history["loss"]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    made = decoder.predict(np.random.default_rng(0).normal(size=(16, LATENT)).astype(np.float32), verbose=0)
    print(f"made {len(made)} images, pixels from {made.min():.2f} to {made.max():.2f}")


if __name__ == "__main__":
    main()
