"""Code that runs in backward (hooks, gradients of one's own): exact where rows stay apart, else refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from own_step import OwnStep

import fastdp

pytestmark = pytest.mark.usefixtures("keras_float64")
layers, ops = keras.layers, keras.ops
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(11, 3)), rng.normal(size=(11, 2))
TOLERANCE = 1e-6  # Keras multiplies matrices of float64 in float32


class Function(torch.autograd.Function):
    """The identity, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.of = of
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.of(gradient), None


def by_custom_gradient(x: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    @ops.custom_gradient
    def identity(x: Any) -> Any:
        return ops.copy(x), lambda *_, upstream: of(upstream)

    return identity(x)


def by_hook(x: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    x = x.clone()
    if x.requires_grad:
        x.register_hook(of)
    return x


WAYS = {"hook": by_hook, "Function": Function.apply, "custom_gradient": by_custom_gradient}
MIXING = {
    "norm": lambda g: g / (1e-3 + g.norm()),
    "mean": lambda g: g - g.mean(0),
    "clip": lambda g: g * min(1.0, 0.01 / float(g.norm() + 1e-12)),
}
BY_ROW = {
    "reversed": lambda g: -0.5 * g,
    "row norm": lambda g: g / (1e-6 + g.norm(dim=1, keepdim=True)),
    "clamp": lambda g: g.clamp(-0.01, 0.01),
}


class Gradient(layers.Layer):
    def __init__(self, way: str, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.way, self.of = way, of

    def call(self, x: Any) -> Any:
        return WAYS[self.way](x, self.of)


def made(way: str, of: Callable[[torch.Tensor], torch.Tensor], *, own: bool = False) -> keras.Model:
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3, "tanh"), Gradient(way, of), layers.Dense(2)])
    return OwnStep(model) if own else model


def trained(model: Any, of: keras.Model) -> list[Any]:
    model.compile(keras.optimizers.SGD(0.05), "mse")
    losses = model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
    return [losses, *of.get_weights()]


def same(results: list[Any], expected: list[Any]) -> None:
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", BY_ROW)
@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_a_gradient_of_each_row_alone_is_as_on_one_device(way: str, kind: str, gpus: int) -> None:
    plain, template = made(way, BY_ROW[kind]), made(way, BY_ROW[kind])
    expected = trained(plain, plain)
    parallel = fastdp.wrap(template, gpus=gpus)
    same(trained(parallel, template), expected)
    assert all(entry["how"] != "one device" for entry in parallel.report())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MIXING)
def test_a_gradient_that_combines_rows_is_an_error_that_names_the_remedies(way: str, kind: str) -> None:
    template = made(way, MIXING[kind])
    before = template.get_weights()
    parallel = fastdp.wrap(template, gpus=3)
    with pytest.raises(ValueError, match=r"backward pass of the model 'sequential.*combines the rows.*rows=\"merge\""):
        trained(parallel, template)
    assert all(np.array_equal(a, b) for a, b in zip(before, template.get_weights(), strict=True))


@pytest.mark.filterwarnings("ignore:fastdp. ")
@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("how", ["run", "merge"])
def test_such_a_model_runs_on_one_device_where_that_is_asked_for(kind: str, how: str) -> None:
    plain, template = made("hook", MIXING[kind]), made("hook", MIXING[kind])
    expected = trained(plain, plain)
    if how == "run":
        fastdp.install(3)
        same(trained(template, template), expected)
    else:
        same(trained(fastdp.wrap(template, gpus=3, rows="merge"), template), expected)


@pytest.mark.parametrize("kind", MIXING)
def test_calls_from_a_step_of_its_own_run_on_one_device(kind: str) -> None:
    plain, template = made("Function", MIXING[kind], own=True), made("Function", MIXING[kind], own=True)
    expected = trained(plain, plain)
    fastdp.install(3)
    with pytest.warns(UserWarning, match="its backward pass combines rows"):
        same(trained(template, template), expected)


@pytest.mark.parametrize("kind", BY_ROW)
def test_calls_from_a_step_of_its_own_are_split_where_rows_stay_apart(kind: str) -> None:
    plain, template = made("Function", BY_ROW[kind], own=True), made("Function", BY_ROW[kind], own=True)
    expected = trained(plain, plain)
    parallel = fastdp.wrap(template, gpus=3)
    same(trained(parallel, template), expected)
    assert all(not entry["one_device"] for entry in parallel.report().calls)
