"""What a script changes between two steps may change how rows count: in the next step it does so on all devices."""

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
X, Y = rng.normal(size=(11, 3)), rng.normal(size=(11, 2))
TOLERANCE = 1e-6  # Keras multiplies matrices of float64 in float32
FLAGS = {"on": False}


@pytest.fixture(autouse=True)
def _off() -> None:
    FLAGS["on"] = False


class Changing(layers.Layer):
    """Does something else once it is `on`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.on = how, False

    def build(self, shape: Any) -> None:
        self.total = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        on = FLAGS["on"] if self.how == "global" else self.on
        if self.how in ("mixes", "global") and on:
            return x - ops.mean(x, 0)
        if self.how == "hook" and on and x.requires_grad:
            x = x * 1.0
            x.register_hook(lambda g: g - g.mean(0))
        if self.how == "sum":
            self.add_loss(0.01 * (ops.sum(x**2) if on else ops.mean(x**2)))
        if self.how == "second term":
            self.add_loss(0.01 * ops.mean(x**2))
            if on:
                self.add_loss(0.01 * ops.sum(ops.abs(x)))
        if self.how == "assigns":
            self.total.assign_add(ops.sum(x**2) if on else ops.mean(x**2))
        return x * 1.0


class At(keras.callbacks.Callback):
    """Changes the model before the second epoch."""

    def __init__(self, change: Callable[[], Any]) -> None:
        super().__init__()
        self.change = change

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            self.change()


def center(x: Any) -> Any:
    return x - ops.mean(x, 0)


def switch(model: keras.Model) -> None:
    FLAGS["on"] = model.layers[1].on = True


def known() -> keras.Model:
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(3, "tanh"), layers.Softmax(), layers.Dense(2, name="last")]
    )


def own(how: str) -> Callable[[], keras.Model]:
    return lambda: keras.Sequential([keras.Input((3,)), layers.Dense(3, "tanh"), Changing(how), layers.Dense(2)])


MIXING: dict[str, tuple[Callable[[], keras.Model], Callable[[keras.Model], Any]]] = {
    **{how: (own(how), switch) for how in ("mixes", "global", "hook")},
    "activation": (known, lambda model: setattr(model.layers[0], "activation", center)),
    "axis": (known, lambda model: setattr(model.layers[1], "axis", 0)),
    "forward hook": (known, lambda model: model.layers[0].register_forward_hook(lambda _, __, out: center(out))),
}
COMBINED: dict[str, tuple[Callable[[], keras.Model], Callable[[keras.Model], Any]]] = {
    **{how: (own(how), switch) for how in ("sum", "second term", "assigns")},
    "relu": (known, lambda model: setattr(model.layers[0], "activation", keras.activations.relu)),
    "regularizer": (known, lambda model: setattr(model.layers[0], "activity_regularizer", keras.regularizers.L2(0.1))),
    "constraint": (known, lambda model: setattr(model.layers[0].kernel, "constraint", keras.constraints.UnitNorm())),
}


def trained(model: Any, template: keras.Model, change: Callable[[keras.Model], Any]) -> list[Any]:
    inner = template.inner if isinstance(template, OwnStep) else template
    model.compile(keras.optimizers.SGD(0.05, momentum=0.5), "mse")
    callback = At(lambda: change(inner))
    history = model.fit(X, Y, batch_size=4, epochs=3, shuffle=False, verbose=0, callbacks=[callback]).history
    FLAGS["on"] = False
    return [history["loss"], *template.get_weights(), *(slot.numpy() for slot in model.optimizer.variables)]


def made(make: Callable[[], keras.Model], *, step: bool = False) -> keras.Model:
    keras.utils.set_random_seed(2)
    return OwnStep(make()) if step else make()


def same(results: list[Any], expected: list[Any]) -> None:
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_a_change_that_devices_can_follow_is_exact(name: str, gpus: int) -> None:
    make, change = COMBINED[name]
    plain, template = made(make), made(make)
    expected = trained(plain, plain, change)
    same(trained(fastdp.wrap(template, gpus=gpus), template, change), expected)


@pytest.mark.parametrize("name", MIXING)
def test_a_change_after_which_rows_meet_is_an_error_in_the_next_step(name: str) -> None:
    make, change = MIXING[name]
    template = made(make)
    parallel = fastdp.wrap(template, gpus=3)
    with pytest.raises(ValueError, match=r"(mixes the rows|combines the rows).*rows=\"merge\""):
        trained(parallel, template, change)


@pytest.mark.filterwarnings("ignore:fastdp. ")
@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("how", ["install", "merge"])
def test_such_a_change_is_as_on_one_device_where_that_is_asked_for(name: str, how: str) -> None:
    make, change = MIXING[name]
    plain, template = made(make), made(make)
    expected = trained(plain, plain, change)
    if how == "merge":
        same(trained(fastdp.wrap(template, gpus=3, rows="merge"), template, change), expected)
    else:
        fastdp.install(3)
        same(trained(template, template, change), expected)


@pytest.mark.filterwarnings("ignore:fastdp. ")
@pytest.mark.parametrize("name", ["mixes", "global", "hook", "sum", "second term", "assigns"])
def test_calls_from_a_step_of_its_own_follow_the_change(name: str) -> None:
    make, change = {**MIXING, **COMBINED}[name]
    plain, template = made(make, step=True), made(make, step=True)
    expected = trained(plain, plain, change)
    fastdp.install(3)
    same(trained(template, template, change), expected)
