"""BatchNormalization: replicas normalize by their rows, or all by the batch; the moving statistics are the batch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import fastdp
from fastdp.shard import split_rows

layers = keras.layers
MOMENTUM = 0.9


def normalized(shape: tuple[int, ...] = (3,), **options: Any) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        x = keras.Input(shape)
        h = layers.BatchNormalization(momentum=MOMENTUM, name="norm", **options)(layers.Dense(4, use_bias=False)(x))
        return keras.Model(x, layers.Dense(1)(layers.Activation("tanh")(h)))

    return build


def only_norm(shape: tuple[int, ...] = (3,), **options: Any) -> keras.Model:
    norm = layers.BatchNormalization(momentum=MOMENTUM, name="norm", **options)
    return keras.Sequential([keras.Input(shape), norm])


def rows_of(n: int, shape: tuple[int, ...] = (3,), seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, *shape)) * 2 + 1).astype("float32")


def statistics(model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    norm = model.get_layer("norm")
    return tuple(keras.ops.convert_to_numpy(v) for v in (norm.moving_mean, norm.moving_variance))


@pytest.mark.parametrize(("gpus", "n"), [(1, 9), (2, 9), (5, 13), (8, 8), (8, 3), (3, 1)])
def test_moving_statistics_are_those_of_the_global_batch(gpus: int, n: int) -> None:
    """The law of total variance over the replicas' rows, by hand."""
    model = only_norm()
    parallel = fastdp.wrap(model, gpus=gpus, check_replicas=True)
    parallel.compile("sgd", "mse")
    mean, variance = np.zeros(3), np.ones(3)
    for step in range(3):
        x = rows_of(n, seed=step)
        parallel.train_on_batch(x, x)
        parts = [x[r.start : r.stop].astype("float64") for r in split_rows(n, gpus)]
        of_batch = sum(len(p) * p.mean(0) for p in parts) / n
        total = sum(len(p) * (p.var(0) + (p.mean(0) - of_batch) ** 2) for p in parts) / n
        mean = mean * MOMENTUM + of_batch * (1 - MOMENTUM)
        variance = variance * MOMENTUM + total * (1 - MOMENTUM)
    found = statistics(model)
    np.testing.assert_allclose(found[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gpus", [2, 3])
def test_each_replica_normalizes_by_its_own_rows(gpus: int) -> None:
    """The loss of one step, by hand: the mean square of the target minus the rows normalized in their sub-batch."""
    parallel = fastdp.wrap(only_norm(epsilon=1e-3), gpus=gpus)
    parallel.compile("sgd", "mse")
    x = rows_of(7)
    loss = parallel.train_on_batch(x, x, return_dict=True)["loss"]
    parts = [x[r.start : r.stop].astype("float64") for r in split_rows(7, gpus)]
    outputs = np.concatenate([(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-3) for p in parts])
    assert loss == pytest.approx(np.mean((outputs - x) ** 2), rel=1e-5)


def test_one_row_per_device_gives_finite_statistics_and_weights() -> None:
    model = normalized()()
    parallel = fastdp.wrap(model, gpus=8, check_replicas=True)
    parallel.compile("sgd", "mse")
    for n in (8, 3, 1):
        assert np.isfinite(parallel.train_on_batch(rows_of(n), rows_of(n, (1,)), return_dict=True)["loss"])
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize("gpus", [2, 5, 8])
@pytest.mark.parametrize("shape", [(3,), (4, 3)])
def test_sync_batch_norm_equals_one_device_over_training(
    gpus: int, shape: tuple[int, ...], equals_one_device: Any
) -> None:
    out = (*shape[:-1], 1)
    data = [{"x": rows_of(n, shape, n), "y": rows_of(n, out, n + 50)} for n in (16, 9, 5, 12, 3) * 4]
    made = lambda: {"optimizer": keras.optimizers.SGD(0.05), "loss": "mse"}  # noqa: E731
    options = {"sync_batch_norm": True}
    equals_one_device(normalized(shape), made, data, gpus=gpus, wrap=options, tolerance=1e-4)


def test_sync_batch_norm_of_images_equals_one_device(equals_one_device: Any) -> None:
    def build() -> keras.Model:
        x = keras.Input((6, 6, 1))
        h = layers.Conv2D(3, 3, use_bias=False)(x)
        h = layers.Activation("relu")(layers.BatchNormalization()(h))
        return keras.Model(x, layers.Dense(1)(layers.GlobalAveragePooling2D()(h)))

    data = [{"x": rows_of(n, (6, 6, 1), n), "y": rows_of(n, (1,), n)} for n in (9, 5, 2)]
    made = lambda: {"optimizer": keras.optimizers.SGD(0.05), "loss": "mse"}  # noqa: E731
    equals_one_device(build, made, data, gpus=3, wrap={"sync_batch_norm": True}, tolerance=1e-4)


def masked() -> keras.Model:
    x = keras.Input((4, 3))
    h = layers.BatchNormalization(momentum=MOMENTUM, name="norm")(layers.Masking()(x))
    return keras.Model(x, layers.Dense(1)(h))


def masked_batch(n: int, seed: int) -> dict[str, Any]:
    x = rows_of(n, (4, 3), seed)
    x[: n // 2, 2:] = 0.0
    x[0] = 0.0
    return {"x": x, "y": rows_of(n, (4, 1), seed)}


def test_sync_batch_norm_of_masked_steps_equals_one_device(equals_one_device: Any) -> None:
    data = [masked_batch(n, n) for n in (9, 5, 4)]
    made = lambda: {"optimizer": keras.optimizers.SGD(0.05), "loss": "mse"}  # noqa: E731
    equals_one_device(masked, made, data, gpus=3, wrap={"sync_batch_norm": True}, tolerance=1e-4)


@pytest.mark.parametrize("sync", [False, True])
def test_moving_statistics_of_masked_steps_leave_the_masked_ones_out(sync: bool) -> None:
    model = masked()
    parallel = fastdp.wrap(model, gpus=3, sync_batch_norm=sync)
    parallel.compile("sgd", "mse")
    batch = masked_batch(7, 1)
    parallel.train_on_batch(**batch)
    kept = batch["x"][np.any(batch["x"] != 0, axis=-1)].astype("float64")
    mean, variance = statistics(model)
    np.testing.assert_allclose(mean, kept.mean(0) * (1 - MOMENTUM), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, MOMENTUM + kept.var(0) * (1 - MOMENTUM), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sync", [False, True])
def test_a_frozen_batch_norm_equals_one_device(sync: bool, equals_one_device: Any) -> None:
    def build() -> keras.Model:
        model = normalized()()
        model.get_layer("norm").trainable = False
        return model

    data = [{"x": rows_of(n, seed=n), "y": rows_of(n, (1,), n)} for n in (9, 2)]
    made = lambda: {"optimizer": keras.optimizers.SGD(0.05), "loss": "mse"}  # noqa: E731
    equals_one_device(build, made, data, gpus=3, wrap={"sync_batch_norm": sync})


def test_a_batch_norm_that_is_applied_twice_updates_its_statistics_twice(equals_one_device: Any) -> None:
    def build() -> keras.Model:
        a, b, norm = keras.Input((3,)), keras.Input((3,)), layers.BatchNormalization(momentum=MOMENTUM)
        return keras.Model([a, b], layers.Dense(1)(norm(a) * norm(b)))

    data = [{"x": [rows_of(n, seed=n), rows_of(n, seed=n + 1)], "y": rows_of(n, (1,), n)} for n in (9, 5)]
    made = lambda: {"optimizer": keras.optimizers.SGD(0.05), "loss": "mse"}  # noqa: E731
    equals_one_device(build, made, data, gpus=3, wrap={"sync_batch_norm": True}, tolerance=1e-4)


def test_layer_and_group_normalization_equal_one_device(equals_one_device: Any) -> None:
    def build() -> keras.Model:
        h = [layers.Dense(4), layers.LayerNormalization(), layers.GroupNormalization(2), layers.UnitNormalization()]
        return keras.Sequential([keras.Input((3,)), *h, layers.Dense(1)])

    data = [{"x": rows_of(n, seed=n), "y": rows_of(n, (1,), n)} for n in (9, 2)]
    equals_one_device(build, lambda: {"optimizer": "sgd", "loss": "mse"}, data, gpus=3)
