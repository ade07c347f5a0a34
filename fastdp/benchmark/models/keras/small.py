"""Small Keras models: a multilayer perceptron, a convolutional network and an LSTM. They end in logits."""

from __future__ import annotations

import keras

layers = keras.layers


def mlp(*, features: int, width: int, classes: int) -> keras.Model:
    """Three dense layers."""
    dense = [layers.Dense(width, activation="relu") for _ in range(2)]
    return keras.Sequential([layers.Input((features,)), *dense, layers.Dense(classes)])


def cnn(*, size: int, channels: int, classes: int) -> keras.Model:
    """Two convolutions of 3x3, each with pooling, and two dense layers."""
    return keras.Sequential(
        [
            layers.Input((size, size, channels)),
            *(layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D()),
            *(layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D()),
            *(layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(classes)),
        ]
    )


def lstm(*, steps: int, features: int, width: int, classes: int) -> keras.Model:
    """An LSTM over a sequence, and a classifier of its last state."""
    return keras.Sequential([layers.Input((steps, features)), layers.LSTM(width), layers.Dense(classes)])
