"""The Keras forms of the built-in models, on any backend. They end in logits."""

from __future__ import annotations

from collections.abc import Callable

import keras

layers = keras.layers
CLASSES = 10


def mlp() -> keras.Model:
    """784-512-512-10."""
    dense = [layers.Dense(512, activation="relu") for _ in range(2)]
    return keras.Sequential([layers.Input((784,)), *dense, layers.Dense(CLASSES, dtype="float32")])


BUILDERS: dict[str, Callable[[], keras.Model]] = {"mlp": mlp}
