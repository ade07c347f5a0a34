"""A parallel model looks and behaves as the model that its user built, to Keras, to torch and to callbacks."""

from __future__ import annotations

import io
from collections.abc import Iterator

import keras
import numpy as np
import pytest
import torch
from keras import layers

import fastdp

X = np.random.default_rng(0).normal(size=(22, 6)).astype("float32")
Y = X[:, :2] * 2.0


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    """Three devices, which divide no batch here; plain Keras afterwards."""
    fastdp.set_virtual_devices(3)
    yield
    fastdp.uninstall()
    fastdp.set_virtual_devices(0)


def functional():
    inputs = keras.Input((6,))
    x = layers.Dense(4, activation="tanh", kernel_regularizer="l2", activity_regularizer="l1", name="hidden")(inputs)
    x = layers.Dropout(0.2, seed=1)(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(2)(x))


def sequential():
    return keras.Sequential([keras.Input((6,)), layers.Dense(4, name="hidden"), layers.BatchNormalization()])


class Own(keras.Model):
    """A subclass with a part and a method."""

    def __init__(self):
        super().__init__()
        self.encoder = layers.Dense(2, name="hidden")

    def call(self, x):
        return self.encoder(x)

    def encode(self, x):
        return self.encoder(x)


def subclassed():
    model = Own()
    model(X[:1])
    return model


MODELS = [functional, sequential, subclassed]


@pytest.mark.parametrize("make", MODELS)
def test_parameters_and_their_names_are_the_templates(make):
    model = make()
    parallel = fastdp.wrap(model, gpus=2)
    assert [(n, id(p)) for n, p in parallel.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert [id(p) for p in parallel.parameters()] == [id(p) for p in model.parameters()]
    assert len({id(p) for p in parallel.parameters()}) == len(model.variables) == len(list(parallel.parameters()))
    assert list(parallel.state_dict()) == list(model.state_dict())
    assert [n for n, _ in parallel.named_parameters("prefix")] == [n for n, _ in model.named_parameters("prefix")]
    name, parameter = next(iter(model.named_parameters()))
    assert parallel.state_dict()[name].data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize("make", MODELS)
def test_a_state_dict_goes_from_either_model_to_the_other(make):
    model = make()
    parallel = fastdp.wrap(model, gpus=2)
    expected = [w + 1.0 for w in model.get_weights()]
    with torch.no_grad():
        before = parallel(X)
    file = io.BytesIO()
    torch.save(parallel.state_dict(), file)
    model.set_weights(expected)
    file.seek(0)
    with torch.no_grad():
        assert not torch.allclose(parallel(X), before)
        model.load_state_dict(torch.load(file))
        torch.testing.assert_close(parallel(X), before)  # on all devices
    state = {name: value + 1.0 for name, value in model.state_dict().items()}
    parallel.load_state_dict(state)
    for found, wanted in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_parallel_model_stays_where_its_replicas_are():
    parallel = fastdp.wrap(functional(), gpus=2)
    for same in (lambda: parallel.to("cpu"), lambda: parallel.to(torch.float32), parallel.float, parallel.cpu):
        assert same() is parallel
    for other in (parallel.half, parallel.double, parallel.bfloat16, lambda: parallel.to(torch.float64)):
        with pytest.raises(ValueError, match=r"cannot become torch.*set_dtype_policy"):
            other()
    assert parallel.eval() is parallel
    assert parallel.train() is parallel
    parallel(X).sum().backward()
    assert all(v.value.grad is not None for v in parallel.trainable_variables)
    parallel.zero_grad()
    assert all(v.value.grad is None for v in parallel.trainable_variables)


def test_a_template_whose_dtype_changed_is_an_error_and_not_changed_back():
    model = functional()
    parallel = fastdp.wrap(model, gpus=2)
    parallel.predict(X, verbose=0)
    model.double()
    with pytest.raises(ValueError, match=r"has become torch.float64; the replicas hold it as torch.float32"):
        parallel.predict(X, verbose=0)
    assert model.weights[0].value.dtype == torch.float64


@pytest.mark.parametrize("make", MODELS)
def test_attributes_are_those_of_a_plain_model(make):
    model = make()
    parallel = fastdp.wrap(model, gpus=2)
    expected = make()
    for one in (parallel, expected):
        one.compile("adam", "mse", metrics=["mae"])
    for name in (
        *("loss", "stop_training", "metrics_names", "trainable", "dtype", "compute_dtype", "built", "compiled"),
        *("jit_compile", "run_eagerly", "steps_per_execution", "training", "supports_masking", "input_dtype"),
    ):
        assert getattr(parallel, name) == getattr(expected, name), name
    for name in ("variables", "weights", "trainable_variables", "non_trainable_variables", "losses", "metrics"):
        assert len(getattr(parallel, name)) == len(getattr(expected, name)), name
    assert type(parallel.optimizer) is type(expected.optimizer)
    assert set(parallel.get_compile_config()) == set(expected.get_compile_config())
    assert parallel.count_params() == expected.count_params()
    assert parallel.get_layer("hidden") is model.get_layer("hidden")
    assert parallel.get_layer(model.name) is model
    with pytest.raises(ValueError, match="No such layer: nowhere"):
        parallel.get_layer("nowhere")
    if make is functional:
        assert (parallel.input, parallel.output) == (model.input, model.output)


def test_freezing_a_parallel_model_freezes_its_template_and_the_other_way_round():
    model = functional()
    parallel = fastdp.wrap(model, gpus=2)
    parallel.trainable = False
    assert [model.trainable, model.get_layer("hidden").trainable] == [False, False]
    assert parallel.trainable_variables == []
    parallel.trainable = True
    model.trainable = False
    assert not parallel.trainable
    assert not parallel(X).requires_grad


@pytest.mark.parametrize("how", ["wrapped", "installed"])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_weights_frozen_by_torchs_means_stay_as_they_are(how):
    def weights(how):
        keras.utils.set_random_seed(3)
        model = functional()
        model.get_layer("hidden").kernel.value.requires_grad_(False)
        if how == "installed":
            fastdp.install(gpus=2)
        parallel = fastdp.wrap(model, gpus=2, sync_batch_norm=True) if how == "wrapped" else model
        parallel.compile("adam", "mse")
        parallel.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
        fastdp.uninstall()
        return [np.array(v.value.detach()) for v in model.weights]

    for found, wanted in zip(weights(how), weights("plain"), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_only_the_template_has_is_pointed_to():
    parallel = fastdp.wrap(subclassed(), gpus=2)
    for name in ("encoder", "encode"):
        assert not hasattr(parallel, name)
        with pytest.raises(AttributeError, match=f"its template has: parallel.template.{name}"):
            getattr(parallel, name)
    with pytest.raises(AttributeError, match="has no attribute 'nowhere'"):
        _ = parallel.nowhere


@pytest.mark.parametrize("name", ["fit", "train_on_batch", "make_train_function"])
def test_a_loop_of_the_models_own_is_an_error_with_a_remedy(name):
    kind = type("Kind", (Own,), {name: lambda self, *args, **kwargs: None})
    model = kind()
    model(X[:1])
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile("sgd", "mse")
    with pytest.raises(ValueError, match=rf"has its own {name}\(\),.*fastdp.install"):
        getattr(parallel, "fit" if name == "make_train_function" else name)(X, Y)
    assert parallel.predict(X, verbose=0).shape == (22, 2)  # which is Keras's


class Look(keras.callbacks.Callback):
    """Notes what a callback can read."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def look(self, when, logs):
        model = self.model
        numbers = {
            "logs": list((logs or {}).values()),
            "iterations": model.optimizer.iterations.value,
            "rate": model.optimizer.learning_rate,
            "slots": [v.value for v in model.optimizer.variables],
            "weights": [v.value for v in model.weights],
            "tracker": [v.value for v in model._loss_tracker.variables],
            "loss": model._loss_tracker.result(),
            "losses": model.losses,
            "metrics": [v.value for v in model.metrics_variables],
            "results": list(model.get_metrics_result().values()),
            "seeds": [s.state.value for layer in model._flatten_layers() for s in layer._seed_generators],
            "stop": model.stop_training,
            "batches": self.params.get("steps") or 0,
        }
        if when.startswith("train"):
            numbers["history"] = [v for values in model.history.history.values() for v in values]
        for name, value in numbers.items():
            flat = [np.array(torch.as_tensor(v).detach(), "float64").ravel() for v in keras.tree.flatten(value)]
            self.seen.append((f"{when} {name}", np.concatenate([np.zeros(0), *flat])))

    def on_train_batch_begin(self, batch, logs=None):
        self.look(f"train batch {batch} begins", logs)

    def on_train_batch_end(self, batch, logs=None):
        self.look(f"train batch {batch}", logs)

    def on_test_batch_end(self, batch, logs=None):
        self.look(f"test batch {batch}", logs)

    def on_epoch_end(self, epoch, logs=None):
        self.look(f"train epoch {epoch}", logs)

    def on_train_end(self, logs=None):
        self.look("train", logs)


def what_callbacks_see(how):
    keras.utils.set_random_seed(3)
    template = functional()
    if how == "installed":
        fastdp.install(gpus=3)
    model = fastdp.wrap(template, gpus=3, sync_batch_norm=True) if how == "wrapped" else template
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5)
    model.compile(keras.optimizers.Adam(rate), "mse", metrics=["mae"])
    look = Look()
    arguments = {"batch_size": 8, "verbose": 0, "callbacks": [look]}
    history = model.fit(X, Y, epochs=2, validation_split=0.3, shuffle=False, **arguments)
    assert history is model.history
    assert history.model is model
    assert look.model is model
    model.evaluate(X, Y, **arguments)
    for step in (lambda: model.train_on_batch(X, Y), lambda: model.test_on_batch(X, Y)):
        step()
        look.look("on batch", None)
    fastdp.uninstall()
    return look.seen


@pytest.mark.parametrize("how", ["wrapped", "installed"])
def test_callbacks_read_what_plain_keras_leaves_behind(how):
    expected = what_callbacks_see("plain")
    for (name, found), (_, wanted) in zip(what_callbacks_see(how), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5, err_msg=name)
