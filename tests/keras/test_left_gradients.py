"""After a batch `v.value.grad` is what Keras's trainer leaves there: callbacks and loops read it."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
import pytest
import torch

import fastdp

ROWS, BATCH = 21, 8


@pytest.fixture(autouse=True)
def eight_devices() -> Iterator[None]:
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype("float32")


class Branch(keras.layers.Layer):
    """Has a weight that the loss does not depend on."""

    def build(self, shape):
        self.unused = self.add_weight(shape=(2,), name="unused")
        self.used = self.add_weight(shape=(shape[-1],), initializer="ones", name="used")

    def call(self, x):
        return x * self.used


class OwnStep(keras.Model):
    def train_step(self, data):
        x, y = data
        loss = keras.ops.mean((self(x, training=True) - y) ** 2)
        self.zero_grad()
        loss.backward()
        weights = [v for v in self.trainable_weights if v.value.grad is not None]
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in weights], weights)
        return {"loss": loss}  # with its graph, as some scripts return it


def model(base=keras.Model):
    inputs = keras.Input((5,))
    x = keras.layers.Dense(6, activation="tanh", kernel_regularizer="l2")(inputs)
    x = keras.layers.Dense(4, trainable=False)(x)
    return base(inputs, keras.layers.Dense(2)(Branch()(x)))


class Norms(keras.callbacks.Callback):
    """Gradients after each batch, as scripts log them."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.seen = model.weights, []

    def on_train_batch_end(self, batch, logs=None):
        gradients = [v.value.grad for v in self.weights]
        self.seen.append([None if g is None else np.array(g) for g in gradients])


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "clipped": lambda: keras.optimizers.Adam(0.01, clipvalue=0.01, weight_decay=0.1),
    "clipnorm": lambda: keras.optimizers.RMSprop(0.01, clipnorm=0.01),
    "global_clipnorm": lambda: keras.optimizers.AdamW(0.01, global_clipnorm=0.01),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=8.0),
}


def seen(optimizer, gpus=None, installed=False, base=keras.Model, **wrap):
    keras.utils.set_random_seed(2)
    plain = model(base)
    runner = plain if gpus is None or installed else fastdp.wrap(plain, gpus=gpus, **wrap)
    runner.compile(optimizer=optimizer(), loss="mse")
    norms = Norms(plain)
    if installed:
        fastdp.install(gpus=gpus)
    try:
        runner.fit(rows(5), rows(2, seed=1), batch_size=BATCH, epochs=2, verbose=0, shuffle=False, callbacks=[norms])
    finally:
        fastdp.uninstall()
    return norms.seen, plain, runner


def assert_same(found, expected):
    assert len(found) == len(expected)
    for batch, wanted in zip(found, expected, strict=True):
        assert [g is None for g in batch] == [g is None for g in wanted]
        for g, w in zip(batch, wanted, strict=True):
            if w is not None:
                np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-6)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_after_each_batch_of_fit_equal_plain_keras(optimizer):
    expected, _, _ = seen(OPTIMIZERS[optimizer])
    assert sum(g is not None for g in expected[0]) == 5
    for options in ({"gpus": 3}, {"gpus": 2, "update": "each"}, {"gpus": 3, "installed": True}):
        found, _, _ = seen(OPTIMIZERS[optimizer], **options)
        assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_captured_steps_leave_gradients_too():
    expected, _, _ = seen(OPTIMIZERS["adam"])
    found, _, runner = seen(OPTIMIZERS["adam"], 3, compile="trace")
    assert {entry["how"] for entry in runner.report()} == {"traced"}
    assert_same(found, expected)


def test_a_step_of_the_model_s_own_leaves_its_gradients():
    expected, _, _ = seen(OPTIMIZERS["adam"], base=type("Plain", (OwnStep,), {}))
    for options in ({"gpus": 3}, {"gpus": 3, "installed": True}):
        found, _, _ = seen(OPTIMIZERS["adam"], base=type("Split", (OwnStep,), {}), **options)
        assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_zero_grad_and_gradients_of_a_script_s_own_harm_no_step():
    def losses(gpus):
        keras.utils.set_random_seed(2)
        plain = model()
        runner = plain if gpus is None else fastdp.wrap(plain, gpus=gpus)
        runner.compile("sgd", "mse")
        found = []
        for i in range(4):
            found.append(float(runner.train_on_batch(rows(5)[:BATCH], rows(2, seed=1)[:BATCH])))
            if i == 0:
                plain.zero_grad()
                assert all(v.value.grad is None for v in plain.weights)
            elif i == 1:  # adds to what the step has left
                keras.ops.sum(plain(rows(5, seed=3), training=True) ** 2).backward()
                found.append(float(plain.trainable_weights[0].value.grad.norm()))
            elif i == 2:
                plain.trainable_weights[0].value.grad.fill_(1e6)
        return [*found, *(float(v.value.detach().norm()) for v in plain.weights)]

    np.testing.assert_allclose(losses(3), losses(None), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_gradients_that_are_accumulated_on_the_replicas_are_not_there():
    optimizer = lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)  # noqa: E731
    found, plain, _ = seen(optimizer, 3)
    assert all(g is None for batch in found for g in batch)
