"""The models of the comparison in Keras, on any backend. They end in logits."""

from __future__ import annotations

from collections.abc import Callable

import keras

layers = keras.layers
CLASSES = 10


def mlp() -> keras.Model:
    """784-512-512-10."""
    dense = [layers.Dense(512, activation="relu") for _ in range(2)]
    return keras.Sequential([layers.Input((784,)), *dense, layers.Dense(CLASSES)])


def cnn() -> keras.Model:
    """Two convolutions and two dense layers on 28x28 images."""
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(CLASSES),
        ]
    )


def resnet50() -> keras.Model:
    """keras.applications' ResNet50 on 64x64 images."""
    return keras.applications.ResNet50(
        weights=None, input_shape=(64, 64, 3), classes=CLASSES, classifier_activation=None
    )


def lstm() -> keras.Model:
    """LSTM(64) over 80 steps of 32 features."""
    return keras.Sequential([layers.Input((80, 32)), layers.LSTM(64), layers.Dense(CLASSES)])


def xception() -> keras.Model:
    """keras.applications' Xception on 96x96 images."""
    return keras.applications.Xception(
        weights=None, input_shape=(96, 96, 3), classes=CLASSES, classifier_activation=None
    )


def transformer() -> keras.Model:
    """Two encoder blocks, 128 wide, 4 heads, on 64 tokens of a vocabulary of 1,000."""
    inputs = layers.Input((64,), dtype="int32")
    x = layers.Embedding(1000, 128)(inputs)
    for _ in range(2):
        x = layers.LayerNormalization(epsilon=1e-5)(x + layers.MultiHeadAttention(4, 32)(x, x))
        wide = layers.Dense(512, activation="relu")(x)
        x = layers.LayerNormalization(epsilon=1e-5)(x + layers.Dense(128)(wide))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x)))


BUILDERS: dict[str, Callable[[], keras.Model]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet50": resnet50,
    "lstm": lstm,
    "xception": xception,
    "transformer": transformer,
}
