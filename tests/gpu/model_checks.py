"""Keras models on n devices held to plain Keras on one; the devices come from the caller."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
from torch_checks import full_precision

import fastdp
from fastdp import buffers
from fastdp.data import DeviceDataset
from fastdp.keras.parallel_model import ParallelModel
from fastdp.options import Options

LIMIT = 60.0
layers = keras.layers


def mlp() -> keras.Model:
    inputs = keras.Input((12,))
    x = layers.Dense(16, activation="tanh")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(8, activation="relu")(x)))


def cnn() -> keras.Model:
    """Convolution, BatchNormalization and Dropout with a seed."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same")(inputs)
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    x = layers.Dropout(0.3, seed=5)(layers.MaxPooling2D()(x))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def recurrent() -> keras.Model:
    inputs = keras.Input((6, 5))
    return keras.Model(inputs, layers.Dense(3)(layers.LSTM(7)(inputs)))


def attention() -> keras.Model:
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8, mask_zero=True)(inputs)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


KERAS_MODELS: dict[str, Callable[[], keras.Model]] = {
    "mlp": mlp,
    "cnn": cnn,
    "recurrent": recurrent,
    "attention": attention,
}


def keras_data(name: str, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = KERAS_MODELS[name]().input_shape[1:]
    x = (
        rng.integers(0, 11, (rows, *shape))
        if name == "attention"
        else rng.normal(size=(rows, *shape)).astype("float32")
    )
    return x, rng.integers(0, 3, rows), rng.uniform(0.5, 2, rows).astype("float32")


def a_keras_model_equals_plain_keras(devices: list, name: str, optimizer: str = "sgd", batch_size: int = 12) -> float:
    """Two epochs of 20 rows, so that the last batch is smaller. Returns the largest difference of a weight."""
    x, y, weights = keras_data(name, 20)
    results = []
    with full_precision():
        for parallel in (False, True):
            keras.utils.set_random_seed(3)
            model = KERAS_MODELS[name]()
            if parallel:
                options = Options(timeout=LIMIT, check_replicas=True, sync_batch_norm=True)
                model = ParallelModel(model, devices, options)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
            how = {"batch_size": batch_size, "verbose": 0}
            history = model.fit(x, y, sample_weight=weights, epochs=2, shuffle=False, **how).history
            results.append((history, model.predict(x, **how), model.get_weights()))
    for key in results[0][0]:
        np.testing.assert_allclose(results[1][0][key], results[0][0][key], rtol=1e-4, err_msg=key)
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)
    for a, b in zip(results[1][2], results[0][2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    return max(float(np.abs(a - b).max()) for a, b in zip(results[1][2], results[0][2], strict=True))


def a_placed_model_equals_plain_keras(devices: list, groups: list[tuple[int, ...]]) -> None:
    """A shared LSTM that reads two sequences, each on a device of its own, and state of all kinds on the second."""

    def build() -> keras.Model:
        keras.utils.set_random_seed(3)
        a, b = keras.Input((6, 5)), keras.Input((6, 5))
        shared = layers.LSTM(7)
        left = shared(a)
        with fastdp.device(1):
            x = layers.Dropout(0.3, seed=5)(layers.Dense(5, kernel_regularizer="l2")(b))
            right = layers.BatchNormalization()(shared(x))
        return keras.Model([a, b], layers.Dense(3)(layers.concatenate([left, right])))

    rng = np.random.default_rng(0)
    x = [rng.normal(size=(20, 6, 5)).astype("float32") for _ in range(2)]
    y = rng.normal(size=(20, 3)).astype("float32")
    results = []
    with full_precision():
        for parallel in (False, True):
            template = model = build()
            if parallel:
                chosen = [tuple(devices[i] for i in group) for group in groups]
                options = Options(timeout=LIMIT, check_replicas=True)
                firsts = [group[0] for group in chosen]
                model = ParallelModel(template, firsts, options, device_groups=chosen)
            model.compile("adam", "mse")
            history = model.fit(x, y, batch_size=10, epochs=3, shuffle=False, verbose=0).history
            results.append((history["loss"], model.predict(x, verbose=0), template.get_weights()))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4)
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)
    for new, old in zip(results[1][2], results[0][2], strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-4)


def a_data_set_on_the_devices_equals_arrays(devices: list, name: str, *, sharded: bool = False) -> None:
    """Seven epochs in Keras's shuffled order, with sample weights, on one model; its steps are captured on the way."""
    data = keras_data(name, 20)
    results = []
    with full_precision():
        for resident in (False, True):
            keras.utils.set_random_seed(3)
            options = Options(timeout=LIMIT, check_replicas=True, compile="trace")
            model = ParallelModel(KERAS_MODELS[name](), devices, options)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer="sgd", loss=loss, metrics=["accuracy"])
            names = ("x", "y", "sample_weight")
            held = (
                {"x": DeviceDataset(data, model, sharded=sharded)} if resident else dict(zip(names, data, strict=True))
            )
            history = model.fit(**held, batch_size=12, epochs=7, verbose=0).history
            outputs = model.predict(held["x"], batch_size=12, verbose=0)
            results.append((history, outputs, model.evaluate(**held, batch_size=12, verbose=0)))
            del model, held
    for key, values in results[0][0].items():
        np.testing.assert_allclose(results[1][0][key], values, rtol=1e-4, err_msg=key)
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(results[1][2], results[0][2], rtol=1e-4)


@contextlib.contextmanager
def several_buckets() -> Iterator[None]:
    """Buckets of a few gradients, as a large model has them."""
    plan = buffers.plan_buckets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "plan_buckets", lambda sizes, first, cap: plan(sizes, 256, 2048))
        yield


def recorded_steps_equal_traced_and_eager_ones(
    devices: list, name: str, optimizer: str = "sgd"
) -> list[dict[str, Any]]:
    """Four epochs of two batch shapes: eager, traced, then as CUDA graphs. Returns what the report tells of those."""
    x, y, weights = keras_data(name, 20)
    results: dict[str, Any] = {}
    with full_precision(), several_buckets():
        for how, mode, graph in (("eager", None, None), ("traced", "trace", None), ("graph", "trace", "bucket")):
            keras.utils.set_random_seed(3)
            options = Options(timeout=LIMIT, check_replicas=True, compile=mode, graph=graph)
            model = ParallelModel(KERAS_MODELS[name](), devices, options)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
            run = {"batch_size": 12, "epochs": 4, "shuffle": False, "verbose": 0}
            history = model.fit(x, y, sample_weight=weights, **run).history
            told = list(model.report())
            assert {entry["how"] for entry in told} == {how}, told
            results[how] = history, [np.array(weight) for weight in model.get_weights()], told
            del model
    history, values, told = results["graph"]
    for other, tolerance in (("traced", 1e-6), ("eager", 1e-4)):
        for key in history:
            np.testing.assert_allclose(history[key], results[other][0][key], rtol=tolerance, err_msg=f"{other}: {key}")
        for ours, theirs in zip(values, results[other][1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=10 * tolerance, atol=tolerance, err_msg=other)
    if len(devices) > 1:
        assert min(entry["segments"] for entry in told) > 1
    return told
