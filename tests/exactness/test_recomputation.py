"""Model code that runs again in backward (`keras.remat`, `torch.utils.checkpoint`) trains as the same model without it.

Plain Keras itself does not: it moves seeds and statistics twice, drops other units in backward than in forward, and
fails where a layer inside learns from its caller that it trains. So what a model is compared with is the model without
checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastdp

layers = keras.layers

RUNS: dict[str, Callable[[Any, Any], Any] | None] = {
    "remat": lambda body, x: keras.remat(body)(x),
    "not reentrant": lambda body, x: checkpoint(body, x, use_reentrant=False),
    "reentrant": lambda body, x: checkpoint(body, x, use_reentrant=True),
    "nested": lambda body, x: keras.remat(lambda x: x + keras.remat(body)(x) - x)(x),
}


class Block(keras.layers.Layer):
    """A dense layer and another one, together in a checkpoint."""

    def __init__(self, inner: keras.layers.Layer, how: str | None) -> None:
        super().__init__()
        self.inner, self.how, self.dense = inner, how, layers.Dense(4, activation="tanh")

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.inner.build(shape)

    def body(self, x: Any) -> Any:
        return self.inner(self.dense(x))

    def call(self, x: Any) -> Any:
        run = RUNS[self.how] if self.how and x.device.type != "meta" else None
        return run(self.body, x) if run is not None else self.body(x)


class Counting(keras.layers.Layer):
    """Adds a loss and noise, counts its calls in a variable, and has a metric."""

    def build(self, shape: Any) -> None:
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")
        self.mean = keras.metrics.Mean(name="mean")

    def call(self, x: Any) -> Any:
        self.calls.assign(self.calls + 1.0)
        self.mean.update_state(keras.ops.mean(x, axis=-1))
        self.add_loss(0.1 * keras.ops.mean(x**2))
        return x + 0.1 * keras.random.normal(keras.ops.shape(x)) * x


class TorchDropout(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        return torch.nn.functional.dropout(x, 0.5) * torch.rand(4, device=x.device)


INNER: dict[str, Callable[[], keras.layers.Layer]] = {
    "Dropout": lambda: layers.Dropout(0.5),
    "Dropout with a seed": lambda: layers.Dropout(0.5, seed=5),
    "GaussianNoise": lambda: layers.GaussianNoise(0.5),
    "BatchNormalization": lambda: layers.BatchNormalization(momentum=0.5),
    "SpectralNormalization": lambda: layers.SpectralNormalization(layers.Dense(4)),
    "everything": Counting,
    "torch's own draws": TorchDropout,
}


def batch(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 4)).astype("float32"), rng.normal(size=(n, 1)).astype("float32")


class OwnStep(keras.Model):
    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = (keras.ops.convert_to_tensor(part) for part in data[:2])
        self.zero_grad()
        loss = keras.ops.mean((self(x, training=True) - y) ** 2)
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in self.trainable_variables], self.trainable_variables)
        return {"loss": loss}


def trained(
    inner: str, how: str | None, gpus: int | None, kind: type = keras.Model, **options: Any
) -> list[np.ndarray]:
    """Losses of some steps, and all variables, of a model with a block."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    model = kind(inputs, layers.Dense(1)(Block(INNER[inner](), how)(layers.Dense(4)(inputs))))
    model_or_parallel = model if gpus is None else fastdp.wrap(model, gpus=gpus, check_replicas=True, **options)
    model_or_parallel.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
    x, y = batch(9)
    losses = [model_or_parallel.train_on_batch(x, y, return_dict=True)["loss"] for _ in range(4)]
    return [np.asarray(losses), *(np.asarray(keras.ops.convert_to_numpy(v)) for v in model.variables)]


def assert_same(one: list[np.ndarray], many: list[np.ndarray]) -> None:
    assert len(one) == len(many)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


def sync(inner: str) -> dict[str, Any]:
    return {"sync_batch_norm": True} if inner == "BatchNormalization" else {}


# Plain Keras draws all of an unseeded dropout from torch's generator, fastdp one number.
def reference(inner: str, kind: type = keras.Model) -> list[np.ndarray]:
    return trained(inner, None, 1 if inner == "Dropout" else None, kind)


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("inner", INNER)
def test_a_checkpoint_changes_nothing(inner: str, how: str) -> None:
    expected = reference(inner)
    for gpus in (1, 2, 8):  # of 9 rows, so that some replicas have one
        assert_same(expected, trained(inner, how, gpus, compile=None, **sync(inner)))


@pytest.mark.parametrize("how", ["remat", "reentrant"])
@pytest.mark.parametrize("inner", ["Dropout", "Dropout with a seed", "GaussianNoise", "everything"])
def test_a_captured_step_with_a_checkpoint_is_right(inner: str, how: str) -> None:
    assert_same(reference(inner), trained(inner, how, 2, compile="trace"))


@pytest.mark.parametrize("inner", ["Dropout", "Dropout with a seed", "GaussianNoise", "SpectralNormalization"])
def test_a_checkpoint_in_a_step_of_the_models_own_changes_nothing(inner: str) -> None:
    expected = reference(inner, OwnStep)
    for how in ("remat", "reentrant"):
        assert_same(expected, trained(inner, how, 2, OwnStep))


def test_batch_normalization_by_replicas_moves_its_statistics_once_with_rows_of_one() -> None:
    expected = trained("BatchNormalization", None, 8)
    found = trained("BatchNormalization", "remat", 8)
    assert all(np.isfinite(values).all() for values in found)
    assert_same(expected, found)


@pytest.mark.parametrize("mode", ["full", "activations"])
def test_a_remat_scope_changes_nothing(mode: str) -> None:
    def run(scope: bool, gpus: int | None) -> list[np.ndarray]:
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(3)

        def build() -> keras.Model:
            inputs = keras.Input((4,))
            x = layers.Dense(4, activation="relu")(inputs)
            x = layers.Dropout(0.5, seed=1)(layers.BatchNormalization()(x))
            return keras.Model(inputs, layers.Dense(1)(x))

        if scope:
            with keras.RematScope(mode=mode):
                model = build()
        else:
            model = build()
        model_or_parallel = model if gpus is None else fastdp.wrap(model, gpus=gpus, sync_batch_norm=True)
        model_or_parallel.compile(optimizer="sgd", loss="mse")
        losses = [model_or_parallel.train_on_batch(*batch(7)) for _ in range(3)]
        return [np.asarray(losses), *(np.asarray(keras.ops.convert_to_numpy(v)) for v in model.variables)]

    expected = run(False, None)
    for gpus in (1, 3):
        assert_same(expected, run(True, gpus))


def test_a_layer_that_is_called_twice_still_counts_twice() -> None:
    def run(gpus: int | None, how: str | None) -> list[np.ndarray]:
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(3)
        inputs, block = keras.Input((4,)), Block(Counting(), how)
        model = keras.Model(inputs, layers.Dense(1)(block(block(inputs))))
        model_or_parallel = model if gpus is None else fastdp.wrap(model, gpus=gpus)
        model_or_parallel.compile(optimizer="sgd", loss="mse")
        losses = [model_or_parallel.train_on_batch(*batch(8)) for _ in range(3)]
        assert float(block.inner.calls.value) == 6.0
        return [np.asarray(losses), *model.get_weights()]

    assert_same(run(None, None), run(2, "remat"))


class Penalty(keras.layers.Layer):
    """Differentiates inside of its call, so that the step differentiates twice."""

    def __init__(self, how: str | None) -> None:
        super().__init__()
        self.dense, self.how = layers.Dense(1, activation="tanh"), how

    def build(self, shape: Any) -> None:
        self.dense.build(shape)

    def call(self, x: Any) -> Any:
        if x.device.type == "meta":
            return self.dense(x)
        with torch.enable_grad():
            inputs = x if x.requires_grad else x.detach().requires_grad_()
            run = RUNS[self.how] if self.how else None
            y = run(self.dense, inputs) if run is not None else self.dense(inputs)
            (slope,) = torch.autograd.grad(y.sum(), inputs, create_graph=True)
            _, tangent = torch.autograd.functional.jvp(self.dense, inputs, torch.ones_like(inputs), create_graph=True)
        return y + (slope**2).sum(-1, keepdim=True) + tangent


@pytest.mark.parametrize("how", [None, "remat"])
def test_derivatives_inside_a_layer_are_those_of_one_device(how: str | None) -> None:
    def run(gpus: int | None, how: str | None) -> list[np.ndarray]:
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(4), Penalty(how)])
        model_or_parallel = model if gpus is None else fastdp.wrap(model, gpus=gpus, compile=None)
        model_or_parallel.compile(optimizer="sgd", loss="mse")
        losses = [model_or_parallel.train_on_batch(*batch(8)) for _ in range(3)]
        return [np.asarray(losses), *model.get_weights()]

    assert_same(run(None, None), run(3, how))


class Hooked(keras.layers.Layer):
    """Its gradient passes through code of the user's, which reads a weight and draws."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(4,), initializer="random_normal", trainable=False)

    def call(self, x: Any) -> Any:
        y = x * 1.0
        if y.requires_grad:
            y.register_hook(lambda g: g * (1.0 + self.scale + keras.random.uniform((int(g.shape[0]), 4))))
        return y


def test_hooks_of_tensors_see_the_replica_in_backward() -> None:
    def run(gpus: int | None) -> list[np.ndarray]:
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(4), Hooked(), layers.Dense(1)])
        model_or_parallel = model if gpus is None else fastdp.wrap(model, gpus=gpus, compile=None)
        model_or_parallel.compile(optimizer="sgd", loss="mse")
        losses = [model_or_parallel.train_on_batch(*batch(7)) for _ in range(3)]
        return [np.asarray(losses), *model.get_weights()]

    plain = run(None)
    for gpus in (1, 3):
        assert_same(plain, run(gpus))
