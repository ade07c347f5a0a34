"""Hooks of a script's on the weights of a Keras model see the gradient of the whole batch, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch

import fastdp

pytestmark = pytest.mark.usefixtures("keras_float64")
layers = keras.layers
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(11, 3)), rng.normal(size=(11, 2))
TOLERANCE = 1e-6  # Keras multiplies matrices of float64 in float32


def clip_by_norm(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * min(1.0, 0.01 / float(gradient.norm()))


def halve_in_place(gradient: torch.Tensor) -> None:
    gradient.mul_(0.5)


def shrink(weight: torch.Tensor) -> None:
    assert weight.grad is not None
    weight.grad.mul_(0.1)


class Counts:
    """Shrinks each further gradient more."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return gradient / self.calls


HOOKS: dict[str, Callable[[], Any]] = {
    "clip": lambda: clip_by_norm,
    "in place": lambda: halve_in_place,
    "count": Counts,
}


def trained(gpus: int | None, hook: Any, accumulation: int | None = None, *, after: bool = False) -> list[Any]:
    keras.utils.set_random_seed(2)
    template = keras.Sequential([keras.Input((3,)), layers.Dense(3, "tanh"), layers.Dense(2)])
    model = template if gpus is None else fastdp.wrap(template, gpus=gpus)
    kernel = template.layers[0].kernel.value
    if after:
        kernel.register_post_accumulate_grad_hook(shrink)
    else:
        kernel.register_hook(hook)
    model.compile(keras.optimizers.Adam(0.05, gradient_accumulation_steps=accumulation), "mse")
    losses = model.fit(X, Y, batch_size=4, epochs=3, shuffle=False, verbose=0).history["loss"]
    return [losses, *template.get_weights(), getattr(hook, "calls", 0), kernel.grad.numpy().copy()]


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("accumulation", [None, 2])
@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_a_hook_on_a_weight_sees_the_gradient_of_the_whole_batch(
    name: str, accumulation: int | None, gpus: int
) -> None:
    expected = trained(None, HOOKS[name](), accumulation)
    for one, other in zip(trained(gpus, HOOKS[name](), accumulation), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("gpus", [1, 3])
def test_a_hook_after_accumulation_counts_too(gpus: int) -> None:
    expected = trained(None, None, after=True)
    for one, other in zip(trained(gpus, None, after=True), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_hook_that_is_put_and_removed_between_steps_is_followed() -> None:
    def steps(gpus: int | None) -> list[Any]:
        keras.utils.set_random_seed(2)
        template = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
        model = template if gpus is None else fastdp.wrap(template, gpus=gpus)
        model.compile("sgd", "mse")
        found = []
        for hooked in (False, True, False):
            handle = template.layers[0].kernel.value.register_hook(lambda g: 0.0 * g) if hooked else None
            model.train_on_batch(X, Y)
            found.append(template.layers[0].kernel.numpy())
            if handle is not None:
                handle.remove()
        return found

    for one, other in zip(steps(3), steps(None), strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_sharded_optimizer_refuses_hooks_on_weights() -> None:
    template = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    template.layers[0].kernel.value.register_hook(clip_by_norm)
    parallel = fastdp.wrap(template, gpus=2, shard_optimizer=True)
    parallel.compile("sgd", "mse")
    with pytest.raises(ValueError, match="weights have hooks"):
        parallel.train_on_batch(X, Y)
