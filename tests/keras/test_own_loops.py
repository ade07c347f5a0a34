"""Loops that a script writes itself, around calls of whole models: each equals plain Keras on one device.

Every loop runs three times: on a plain model, on a wrapped one, and on a plain one after `fastdp.install`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import keras
import numpy as np
import pytest
import torch
from keras import layers

import fastdp
from fastdp.engine.data_parallel import DataParallel

# Keras, of models without a build() of their own that hold a layer which their first call does not build.
pytestmark = pytest.mark.filterwarnings(r"ignore:`build\(\)` was called on layer")

ROWS = 22  # batches of 8, 8 and 6
X = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(ROWS, 2)).astype("float32")
IMAGES = np.random.default_rng(2).normal(size=(11, 6, 6, 2)).astype("float32")
LABELS = np.arange(11) % 3


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    """Eight devices; plain Keras afterwards."""
    fastdp.set_virtual_devices(8)
    yield
    fastdp.uninstall()
    fastdp.set_virtual_devices(0)


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The rows of each forward and backward step of the engine."""
    seen = []

    def noted(original):
        return lambda self, batch, *work: seen.append(len(batch[0])) or original(self, batch, *work)

    for name in ("predict", "call"):
        monkeypatch.setattr(DataParallel, name, noted(getattr(DataParallel, name)))
    return seen


def batches(size=8):
    return [slice(start, start + size) for start in range(0, ROWS, size)]


def dense(*more, units=2):
    return keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="tanh"), *more, layers.Dense(units)])


def convolutional():
    inputs = keras.Input((6, 6, 2))
    features = layers.Conv2D(3, 3, activation="relu", name="features")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(features)))


def apply(optimizer, weights):
    with torch.no_grad():
        optimizer.apply([v.value.grad for v in weights], weights)


# The loops: `parallel` makes of a model what is called.


def keras_guide(parallel):
    """Keras's loss, metric and optimizer around the model, as in Keras's guide for torch."""
    model = parallel(convolutional())
    optimizer, metric = keras.optimizers.Adam(0.01), keras.metrics.SparseCategoricalAccuracy()
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = torch.utils.data.TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS))
    for _ in range(2):
        for x, y in torch.utils.data.DataLoader(data, batch_size=5):
            logits = model(x, training=True)
            loss = loss_function(y, logits)
            model.zero_grad()
            loss.backward()
            apply(optimizer, list(model.trainable_weights))
            metric.update_state(y, logits)
            yield loss
        yield metric.result()
    with torch.no_grad():
        yield model(IMAGES, training=False)
    yield from model.weights


def torch_loop(parallel, make=lambda p: torch.optim.AdamW(p, 0.01)):
    """Torch's optimizer over `model.parameters()`; statistics, dropout, regularizers, `add_loss`."""
    layer = layers.Dense(5, kernel_regularizer="l2", activity_regularizer="l1", use_bias=False)
    model = parallel(dense(layer, layers.BatchNormalization(), layers.Dropout(0.3, seed=4)))
    optimizer = make(model.parameters())
    for rows in batches():
        optimizer.zero_grad()
        outputs = model(torch.from_numpy(X[rows]), training=True)
        loss = torch.nn.functional.mse_loss(outputs, torch.from_numpy(Y[rows])) + sum(model.losses)
        loss.backward()
        optimizer.step()
        yield loss
    yield from model.weights


def fused_optimizer(parallel):
    """Torch counts no writes of its fused optimizers."""
    return torch_loop(parallel, lambda p: torch.optim.AdamW(p, 0.01, fused=True))


def written_through_data(parallel):
    """Torch counts no writes through `.data`: gradient descent by hand, and a slowly following network."""
    online, target = parallel(dense()), parallel(dense())
    for rows in batches():
        with torch.no_grad():
            wanted = target(X[rows]).amax(1) * 0.9 + 1.0
        loss = (online(X[rows]).amax(1) - wanted).square().mean()
        online.zero_grad()
        loss.backward()
        for p, q in zip(online.parameters(), target.parameters(), strict=True):
            p.data.sub_(0.1 * p.grad)
            q.data.mul_(0.9).add_(p.data, alpha=0.1)
        yield loss
    yield from target.weights


def accumulated(parallel):
    """Several backward passes before an update, with clipping."""
    model = parallel(dense())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for number, rows in enumerate(batches(4)):
        loss = (model(X[rows]) - torch.from_numpy(Y[rows])).square().sum()
        loss.backward()
        yield loss
        if number % 2:
            yield torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    yield from model.weights


def twice_called(parallel):
    """Two forward passes of one model before the backward one."""
    model = parallel(dense())
    optimizer = keras.optimizers.SGD(0.1)
    for _ in range(2):
        loss = (model(X) - model(X[::-1].copy())).square().mean() + model(X[:5]).sum()
        model.zero_grad()
        loss.backward()
        apply(optimizer, list(model.trainable_variables))
        yield loss
    yield from model.weights


def gan(parallel):
    """Two models and two optimizers; the generator's gradient goes through the discriminator."""
    latent = keras.Sequential(
        [keras.Input((4,)), layers.Dense(8, use_bias=False), layers.BatchNormalization(), layers.Dense(6)]
    )
    generator, discriminator = parallel(latent), parallel(dense(layers.Dropout(0.3, seed=2), units=1))
    of_generator = torch.optim.Adam(generator.parameters(), 0.01)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), 0.01)
    entropy, draws = torch.nn.BCEWithLogitsLoss(), np.random.default_rng(5)
    for rows in batches():
        real = torch.from_numpy(X[rows])
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        fake = generator(draws.normal(size=(len(real), 4)).astype("float32"), training=True)
        of_discriminator.zero_grad()
        on_real = entropy(discriminator(real, training=True), ones)
        on_real.backward()
        on_fake = entropy(discriminator(fake.detach(), training=True), zeros)
        on_fake.backward()
        of_discriminator.step()
        of_generator.zero_grad()
        loss = entropy(discriminator(fake, training=True), ones)
        loss.backward()
        of_generator.step()
        yield from (on_real, on_fake, loss)
    yield from (*generator.weights, *discriminator.weights)


def shared_layers(parallel):
    """A model of features that shares its layers with the model that is trained."""
    model = convolutional()
    features = parallel(keras.Model(model.input, model.get_layer("features").output))
    model = parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = features(IMAGES).square().mean() + model(IMAGES, training=True).square().mean()
        loss.backward()
        optimizer.step()
        yield loss
    with torch.no_grad():
        yield features(IMAGES)


def by_autograd_grad(parallel):
    """Gradients of weights and of inputs, by `torch.autograd.grad`."""
    model, x = parallel(dense()), torch.from_numpy(X).requires_grad_()
    weights = [v.value for v in model.trainable_variables]
    y = model(x)
    yield from torch.autograd.grad(y.amax(1).sum(), weights, retain_graph=True)
    yield from torch.autograd.grad(y.square().sum(), [x])


def masked(parallel):
    """A mask that an Embedding makes, and one that the script gives."""
    inputs = keras.Input((7,), dtype="int32")
    hidden = layers.LSTM(5, return_sequences=True)(layers.Embedding(9, 4, mask_zero=True)(inputs))
    model = parallel(keras.Model(inputs, layers.LSTM(2)(hidden)))
    tokens = np.random.default_rng(3).integers(0, 9, (11, 7))
    tokens[:, 4:] = 0
    y = model(tokens, training=True)
    y.square().sum().backward()
    yield y
    yield from (v.value.grad for v in model.trainable_weights)
    series = Series()
    series(np.ones((1, 7, 3), "float32"))
    series = parallel(series)
    y = series(np.ones((11, 7, 3), "float32") * tokens[..., None], mask=torch.from_numpy(tokens > 2))
    y.square().sum().backward()
    yield y
    yield from (v.value.grad for v in series.trainable_weights)


def nested(parallel):
    """Dictionaries in and out."""
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    outputs = {"s": layers.Dense(2)(a), "t": layers.Dense(1)(layers.Concatenate()([a, b]))}
    model = parallel(keras.Model({"a": a, "b": b}, outputs))
    y = model({"a": X[:, :3], "b": X[:, 3:5]})
    (y["s"].sum() + y["t"].square().sum()).backward()
    yield from (y["s"], y["t"], *(v.value.grad for v in model.trainable_weights))


class Series(keras.Model):
    """A mask as an argument."""

    def __init__(self):
        super().__init__()
        self.lstm, self.supports_masking = layers.LSTM(2), True

    def call(self, x, mask=None):
        return self.lstm(x, mask=mask)


class Scaled(keras.Model):
    """A call with an argument more, rows or a number, and a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.dense, self.never = layers.Dense(4), layers.Dense(3)
        self.dropout = layers.Dropout(0.5, seed=1)

    def call(self, x, scale=None, training=False):
        hidden = self.dropout(self.dense(x), training=training)
        return hidden if scale is None else hidden * scale


def more_arguments(parallel):
    """Further arguments of a call."""
    model = Scaled()
    model(X[:1])
    model = parallel(model)
    for _ in range(2):
        for more in (
            {},
            {"training": True},
            {"scale": X[:, :1]},
            {"scale": X[0, :4]},
            {"scale": 2.0, "training": True},
        ):
            y = model(X, **more)
            y.square().sum().backward()
            yield y
    yield from (v.value.grad for v in model.trainable_weights)


LOOPS = [
    keras_guide,
    torch_loop,
    fused_optimizer,
    written_through_data,
    accumulated,
    twice_called,
    gan,
    shared_layers,
    by_autograd_grad,
    masked,
    nested,
    more_arguments,
]


def as_array(value):
    value = value.value if isinstance(value, keras.Variable) else value
    return np.array(value.detach() if isinstance(value, torch.Tensor) else value)  # a copy: weights go on


def run(loop, how, count=3):
    """What a loop yields on plain, wrapped or installed models."""
    keras.utils.set_random_seed(7)
    wrapped = how == "wrapped"
    if how == "installed":
        fastdp.install(gpus=count)
    try:
        return [as_array(v) for v in loop(lambda m: fastdp.wrap(m, gpus=count, sync_batch_norm=True) if wrapped else m)]
    finally:
        fastdp.uninstall()


def lines(told):
    """The files that warnings of fastdp point at."""
    return [one.filename for one in told if "fastdp" in str(one.message)]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_loop_of_a_script_equals_plain_keras(loop, steps):
    expected = run(loop, "plain")
    assert steps == []
    for how, count in (("wrapped", 1), ("wrapped", 2), ("wrapped", 8), ("installed", 3)):
        for found, wanted in zip(run(loop, how, count), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6, err_msg=f"{how} {count}")
        assert steps, f"{how}: nothing ran on the devices"
        steps.clear()


def test_a_loop_in_double_precision_equals_plain_keras(steps):
    keras.config.set_dtype_policy("float64")
    try:
        expected = run(torch_loop, "plain")
        assert all(value.dtype == np.float64 for value in expected)
        for how in ("wrapped", "installed"):
            for found, wanted in zip(run(torch_loop, how), expected, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    finally:
        keras.config.set_dtype_policy("float32")
    assert steps


@pytest.mark.parametrize("how", ["wrapped", "installed"])
def test_a_gradient_penalty_is_right_and_said_to_take_one_device(how, steps):
    def loop(parallel):
        model = parallel(dense(units=1))
        x = torch.from_numpy(X).requires_grad_()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            loss = (gradient.norm(dim=1) - 1).square().mean() + model(x).mean()
            model.zero_grad()
            loss.backward()
            yield from (loss, *(v.value.grad for v in model.trainable_weights))

    expected = run(loop, "plain")
    with pytest.warns(UserWarning, match="gradients of the model .* run on one device.*create_graph") as told:
        found = run(loop, how)
    assert lines(told) == [__file__]
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=2e-6)
    assert steps


def class_activation(parallel):
    """The gradient of one output of a model by another."""
    model = convolutional()
    model = parallel(keras.Model(model.input, [model.get_layer("features").output, model.output]))
    for _ in range(2):
        features, scores = model(IMAGES)
        (gradient,) = torch.autograd.grad(scores[:, 1].sum(), features)
        yield (gradient.mean((1, 2), keepdim=True) * features).sum(-1)


def hooked(parallel):
    """What a torch hook sees."""
    template, seen = dense(), []
    template.layers[0].register_forward_hook(lambda module, given, output: seen.append(output))
    model = parallel(template)
    for _ in range(2):
        model(X)
    yield from seen


def mixed_precision(parallel):
    """Torch's autocast, which holds for one thread."""
    model = parallel(dense())
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield model(X).float()


def vectorized(parallel):
    """A transform of torch's over the model."""
    model = parallel(dense())
    for _ in range(2):
        yield torch.func.vmap(model)(torch.from_numpy(X).reshape(11, 2, 6))


@pytest.mark.parametrize("how", ["wrapped", "installed"])
@pytest.mark.parametrize(
    ("loop", "why"),
    [
        (class_activation, "computed from another"),
        (hooked, "a torch hook"),
        (mixed_precision, "autocast"),
        (vectorized, "vmap"),
    ],
    ids=lambda part: part.__name__ if callable(part) else "",
)
def test_what_devices_cannot_share_runs_plain_and_is_said_once_at_the_scripts_line(loop, why, how):
    expected = run(loop, "plain")
    with pytest.warns(UserWarning, match=f"calls of the model .* run on one device, as plain Keras: .*{why}") as told:
        found = run(loop, how)
    assert lines(told) == [__file__]
    assert len(found) == len(expected)
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_statistics_metrics_and_seeds_move_once_per_call():
    def loop(parallel):
        model = parallel(dense(layers.BatchNormalization(), layers.Dropout(0.5, seed=1)))
        for training in (True, True, False):
            model(X, training=training)
            yield from (*model.non_trainable_variables, *(s.state for s in seeds(model)))
        with torch.no_grad():
            model(X, training=True)
        yield from (*model.non_trainable_variables, *(s.state for s in seeds(model)))

    def seeds(model):
        return [generator for layer in model._flatten_layers() for generator in layer._seed_generators]

    expected = run(loop, "plain")
    for how in ("wrapped", "installed"):
        for found, wanted in zip(run(loop, how), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_model_that_was_first_called_in_inference_mode_trains():
    def loop(parallel):
        model = parallel(dense())
        with torch.inference_mode():
            yield model(X)
        yield from torch_steps(model)

    def torch_steps(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            optimizer.step()
            yield loss

    expected = run(loop, "plain")
    for how in ("wrapped", "installed"):
        for found, wanted in zip(run(loop, how), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_calls_leave_the_optimizer_to_fit():
    def loop(parallel):
        template = dense()
        template.layers[0].trainable = False
        model = parallel(template)
        model.compile("sgd", "mse")
        model(X).sum().backward()
        model.predict(X, verbose=0)
        assert not model.optimizer.built
        template.layers[0].trainable = True
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
        yield from model.weights

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model's .*trainable|.*trainable.*compile")
        expected = run(loop, "plain")
        for how in ("wrapped", "installed"):
            for found, wanted in zip(run(loop, how), expected, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_layer_that_a_later_call_builds_is_noticed(steps):
    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(2), layers.Dense(2)

        def call(self, x, training=False):
            return self.first(x) + self.second(x) if training else self.first(x)

    def loop(parallel):
        model = Late()
        model(X[:1])
        model = parallel(model)
        for training in (False, False, True, True, True):
            y = model(X, training=training)
            y.square().sum().backward()
            yield y
        yield from (v.value.grad for v in model.trainable_weights)

    expected = run(loop, "plain")
    for how in ("wrapped", "installed"):
        steps.clear()
        for found, wanted in zip(run(loop, how), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert len(steps) == 6  # forward and backward, but for the first call of each kind


class CentredInTraining(keras.Model):
    """Mixes the rows of a batch in training alone."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = layers.Dense(3), layers.Dense(2)

    def call(self, x, training=False):
        inner = self.inner(x)
        return self.outer(inner - keras.ops.mean(inner, axis=0, keepdims=True) if training else inner)


def test_calls_of_a_model_whose_training_steps_run_on_one_device_have_the_rows_of_forward_in_backward(steps):
    def gradients(count):
        keras.utils.set_random_seed(7)
        template = CentredInTraining()
        template(X[:2])
        steps.clear()
        model = fastdp.wrap(template, gpus=count, rows="merge") if count else template
        model.compile("sgd", "mse")
        model.fit(X, np.zeros((len(X), 2), "float32"), batch_size=len(X), verbose=0)
        model(torch.from_numpy(X), training=False).square().sum().backward()
        return [as_array(variable.value.grad) for variable in template.trainable_variables]

    expected = gradients(0)
    with pytest.warns(UserWarning, match="runs on one device, with all rows"):
        found = gradients(4)
    assert len(steps) == 2, "forward and backward on the devices"
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)
