"""Derivatives in forward mode in Keras models: refused where several devices would run them, exact elsewhere."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import fastdp

layers = keras.layers
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(7, 4)).astype("float32"), rng.normal(size=(7, 3)).astype("float32")


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    fastdp.set_virtual_devices(3)
    yield
    fastdp.uninstall()
    fastdp.set_virtual_devices(0)
    assert forward_ad._current_level == -1


class Slope(layers.Layer):
    """Along one direction."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, layers.Dense(3)

    def build(self, shape: Any) -> None:
        self.inner.build(shape)

    def call(self, x: Any) -> Any:
        ones = torch.ones_like(x)
        if self.how == "jvp":
            return torch.func.jvp(self.value, (x,), (ones,))[1]
        if self.how == "vjp":
            return torch.func.vjp(self.value, x)[1](torch.ones_like(x[:, :3]))[0][:, :3]
        return torch.func.vmap(torch.func.jacfwd(lambda row: self.value(row[None])[0]))(x).sum(2)

    def value(self, x: Any) -> Any:
        return torch.tanh(self.inner(x))


class Model(keras.Model):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.slope = layers.Dense(4), Slope(how)

    def call(self, x: Any) -> Any:
        return self.slope(self.first(x))


class OwnStep(Model):
    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


class SlopeInStep(Model):
    """The step itself differentiates the model."""

    def build(self, shape: Any) -> None:
        self.first.build(shape)
        self.slope.build((None, 4))

    def call(self, x: Any) -> Any:
        return self.slope.inner(self.first(x))

    def train_step(self, data: Any) -> Any:
        x, y = data
        value, slope = torch.func.jvp(lambda rows: self(rows, training=True), (x,), (torch.ones_like(x),))
        self.zero_grad()
        loss = (value - y).square().mean() + slope.square().mean()
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
        return {"loss": loss.detach()}


def made(kind: Callable[[str], keras.Model], how: str) -> keras.Model:
    keras.utils.set_random_seed(1)
    model = kind(how)
    model(X[:1])
    return model


def trained(trainer: Any, model: keras.Model, loss: Any = "mse") -> list[Any]:
    trainer.compile("sgd", loss)
    return [trainer.fit(X, Y, batch_size=4, verbose=0).history["loss"], *model.get_weights()]


def assert_as_plain(found: list[Any], kind: Callable[[str], keras.Model], how: str, loss: Any = "mse") -> None:
    model = made(kind, how)
    for one, other in zip(trained(model, model, loss), found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own decompositions
@pytest.mark.parametrize("how", ["jvp", "jacfwd"])
def test_they_are_an_error_in_a_layer_on_several_devices_and_exact_on_one(how: str) -> None:
    model = made(Model, how)
    with pytest.raises(ValueError, match=r"(?s)Forward-mode derivatives .*torch\.func\.vjp"):
        trained(fastdp.wrap(model, gpus=3), model)
    model = made(Model, how)
    assert_as_plain(trained(fastdp.wrap(model, gpus=1), model), Model, how)
    model = made(Model, how)
    with pytest.warns(UserWarning, match=r"(?s)runs on one device, with all rows.*Forward-mode"):
        found = trained(fastdp.wrap(model, gpus=3, rows="merge"), model)
    assert_as_plain(found, Model, how)


def test_reverse_mode_in_a_layer_is_exact_on_several_devices() -> None:
    model = made(Model, "vjp")
    assert_as_plain(trained(fastdp.wrap(model, gpus=3), model), Model, "vjp")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", [Model, OwnStep, SlopeInStep])
def test_a_script_that_runs_on_several_devices_takes_one_for_them(kind: Callable[[str], keras.Model]) -> None:
    fastdp.install(3)
    model = made(kind, "jvp")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = trained(model, model)
    assert any(
        "one device" in str(one.message) and re.search("Forward-mode|torch.func", str(one.message)) for one in said
    )
    fastdp.uninstall()
    assert_as_plain(found, kind, "jvp")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_a_loss_of_the_merged_outputs_may_use_them_since_the_other_devices_wait() -> None:
    def loss(y: Any, y_pred: Any) -> Any:
        return torch.func.jvp(lambda p: (p - y) ** 2, (y_pred,), (torch.ones_like(y_pred),))[1].square().mean(-1)

    model = made(Model, "vjp")
    assert_as_plain(trained(fastdp.wrap(model, gpus=3), model, loss), Model, "vjp", loss)
