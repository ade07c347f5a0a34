"""Models whose captured steps are recorded as CUDA graphs, and how they are trained."""

from __future__ import annotations

import keras
import numpy as np

from fastdp.keras.parallel_model import ParallelModel
from fastdp.options import Options

L = keras.layers
LIMIT = 20.0


def dense():
    return [
        keras.Input((6,)),
        L.Dense(8, "tanh", kernel_regularizer="l2"),
        L.Dropout(0.4, seed=1),
        L.Dense(8, "relu"),
        L.GaussianNoise(0.1),
        L.Dense(3, "softmax"),
    ]


def normalized():
    return [keras.Input((6,)), L.Dense(8), L.BatchNormalization(), L.Activation("relu"), L.Dense(3, "softmax")]


def convolutional():
    return [
        keras.Input((6,)), L.Reshape((6, 1)), L.Conv1D(4, 3, padding="same"), L.MaxPooling1D(2), L.Flatten(),
        L.Dense(3, "softmax"),
    ]  # fmt: skip


def unused():
    """A trainable weight that no step uses."""
    layers = dense()
    layers[1].add_weight(shape=(5,), name="unused")
    return layers


def embedded():
    return [keras.Input((6,)), L.Discretization([-1.0, 0.0, 1.0]), L.Embedding(5, 4), L.LSTM(4), L.Dense(3, "softmax")]


def batches(count, sizes=(8, 8, 8, 7)):
    generator = np.random.default_rng(0)
    for i in range(count):
        rows = sizes[i % len(sizes)]
        labels = generator.integers(0, 3, rows)
        yield generator.normal(size=(rows, 6)).astype("float32"), np.eye(3, dtype="float32")[labels]


def wrapped(layers, devices, graph="auto", compile="trace", optimizer=None, **options):
    keras.utils.set_random_seed(5)
    chosen = Options(timeout=LIMIT, compile=compile, graph=graph, check_replicas=True, **options)
    parallel = ParallelModel(keras.Sequential(layers()), devices, chosen)
    optimizer = optimizer() if optimizer else keras.optimizers.Adam(0.01)
    parallel.compile(optimizer, "categorical_crossentropy", metrics=["accuracy"])
    return parallel


def train(parallel, count=12, sizes=(8, 8, 8, 7)):
    losses = [parallel.train_on_batch(x, y) for x, y in batches(count, sizes)]
    return losses, [np.array(weight) for weight in parallel.get_weights()]


def hows(parallel):
    return {entry["how"] for entry in parallel.report()}
