"""Layers that do something else for many rows than for few are found before the first step of each number of rows."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import fastdp

layers, ops = keras.layers, keras.ops
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(21, 3)).astype("float32"), rng.normal(size=(21, 1)).astype("float32")


class Many(layers.Layer):
    """Doubles its input where there are more than `most` rows, or the rows behind these."""

    def __init__(self, how: str, most: int = 4) -> None:
        super().__init__()
        self.how, self.most = how, most

    def call(self, x: Any) -> Any:
        if self.how == "all":
            return x * (2.0 if x.shape[0] > self.most else 1.0)
        place = ops.cumsum(ops.ones_like(x[:, :1]), axis=0)
        return x * ops.where(place > self.most, 2.0, 1.0)


class OwnStep(keras.Model):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.many, self.last = layers.Dense(4), Many(how), layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.last(self.many(self.first(x)))

    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


def made(how: str, *, own_step: bool = False) -> keras.Model:
    keras.utils.set_random_seed(1)
    if not own_step:
        return keras.Sequential([keras.Input((3,)), layers.Dense(4), Many(how), layers.Dense(1)])
    model = OwnStep(how)
    model(X[:1])
    return model


def everything(trainer: Any, model: keras.Model) -> list[Any]:
    trainer.compile("sgd", "mse")
    losses = trainer.fit(X, Y, batch_size=9, epochs=2, shuffle=False, verbose=0).history["loss"]
    tested = trainer.evaluate(X, Y, batch_size=9, verbose=0)
    return [losses, tested, trainer.predict(X, batch_size=9, verbose=0), *model.get_weights()]


def assert_same(found: list[Any], how: str, **options: Any) -> None:
    model = made(how, **options)
    for one, other in zip(everything(model, model), found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["all", "behind"])
def test_they_are_an_error_before_anything_has_changed(how: str) -> None:
    model = made(how)
    before = model.get_weights()
    parallel = fastdp.wrap(model, gpus=3)
    for _ in range(2):  # the second time too
        with pytest.raises(ValueError, match=r"something else for 9 rows.*not for three.*gpus"):
            everything(parallel, model)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.filterwarnings("ignore:fastdp. ")
@pytest.mark.parametrize("way", ["merge", "run", "own step"])
@pytest.mark.parametrize("how", ["all", "behind"])
def test_they_run_on_one_device_where_that_is_asked_for(how: str, way: str) -> None:
    model = made(how, own_step=way == "own step")
    trainer = fastdp.wrap(model, gpus=3, rows="merge") if way == "merge" else model
    if way != "merge":
        fastdp.install(3)
    found = everything(trainer, model)
    fastdp.uninstall()
    assert_same(found, how, own_step=way == "own step")


def test_a_smaller_last_batch_is_looked_at_by_itself() -> None:
    parallel = fastdp.wrap(keras.Sequential([keras.Input((3,)), layers.Dense(4), Many("all", 3)]), gpus=8)
    parallel.compile("sgd", "mse")
    parallel.train_on_batch(X[:3], Y[:3])  # no difference yet
    with pytest.raises(ValueError, match="something else for 5 rows"):
        parallel.train_on_batch(X[:5], Y[:5])


@pytest.mark.filterwarnings("ignore:fastdp. ")
@pytest.mark.parametrize("own_step", [False, True])
def test_each_of_many_numbers_of_rows_is_looked_at(own_step: bool) -> None:
    def losses(trainer: Any, model: keras.Model) -> list[Any]:
        trainer.compile("sgd", "mse")
        (model.many if own_step else model.layers[1]).most = 15
        return [trainer.train_on_batch(X[:rows], Y[:rows]) for rows in (4, 5, 6, 7, 8, 9, 10, 17)]

    plain, model = made("all", own_step=own_step), made("all", own_step=own_step)
    expected = losses(plain, plain)
    fastdp.install(3)
    try:
        np.testing.assert_allclose(losses(model, model), expected, rtol=1e-5)
    finally:
        fastdp.uninstall()
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
