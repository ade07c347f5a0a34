"""Image classifiers in Keras: ResNet50 and Xception of keras.applications, and ViT. They end in logits."""

from __future__ import annotations

import keras

from fastdp.benchmark.models.keras.attention import block, positions_of

layers, ops = keras.layers, keras.ops


def resnet50(*, size: int, classes: int) -> keras.Model:
    """keras.applications' ResNet50, without weights."""
    return keras.applications.ResNet50(
        weights=None, input_shape=(size, size, 3), classes=classes, classifier_activation=None
    )


def xception(*, size: int, classes: int) -> keras.Model:
    """keras.applications' Xception, without weights."""
    return keras.applications.Xception(
        weights=None, input_shape=(size, size, 3), classes=classes, classifier_activation=None
    )


def vit(*, size: int, patch: int, width: int, depth: int, heads: int, wide: int, classes: int) -> keras.Model:
    """The vision transformer (Dosovitskiy et al., 2021): patches as tokens, with a class token before them.

    The class token and the positions are embeddings of numbers that are made from the patches, so that all layers are
    Keras's own.
    """
    images = layers.Input((size, size, 3))
    count = (size // patch) ** 2
    tokens = layers.Reshape((count, width))(layers.Conv2D(width, patch, patch)(images))
    first = ops.zeros_like(tokens[:, :1, 0], dtype="int32")
    x = layers.Concatenate(axis=1)([layers.Embedding(1, width, embeddings_initializer="zeros")(first), tokens])
    places = layers.Embedding(count + 1, width, embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02))
    x = x + places(positions_of(x[:, :, 0]))
    for _ in range(depth):
        x = block(x, width, heads, wide)
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    return keras.Model(images, layers.Dense(classes)(x[:, 0]))
