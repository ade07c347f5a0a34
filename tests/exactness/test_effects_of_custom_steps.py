"""What a forward pass leaves behind, in steps of a model's own and in calls where nothing else happens."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch

import fastdp

ROWS, BATCH = 29, 8  # three batches of 8 and one of 5


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype("float32")


def state(model):
    """All that a model's steps change: weights, statistics, seeds, metrics of its layers."""
    metrics = [v for layer in model._flatten_layers() for metric in layer._metrics for v in metric.variables]
    return {f"{i} {v.path}": np.array(v) for i, v in enumerate([*model.variables, *metrics])}


def run(make, how, work):
    """The model after `work(runner)`, and what that gave: plain (`how` None), wrapped, or installed."""
    keras.utils.set_random_seed(4)
    model = make()
    if how is None:
        return work(model), state(model)
    kind, gpus = how
    if kind == "wrap":
        parallel = fastdp.wrap(model, gpus=gpus, sync_batch_norm=True)
        if model.compiled:
            parallel.compile(**compiled(model))
        return work(parallel), state(model)
    fastdp.install(gpus=gpus)
    try:
        return work(model), state(model)
    finally:
        fastdp.uninstall()


def compiled(model):
    return {"optimizer": type(model.optimizer).from_config(model.optimizer.get_config()), "loss": model.loss}


def equals_plain_keras(make, work):
    expected, expected_state = run(make, None, work)
    for how in [("wrap", 3), ("wrap", 8), ("install", 2)]:
        found, found_state = run(make, how, work)
        for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=str(how))
        for (name, value), other in zip(expected_state.items(), found_state.values(), strict=True):
            np.testing.assert_allclose(other, value, rtol=2e-5, atol=2e-6, err_msg=f"{name} {how}")
    return expected_state


def gradients(model, loss, weights):
    model.zero_grad()
    loss.backward()
    return [v.value.grad for v in weights]


class Plainest:
    """The plainest step of a model's own: nothing happens in it but what its layers do."""

    def train_step(self, data):
        x, y = data
        loss = keras.ops.mean((self(x, training=True) - y) ** 2) + sum(self.losses)
        weights = self.trainable_weights
        found = gradients(self, loss, weights)
        with torch.no_grad():
            self.optimizer.apply(found, weights)
        return {"loss": loss.detach()}


class OwnStep(Plainest, keras.Model):
    """A Functional model that trains by it."""


def with_layers(*layers, base=OwnStep):
    """A model whose layers are these, between two dense ones."""
    inputs = keras.Input((5,))
    x = keras.layers.Dense(6, activation="tanh")(inputs)
    for layer in layers:
        x = layer(x)
    model = base(inputs, keras.layers.Dense(2)(x))
    model.compile(optimizer=keras.optimizers.SGD(0.02), loss="mse")
    return model


def fit(runner: Any) -> Any:
    return runner.fit(rows(5), rows(2, seed=1), batch_size=BATCH, epochs=2, verbose=0, shuffle=False).history["loss"]


@keras.saving.register_keras_serializable("effects")
class OwnRule(keras.layers.BatchNormalization):
    """Statistics by a rule of its own: the mean of the batch alone."""

    def call(self, inputs, training=None, mask=None):
        before = keras.ops.copy(self.moving_mean)
        if training:
            self.moving_mean.assign(self._moments(inputs, mask)[0])
        return inputs - before


class Count(keras.layers.Layer):
    """Counts calls in a whole number."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), dtype="int64", initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1)
        return x


class Measured(keras.layers.Layer):
    """A metric of the layer's own, updated in each call."""

    def __init__(self):
        super().__init__()
        self.size = keras.metrics.Mean(name="size")

    def call(self, x):
        self.size.update_state(keras.ops.sum(x * x, axis=-1))
        return x


LAYERS = {
    "batch_norm": lambda: [keras.layers.BatchNormalization()],
    "renorm": lambda: [keras.layers.BatchNormalization(renorm=True, renorm_clipping={"rmax": 3.0, "rmin": 0.3})],
    "renorm_alone_after_count": lambda: [Count(), keras.layers.BatchNormalization(renorm=True, momentum=0.7)],
    "count": lambda: [Count()],
    "metric": lambda: [Measured()],
    "dropout": lambda: [keras.layers.Dropout(0.3, seed=3), keras.layers.BatchNormalization()],
    "add_loss": lambda: [keras.layers.ActivityRegularization(0.01), keras.layers.BatchNormalization(center=False)],
    "frozen": lambda: [keras.layers.BatchNormalization(trainable=False), keras.layers.Dense(4)],
    "own_rule": lambda: [OwnRule(center=False, scale=False)],
    "spectral": lambda: [keras.layers.SpectralNormalization(keras.layers.Dense(6))],
}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("base", [OwnStep, keras.Model], ids=["own_step", "keras_step"])
def test_what_layers_assign_in_training_equals_plain_keras(layers, base):
    equals_plain_keras(lambda: with_layers(*LAYERS[layers](), base=base), fit)


def test_statistics_move_where_nothing_else_happens_in_a_call():
    after = equals_plain_keras(lambda: with_layers(keras.layers.BatchNormalization()), fit)
    assert max(np.abs(value).max() for name, value in after.items() if "moving_mean" in name) > 0.01


class Shared(Plainest, keras.Model):
    """One normalization that a call goes through twice, and once more as it is at prediction."""

    def __init__(self):
        super().__init__()
        self.norm, self.dense = keras.layers.BatchNormalization(momentum=0.8), keras.layers.Dense(5)
        self.head = keras.layers.Dense(2)

    def call(self, x, training=None):
        x = self.dense(self.norm(x, training=training))
        x = self.norm(x, training=training)
        return self.head(self.norm(x, training=False))


class AlwaysTraining(keras.Model):
    """Normalizes by the batch at prediction too."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = keras.layers.BatchNormalization(momentum=0.8), keras.layers.Dense(2)

    def call(self, x):
        return self.head(self.norm(x, training=True))


class OwnForward(AlwaysTraining):
    """Its own test and predict steps."""

    def test_step(self, data):
        x, y = data
        return {"error": keras.ops.mean((self(x) - y) ** 2)}

    def predict_step(self, data):
        return self(data[0] if isinstance(data, tuple) else data)


def built(cls):
    def make():
        model = cls()
        model(np.zeros((2, 5)))
        model.compile(optimizer=keras.optimizers.SGD(0.02), loss="mse")
        return model

    return make


def test_a_layer_called_several_times_moves_its_statistics_as_often():
    equals_plain_keras(built(Shared), fit)


@pytest.mark.parametrize("cls", [AlwaysTraining, OwnForward])
def test_normalization_by_the_batch_moves_statistics_in_predict_and_evaluate(cls):
    def work(runner):
        predicted = runner.predict(rows(5), batch_size=BATCH, verbose=0)
        tested = runner.evaluate(rows(5, seed=2), rows(2, seed=3), batch_size=BATCH, verbose=0, return_dict=True)
        return [predicted, tested, runner.predict(rows(5), batch_size=BATCH, verbose=0)]

    equals_plain_keras(built(cls), work)


@pytest.mark.parametrize("base", [OwnStep, keras.Model], ids=["own_step", "keras_step"])
def test_a_metric_of_a_layer_counts_in_predict(base):
    equals_plain_keras(
        lambda: with_layers(Measured(), base=base), lambda runner: runner.predict(rows(5), batch_size=BATCH, verbose=0)
    )


def test_statistics_of_renormalization_are_those_of_the_global_batch_where_replicas_normalize_apart():
    def after_a_batch(parallel):
        keras.utils.set_random_seed(4)
        model = with_layers(base=keras.Model)
        norm = keras.layers.BatchNormalization(renorm=True, momentum=0.9, renorm_momentum=0.6)
        inputs = keras.Input((5,))
        model = keras.Model(inputs, model(norm(inputs)))
        runner = fastdp.wrap(model, gpus=3) if parallel else model
        runner.compile("sgd", "mse")
        runner.train_on_batch(3.0 * rows(5)[:8] + 1.0, rows(2)[:8])
        return [np.array(v) for v in norm.non_trainable_variables]

    for found, expected in zip(after_a_batch(True), after_a_batch(False), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
