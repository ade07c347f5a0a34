"""Code that asks a tensor which way to go: exact, or refused, also where devices part in a later step only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from own_step import OwnStep

import fastdp

pytestmark = pytest.mark.usefixtures("keras_float64")
layers, ops = keras.layers, keras.ops
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(24, 3)).clip(-2, 2), rng.normal(size=(24, 2))
X[21, 0] = 5.0  # in the last of four batches of six
TOLERANCE = 1e-6  # Keras multiplies matrices of float64 in float32


def by_if(x: Any) -> Any:
    return x * 0.5 if ops.max(ops.abs(x)) > 4.0 else x * 1.0


def by_cond(x: Any) -> Any:
    return ops.cond(ops.max(ops.abs(x)) > 4.0, lambda: x * 0.5, lambda: x * 1.0)


def by_item(x: Any) -> Any:
    return x * 0.5 if (ops.max(ops.abs(x)) > 4.0).item() else x * 1.0


def until_all_are_small(x: Any) -> Any:
    """Each row alone; the number of turns is that of the largest."""
    x = ops.abs(x)
    while ops.any(x > 0.5):
        x = ops.where(x > 0.5, 0.7 * x, x)
    return x


class By(layers.Layer):
    def __init__(self, of: Callable[[Any], Any]) -> None:
        super().__init__()
        self.of = of

    def call(self, x: Any) -> Any:
        return self.of(x)


def made(of: Callable[[Any], Any], *, own: bool = False) -> keras.Model:
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((3,)), By(of), layers.Dense(2)])
    return OwnStep(model) if own else model


def trained(model: Any, template: keras.Model) -> list[Any]:
    model.compile(keras.optimizers.SGD(0.05), "mse")
    losses = model.fit(X, Y, batch_size=6, epochs=2, shuffle=False, verbose=0).history["loss"]
    return [losses, *template.get_weights(), model.predict(X, batch_size=6, verbose=0)]


def same(results: list[Any], expected: list[Any]) -> None:
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


MIXING = [by_if, by_cond, by_item]


@pytest.mark.parametrize("of", MIXING)
def test_devices_that_go_different_ways_in_a_later_step_are_an_error_there(of: Callable[[Any], Any]) -> None:
    template = made(of)
    parallel = fastdp.wrap(template, gpus=3)
    parallel.compile("sgd", "mse")
    for start in (0, 6, 12):
        parallel.train_on_batch(X[start : start + 6], Y[start : start + 6])
    before = template.get_weights()
    with pytest.raises(ValueError, match=r"mixes the rows of the batch.*rows=\"merge\""):
        parallel.train_on_batch(X[18:], Y[18:])
    assert all(np.array_equal(a, b) for a, b in zip(before, template.get_weights(), strict=True))


@pytest.mark.filterwarnings("ignore:fastdp. ")
@pytest.mark.parametrize("of", MIXING)
@pytest.mark.parametrize("how", ["install", "merge", "own step"])
def test_such_models_are_as_on_one_device_where_that_is_asked_for(of: Callable[[Any], Any], how: str) -> None:
    plain, template = made(of, own=how == "own step"), made(of, own=how == "own step")
    expected = trained(plain, plain)
    if how == "merge":
        same(trained(fastdp.wrap(template, gpus=3, rows="merge"), template), expected)
    else:
        fastdp.install(3)
        same(trained(template, template), expected)


@pytest.mark.parametrize("gpus", [2, 3, 8])
@pytest.mark.parametrize("own", [False, True])
def test_a_loop_until_all_rows_are_done_runs_on_all_devices(gpus: int, own: bool) -> None:
    plain, template = made(until_all_are_small, own=own), made(until_all_are_small, own=own)
    expected = trained(plain, plain)
    parallel = fastdp.wrap(template, gpus=gpus)
    same(trained(parallel, template), expected)
    assert all(not entry["one_device"] for entry in parallel.report().calls)
