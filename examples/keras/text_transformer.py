"""Learns to continue text, a character at a time: a causal transformer in Keras, trained on Python's `textwrap`.

    python examples/keras/text_transformer.py
    python examples/keras/text_transformer.py --devices 8 --epochs 20

The model is saved as a plain Keras file, and text is made by the template, on one device.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap

import numpy as np

import fastdp  # before keras: chooses its torch backend

import keras  # isort: skip

TOKENS, WIDTH, BLOCKS, HEADS = 32, 64, 2, 4
TEXT = inspect.getsource(textwrap)
KINDS = sorted(set(TEXT))


@keras.saving.register_keras_serializable("examples")
class Positions(keras.layers.Layer):
    """Adds a trained vector for each place in the text."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        """One vector for each place."""
        self.places = self.add_weight(shape=shape[1:], initializer="random_normal")

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Tokens (rows, places, width) and their places."""
        return x + self.places


def make_model() -> keras.Model:
    """Characters (rows, TOKENS) to the logits of the next ones (rows, TOKENS, kinds)."""
    layers = keras.layers
    tokens = keras.Input((TOKENS,), dtype="int64")
    x = Positions()(layers.Embedding(len(KINDS), WIDTH)(tokens))
    for _ in range(BLOCKS):
        seen = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(seen, seen, use_causal_mask=True)
        inner = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(inner)
    return keras.Model(tokens, layers.Dense(len(KINDS))(layers.LayerNormalization()(x)))


def continued(model: keras.Model, start: str, length: int) -> str:
    """Text that the model finds likely after `start`, the likeliest character each time."""
    text = [KINDS.index(character) for character in start]
    for _ in range(length):
        seen = text[-TOKENS:]
        padded = np.array([seen + [0] * (TOKENS - len(seen))])
        logits = model.predict_on_batch(padded)[0, len(seen) - 1]
        text.append(int(np.argmax(logits)))
    return "".join(KINDS[number] for number in text)


def main() -> None:
    """Train, save, and continue a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="virtual ones where there are not so many GPUs")
    parser.add_argument("--rows", type=int, default=4000, help="pieces of text")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="global: each device gets its share")
    options = parser.parse_args()
    if len(fastdp.devices()) < options.devices:
        fastdp.set_virtual_devices(options.devices)

    numbers = np.array([KINDS.index(character) for character in TEXT])
    starts = np.random.default_rng(0).integers(0, len(numbers) - TOKENS, (options.rows, 1))
    places = starts + np.arange(TOKENS)

    keras.utils.set_random_seed(0)
    model = make_model()
    parallel = fastdp.wrap(model, gpus=options.devices)
    parallel.compile(
        keras.optimizers.AdamW(2e-3, clipnorm=1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    history = parallel.fit(
        numbers[places], numbers[places + 1], epochs=options.epochs, batch_size=options.batch_size, verbose=2
    )
    losses = history.history["loss"]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    model.save("text.keras")
    print(continued(model, "    def _", 40))


if __name__ == "__main__":
    main()
