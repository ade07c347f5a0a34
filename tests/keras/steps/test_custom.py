"""Models with steps of their own: each equals plain Keras on one device, for uneven batches too."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import keras
import numpy as np
import pytest
import torch

import fastdp

ROWS, BATCH = 26, 8  # three batches of 8 and one of 2


@pytest.fixture(autouse=True)
def three_devices() -> Iterator[None]:
    """Three devices, which divide no batch here."""
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype("float32")


def torch_step(model, loss):
    """zero_grad, backward, apply: as Keras's guide for torch writes it."""
    model.zero_grad()
    loss.backward()
    weights = list(model.trainable_weights)
    gradients = [v.value.grad for v in weights]
    with torch.no_grad():
        model.optimizer.apply(gradients, weights)
    return gradients


class OwnLoss(keras.Model):
    """A loss and metrics made by hand, from torch and Keras operations on the whole batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.mae = keras.metrics.MeanAbsoluteError(name="mae")

    def train_step(self, data):
        x, y = data
        y_pred = self(x, training=True)
        error = y_pred - y
        # Not a sum over rows in any way: a norm, a quotient, and a host value of the whole batch.
        loss = torch.linalg.norm(error) / (1.0 + float(y.std())) + keras.ops.sum(self.losses)
        gradients = torch_step(self, loss)
        assert all(g is not None for g in gradients)
        self.loss_tracker.update_state(loss)
        self.mae.update_state(y, y_pred)
        return {m.name: m.result() for m in self.metrics} | {
            "norm": float(torch.stack([g.norm() for g in gradients]).norm())
        }

    def test_step(self, data):
        x, y = data
        y_pred = self(x, training=False)
        self.loss_tracker.update_state(keras.ops.max(keras.ops.abs(y - y_pred)))
        self.mae.update_state(y, y_pred)
        return {m.name: m.result() for m in self.metrics}

    def predict_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        y = self(x, training=False)
        return y - keras.ops.mean(y)

    @property
    def metrics(self):
        return [self.loss_tracker, self.mae]


def own_loss():
    inputs = keras.Input((5,))
    x = keras.layers.Dense(7, activation="relu", kernel_regularizer="l2", activity_regularizer="l1")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.4, seed=3)(x)
    model = OwnLoss(inputs, keras.layers.Dense(2)(x))
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    return model


class Extended(keras.Model):
    """Keras's own step with a key more, and a step of the test that takes weights."""

    def train_step(self, data):
        logs = super().train_step(data)
        logs["ten"] = 10.0
        return logs


def extended():
    inputs = keras.Input((5,))
    model = Extended(inputs, keras.layers.Dense(2)(keras.layers.Dense(6, activation="tanh")(inputs)))
    model.compile("sgd", "mse", metrics=["mae"], weighted_metrics=["mse"])
    return model


class GAN(keras.Model):
    """Two models, two optimizers, and random latents: as in Keras's examples."""

    def __init__(self, penalty=False):
        super().__init__()
        self.discriminator = keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(6),
                keras.layers.LeakyReLU(),
                keras.layers.Dropout(0.3, seed=5),
                keras.layers.Dense(1),
            ],
            name="discriminator",
        )
        self.generator = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(5)], name="generator"
        )
        self.seeds = keras.random.SeedGenerator(11)
        self.penalty = penalty
        self.d_loss = keras.metrics.Mean(name="d_loss")
        self.g_loss = keras.metrics.Mean(name="g_loss")
        self.built = True

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    @property
    def metrics(self):
        return [self.d_loss, self.g_loss]

    def train_step(self, real):
        real = real[0] if isinstance(real, tuple) else real
        count = real.shape[0]
        latents = keras.random.normal((count, 3), seed=self.seeds)
        fake = self.generator(latents)
        labels = keras.ops.concatenate([keras.ops.ones((count, 1)), keras.ops.zeros((count, 1))])
        predictions = self.discriminator(keras.ops.concatenate([fake, real]))
        d_loss = self.loss_fn(labels, predictions)
        if self.penalty:
            mixed = (0.3 * real + 0.7 * fake.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(self.discriminator(mixed).sum(), mixed, create_graph=True)
            d_loss = d_loss + 10.0 * ((slope.norm(dim=1) - 1.0) ** 2).mean()
        self.zero_grad()
        d_loss.backward()
        weights = list(self.discriminator.trainable_weights)
        with torch.no_grad():
            self.d_optimizer.apply([v.value.grad for v in weights], weights)
        g_loss = self.loss_fn(
            keras.ops.zeros((count, 1)),
            self.discriminator(self.generator(keras.random.normal((count, 3), seed=self.seeds))),
        )
        self.zero_grad()
        g_loss.backward()
        weights = list(self.generator.trainable_weights)
        with torch.no_grad():
            self.g_optimizer.apply([v.value.grad for v in weights], weights)
        self.d_loss.update_state(d_loss)
        self.g_loss.update_state(g_loss)
        return {m.name: m.result() for m in self.metrics}


def gan(penalty=False):
    return GAN(penalty)


GAN_SETTINGS = {
    "d_optimizer": lambda: keras.optimizers.Adam(0.01),
    "g_optimizer": lambda: keras.optimizers.Adam(0.01),
    "loss_fn": lambda: keras.losses.BinaryCrossentropy(from_logits=True),
}


class VAE(keras.Model):
    """Several outputs of the encoder, a sampling layer, and a loss of two terms."""

    def __init__(self):
        super().__init__()
        inputs = keras.Input((5,))
        x = keras.layers.Dense(6, activation="relu")(inputs)
        self.encoder = keras.Model(inputs, [keras.layers.Dense(2)(x), keras.layers.Dense(2)(x)])
        self.decoder = keras.Sequential(
            [keras.Input((2,)), keras.layers.Dense(6, activation="relu"), keras.layers.Dense(5)]
        )
        self.seeds = keras.random.SeedGenerator(7)
        self.total = keras.metrics.Mean(name="total")
        self.built = True

    @property
    def metrics(self):
        return [self.total]

    def train_step(self, data):
        data = data[0] if isinstance(data, tuple) else data
        mean, log_var = self.encoder(data)
        z = mean + keras.ops.exp(0.5 * log_var) * keras.random.normal(keras.ops.shape(mean), seed=self.seeds)
        reconstruction = keras.ops.mean(keras.ops.sum((data - self.decoder(z)) ** 2, axis=1))
        kl = keras.ops.mean(keras.ops.sum(-0.5 * (1 + log_var - mean**2 - keras.ops.exp(log_var)), axis=1))
        loss = reconstruction + kl
        torch_step(self, loss)
        self.total.update_state(loss)
        return {"total": self.total.result()}


def vae():
    model = VAE()
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    return model


def settings_of(model):
    """How the parallel model is compiled, and the same for plain Keras."""
    if isinstance(model, GAN):
        return {name: make() for name, make in GAN_SETTINGS.items()}
    if isinstance(model, Extended):
        return {"optimizer": "sgd", "loss": "mse", "metrics": ["mae"], "weighted_metrics": ["mse"]}
    return {"optimizer": keras.optimizers.Adam(0.01)}


def train(make, parallel, **fit):
    keras.utils.set_random_seed(4)
    model = make()
    runner = fastdp.wrap(model, gpus=3, sync_batch_norm=True) if parallel else model
    runner.compile(**settings_of(model))
    history = runner.fit(rows(5), **fit, batch_size=BATCH, epochs=3, verbose=0, shuffle=False)
    return model, runner, history.history


@pytest.mark.parametrize("make", [own_loss, extended, gan, lambda: gan(penalty=True), vae])
def test_training_equals_one_device(make):
    fit = {"y": rows(2, seed=1)} if make in (own_loss, extended) else {}
    plain, _, expected = train(make, False, **fit)
    model, _, found = train(make, True, **fit)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=2e-5, err_msg=key)
    for ours, theirs in zip(model.weights, plain.weights, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=2e-4, atol=2e-6, err_msg=theirs.path)


def test_sample_weights_with_an_uneven_batch_equal_one_device():
    fit = {"y": rows(2, seed=1), "sample_weight": np.linspace(0.0, 3.0, ROWS).astype("float32")}
    plain, _, expected = train(extended, False, **fit)
    model, _, found = train(extended, True, **fit)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=2e-5, err_msg=key)
    np.testing.assert_allclose(model.get_weights()[0], plain.get_weights()[0], rtol=2e-5)


def test_own_test_and_predict_steps_equal_one_device():
    fit = {"y": rows(2, seed=1)}
    plain, _, _ = train(own_loss, False, **fit)
    model, parallel, _ = train(own_loss, True, **fit)
    model.set_weights(plain.get_weights())
    x, y = rows(5, seed=2), rows(2, seed=3)
    # The batch of predict_step counts: it takes a mean over it.
    np.testing.assert_allclose(
        parallel.predict(x, batch_size=7, verbose=0), plain.predict(x, batch_size=7, verbose=0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        parallel.evaluate(x, y, batch_size=7, verbose=0), plain.evaluate(x, y, batch_size=7, verbose=0), rtol=1e-5
    )


def test_the_layers_of_a_custom_step_run_on_all_devices(monkeypatch):
    seen = []
    original = keras.layers.Dense.call
    monkeypatch.setattr(
        keras.layers.Dense, "call", lambda self, x, training=None: seen.append(len(x)) or original(self, x)
    )
    keras.utils.set_random_seed(4)
    parallel = fastdp.wrap(vae(), gpus=3)
    parallel.compile(optimizer="sgd")
    parallel.fit(rows(5), batch_size=BATCH, epochs=1, verbose=0)
    seen.clear()
    parallel.fit(rows(5)[:8], batch_size=8, epochs=1, verbose=0)
    assert sorted(set(seen)) == [2, 3]  # 3 + 3 + 2 rows, in every layer


class Mixing(keras.layers.Layer):
    """A layer with weights whose outputs for a row depend on the others."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return (x - keras.ops.mean(x, axis=0)) * self.scale


class Centred(keras.Model):
    def __init__(self):
        super().__init__()
        self.mixing, self.dense = Mixing(), keras.layers.Dense(2)
        self.dense.build((None, 5))
        self.mixing.build((None, 5))
        self.built = True

    def train_step(self, data):
        x, y = data
        loss = keras.ops.mean((self.dense(self.mixing(x)) - y) ** 2)
        torch_step(self, loss)
        return {"loss": loss.detach()}


def test_a_layer_that_mixes_rows_runs_on_one_device_and_says_so():
    def losses(parallel):
        keras.utils.set_random_seed(4)
        model = Centred()
        runner = fastdp.wrap(model, gpus=3) if parallel else model
        runner.compile(optimizer=keras.optimizers.SGD(0.1))
        return runner.fit(rows(5), rows(2, seed=1), batch_size=BATCH, epochs=2, verbose=0, shuffle=False).history[
            "loss"
        ]

    expected = losses(False)
    with pytest.warns(
        UserWarning, match=r"calls of 'mixing.*one device: its outputs for a row depend on the other rows"
    ):
        found = losses(True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class NoLayers(keras.Model):
    def __init__(self):
        super().__init__()
        self.w = self.add_weight(shape=(5, 2), initializer="ones")
        self.built = True

    def train_step(self, data):
        x, y = data
        torch_step(self, keras.ops.mean((keras.ops.matmul(x, self.w) - y) ** 2))
        return {}


def test_a_model_without_a_layer_that_could_be_called_is_an_error_at_compile():
    parallel = fastdp.wrap(NoLayers(), gpus=3)
    with pytest.raises(ValueError, match=r"(?s)neither a layer with weights.*train the model itself on one device"):
        parallel.compile(optimizer="sgd")


class Late(keras.metrics.Metric):
    """Counts, in a variable that it makes when it first does."""

    def update_state(self):
        if not self.variables:
            self.count = self.add_variable((), "zeros", name="count")
        self.count.assign_add(1.0)

    def result(self):
        return self.count.value


class Unsplittable(keras.Model):
    """Its one layer mixes rows. Everything that a step can change changes before that is known."""

    def __init__(self, optimizer, elsewhere=None):
        super().__init__()
        self.mixing, self.norm = Mixing(), keras.layers.BatchNormalization()
        self.mixing.build((None, 5))
        self.norm.build((None, 5))
        self.dropout = keras.layers.Dropout(0.5, seed=3)
        self.mean, self.late = keras.metrics.Mean(name="mean"), Late(name="late")
        self.own = {"optimizer": optimizer}
        self.used = [optimizer] if elsewhere is None else elsewhere
        self.built = True

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        drawn = self.dropout(x, training=True) + keras.random.normal((1,))
        self.norm.moving_mean.assign(self.norm.moving_mean + 1.0)
        loss = keras.ops.mean((self.mixing(drawn) - keras.ops.mean(y)) ** 2)
        weights = [self.mixing.scale]
        self.zero_grad()
        loss.backward()
        for optimizer in self.used:
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer.step()
            else:
                with torch.no_grad():
                    optimizer.apply([v.value.grad for v in weights], weights)
        self.mean.update_state(loss)
        self.late.update_state()
        return {"loss": loss.detach()}


def everything(model, optimizers):
    """All that a step may change, as arrays."""
    seeds = [generator.state for layer in model._flatten_layers() for generator in layer._seed_generators]
    common = keras.src.random.seed_generator.global_seed_generator().state
    variables = [*model.variables, *model.metrics_variables, *seeds, common]
    found = [np.array(v) for v in variables]
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            states = optimizer.state_dict()["state"]
            found += [np.array(value) for state in states.values() for value in state.values()]
        else:
            optimizer.build([model.mixing.scale])  # as the step would
            found += [np.array(v) for v in optimizer.variables]
    return found


@pytest.mark.parametrize("where", ["an attribute", "elsewhere", "torch"])
def test_a_first_batch_that_cannot_be_split_changes_nothing(where):
    adam = keras.optimizers.Adam(0.1)
    model = Unsplittable(adam)
    if where == "elsewhere":
        model.used = (keras.optimizers.RMSprop(0.1),)
        model.__dict__.pop("own")
    elif where == "torch":
        model.used = (torch.optim.Adam([model.mixing.scale.value], 0.1),)
    used = list(model.used)
    parallel = fastdp.wrap(model, gpus=3)
    parallel.compile(optimizer="sgd")
    before = everything(model, [] if where == "elsewhere" else used)
    message = r"(?s)calls no layer .*can be split.*depend on the other rows.*are as before this batch.*model\.fit"
    with pytest.warns(UserWarning, match="run on one device"), pytest.raises(ValueError, match=message):
        parallel.fit(rows(5), rows(2, seed=1), batch_size=BATCH, verbose=0, shuffle=False)
    after = everything(model, [] if where == "elsewhere" else used)
    late = after.pop(len(model.variables) + len(model.metrics_variables) - 1)
    assert late == float(model.late.result()) == 0.0
    for new, old in zip(after, before, strict=True):
        np.testing.assert_array_equal(new, old)
    if where == "elsewhere":  # built by the step itself; its slots are those of a new one
        assert [float(np.abs(v).max()) for v in used[0].variables if v is not used[0]._learning_rate] == [0.0, 0.0]


def test_the_optimizers_of_keras_are_its_own_after_the_first_batch():
    """Also where a step trains another parallel model by a step of its own."""
    classes = (keras.optimizers.SGD, keras.optimizers.LossScaleOptimizer)
    own = [owner.apply for owner in classes]
    inner = fastdp.wrap(extended(), gpus=2)
    inner.compile("sgd", "mse")

    class Outer(Extended):
        def train_step(self, data):
            assert keras.optimizers.SGD.apply is not own[0]
            inner.train_on_batch(data[0].numpy(), data[1].numpy())
            assert keras.optimizers.SGD.apply is not own[0]
            return super().train_step(data)

    inputs = keras.Input((5,))
    model = Outer(inputs, keras.layers.Dense(2)(inputs))
    parallel = fastdp.wrap(model, gpus=3)
    parallel.compile("sgd", "mse")
    parallel.fit(rows(5)[:8], rows(2, seed=1)[:8], batch_size=BATCH, verbose=0)
    assert [owner.apply for owner in classes] == own


def test_a_batch_of_equal_rows_tells_nothing_and_the_next_one_does():
    model = Unsplittable(keras.optimizers.SGD(0.1))
    model.dropout.rate = 0.0
    parallel = fastdp.wrap(model, gpus=3)
    parallel.compile(optimizer="sgd")
    equal, y = np.ones((4, 5), "float32"), np.ones((4, 2), "float32")
    parallel.train_on_batch(equal, y)
    with pytest.warns(UserWarning, match="run on one device"), pytest.raises(ValueError, match="calls no layer"):
        parallel.train_on_batch(rows(5)[:4], y)


def test_a_weight_changed_between_forward_and_backward_is_an_error_as_in_torch():
    class Late(Extended):
        def train_step(self, data):
            x, y = data
            loss = keras.ops.mean((self(x, training=True) - y) ** 2)
            for v in self.trainable_weights:
                v.assign(v + 1.0)
            torch_step(self, loss)
            return {}

    inputs = keras.Input((5,))
    parallel = fastdp.wrap(Late(inputs, keras.layers.Dense(2)(keras.layers.Dense(6)(inputs))), gpus=3)
    parallel.compile(optimizer="sgd")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        parallel.fit(rows(5), rows(2, seed=1), verbose=0)


def test_layers_are_keras_own_again_after_a_step_that_failed():
    original = keras.Layer.__call__

    class Failing(Extended):
        def train_step(self, data):
            self(data[0])
            raise LookupError("the user's own")

    inputs = keras.Input((5,))
    parallel = fastdp.wrap(Failing(inputs, keras.layers.Dense(2)(inputs)), gpus=3)
    parallel.compile(optimizer="sgd")
    with warnings.catch_warnings(), pytest.raises(LookupError, match="the user's own"):
        parallel.fit(rows(5), rows(2, seed=1), verbose=0)
    assert keras.Layer.__call__ is original
