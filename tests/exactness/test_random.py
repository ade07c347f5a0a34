"""Random layers: draws are indexed by the global row, so any number of devices draws the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import fastdp

layers = keras.layers


def rows_of(n: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype("float32")


# Layers by (seed), and the shape of their input.
RANDOM: dict[str, tuple[Callable[[Any], keras.layers.Layer], tuple[int, ...]]] = {
    "Dropout": (lambda seed: layers.Dropout(0.4, seed=seed), (6,)),
    "Dropout with a noise shape": (lambda seed: layers.Dropout(0.4, noise_shape=(None, 1, 2), seed=seed), (3, 2)),
    "AlphaDropout": (lambda seed: layers.AlphaDropout(0.3, seed=seed), (6,)),
    "GaussianDropout": (lambda seed: layers.GaussianDropout(0.3, seed=seed), (6,)),
    "GaussianNoise": (lambda seed: layers.GaussianNoise(0.3, seed=seed), (6,)),
    "SpatialDropout1D": (lambda seed: layers.SpatialDropout1D(0.4, seed=seed), (4, 3)),
    "SpatialDropout2D": (lambda seed: layers.SpatialDropout2D(0.4, seed=seed), (3, 3, 2)),
    "LSTM": (lambda seed: layers.LSTM(4, dropout=0.3, recurrent_dropout=0.3, seed=seed), (5, 3)),
    "GRU": (lambda seed: layers.GRU(4, dropout=0.3, recurrent_dropout=0.3, seed=seed), (5, 3)),
    "SimpleRNN": (lambda seed: layers.SimpleRNN(4, dropout=0.3, seed=seed), (5, 3)),
    "MultiHeadAttention": (
        lambda seed: SelfAttention(layers.MultiHeadAttention(2, 2, dropout=0.3, seed=seed)),
        (4, 3),
    ),
}


class SelfAttention(keras.layers.Layer):
    def __init__(self, attention: keras.layers.Layer) -> None:
        super().__init__()
        self.attention = attention

    def build(self, shape: Any) -> None:
        self.attention.build(shape, shape)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.attention(x, x, training=training)


def build(name: str, seed: Any) -> Callable[[], keras.Model]:
    make, shape = RANDOM[name]
    return lambda: keras.Sequential([keras.Input(shape), make(seed), layers.Flatten(), layers.Dense(1)])


def batches(name: str) -> list[dict[str, Any]]:
    return [{"x": rows_of(n, RANDOM[name][1], n), "y": rows_of(n, (1,), n)} for n in (9, 8, 3, 1)]


def settings() -> dict[str, Any]:
    return {"optimizer": keras.optimizers.SGD(0.05), "loss": "mse"}


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("name", RANDOM)
def test_seeded_layer_draws_as_plain_keras(name: str, gpus: int, equals_one_device: Any) -> None:
    equals_one_device(build(name, 11), settings, batches(name), gpus=gpus)


@pytest.mark.parametrize("name", RANDOM)
def test_unseeded_layer_draws_the_same_on_any_number_of_devices(name: str, twins: Any, same: Any) -> None:
    recipe = twins(build(name, None), settings)
    one, two, eight = (recipe.by_batches(gpus, batches(name)) for gpus in (1, 2, 8))
    same(one, two)
    same(one, eight)


def test_the_same_seed_repeats_a_run_bit_for_bit_and_another_does_not(twins: Any) -> None:
    runs = [twins(build("Dropout", None), settings, seed=seed).by_batches(3, batches("Dropout")) for seed in (1, 1, 2)]
    first, again, other = (list(run.arrays.values()) for run in runs)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def masks(gpus: int, rows: int, steps: int) -> np.ndarray:
    """The zeros that dropout makes of ones, by step and row."""
    keras.utils.set_random_seed(0)
    seen: list[np.ndarray] = []

    class Seen(keras.metrics.Metric):
        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            seen.append(np.array(keras.ops.convert_to_numpy(y_pred)) == 0)

        def result(self) -> Any:
            return 0.0

    model = keras.Sequential([keras.Input((16,)), layers.EinsumDense("ab,b->ab", (16,)), layers.Dropout(0.5)])
    model.layers[0].set_weights([np.ones(16)])
    parallel = fastdp.wrap(model, gpus=gpus)
    parallel.compile(keras.optimizers.SGD(0.0), "mse", metrics=[Seen(name="seen")])
    x = np.ones((rows, 16), "float32")
    seen.clear()
    for _ in range(steps):
        parallel.train_on_batch(x, x)
    return np.stack(seen[-steps:])


def test_replicas_draw_different_masks_and_so_do_steps() -> None:
    drawn = masks(4, 8, 3)
    flat = {row.tobytes() for step in drawn for row in step}
    assert len(flat) == 24
    assert 0.3 < drawn.mean() < 0.7


def test_masks_are_the_same_for_1_2_and_8_devices() -> None:
    one = masks(1, 9, 2)
    np.testing.assert_array_equal(one, masks(2, 9, 2))
    np.testing.assert_array_equal(one, masks(8, 9, 2))


class Sampling(keras.layers.Layer):
    """Draws in test and predict too."""

    def __init__(self, seed: Any = None) -> None:
        super().__init__()
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, x: Any) -> Any:
        return x + keras.random.normal(keras.ops.shape(x), seed=self.generator)


def test_a_sampling_layer_draws_in_train_test_and_predict_as_plain_keras(equals_one_device: Any) -> None:
    make = lambda: keras.Sequential([keras.Input((3,)), Sampling(5), layers.Dense(1)])  # noqa: E731
    data = [{"x": rows_of(n, (3,), n), "y": rows_of(n, (1,), n)} for n in (9, 8, 2)]
    equals_one_device(make, settings, data, gpus=3)


def test_two_predicts_of_a_sampling_layer_draw_different_noise() -> None:
    parallel = fastdp.wrap(keras.Sequential([keras.Input((3,)), Sampling(5)]), gpus=3)
    x = np.zeros((7, 3), "float32")
    assert not np.array_equal(parallel.predict(x, verbose=0), parallel.predict(x, verbose=0))
