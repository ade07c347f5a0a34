"""Random draws without a seed of their own: on any number of devices they are those of plain Keras, step by step."""

# ruff: noqa: NPY002 - NumPy's global generator is what layers of users draw from

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras.src.random.seed_generator import global_seed_generator
from torch.nn import functional as F

import fastdp
from fastdp.program.keras.batch import make_batch

layers, draw = keras.layers, keras.random


class Drawing(keras.layers.Layer):
    """Adds what a function draws. `kept` and `tracked` are seed generators of the layer, one where Keras looks."""

    def __init__(self, function: Callable[[Any, Any], Any], name: str | None = None) -> None:
        super().__init__(name=name)
        self.function = function
        self.tracked = keras.random.SeedGenerator(2)
        self.kept = Box(keras.random.SeedGenerator(9))
        self.held: Any = None

    def call(self, x: Any) -> Any:
        if x.device.type == "meta":  # shapes alone
            return x
        return x + 0.1 * keras.ops.cast(self.function(x, self), x.dtype)


class Box:
    """Hides a seed generator from Keras."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator


def rows(x: Any) -> int:
    return int(keras.ops.shape(x)[0])


def as_tensor(array: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(array, dtype="float32"))


KERAS: dict[str, Callable[[Any, Any], Any]] = {
    "normal": lambda x, _: draw.normal((rows(x), 4)),
    "uniform": lambda x, _: draw.uniform((rows(x), 1)),
    "randint": lambda x, _: draw.randint((rows(x), 4), 0, 5),
    "truncated_normal": lambda x, _: draw.truncated_normal((rows(x), 4)),
    "gamma": lambda x, _: draw.gamma((rows(x), 4), 2.0),
    "beta": lambda x, _: draw.beta((rows(x), 4), 2.0, 3.0),
    "binomial": lambda x, _: draw.binomial((rows(x), 4), 5.0, 0.3),
    "categorical": lambda x, _: draw.categorical(x, 4),
    "shuffle": lambda x, _: draw.shuffle(x, axis=1),
    "dropout with numbers for a noise shape": lambda x, _: draw.dropout(x, 0.5, noise_shape=(rows(x), 4)),
    "dropout with one mask": lambda x, _: draw.dropout(x, 0.5, noise_shape=(1, 4)),
    "dropout with a mask for each row": lambda x, _: draw.dropout(x, 0.5, noise_shape=(None, 1)),
    "a noise for each feature": lambda x, _: draw.normal((4,)) + draw.normal(()) + draw.normal((4, 4))[0],
    "a fixed seed": lambda x, _: draw.normal((rows(x), 4), seed=3),
    "a generator of the layer's": lambda x, layer: draw.normal((rows(x), 4), seed=layer.tracked),
    "a generator that Keras does not find": lambda x, layer: draw.normal((rows(x), 4), seed=layer.kept.generator),
    "a generator made in call": lambda x, _: draw.normal((rows(x), 4), seed=keras.random.SeedGenerator()),
    "seeds read by the model": lambda x, layer: x * (layer.tracked.next()[1] % 7) + layer.kept.generator.next()[1],
}


def fixed_in_torch(x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        fixed = torch.randn(x.shape)
    return fixed + torch.randn(x.shape)


HOST: dict[str, Callable[[Any, Any], Any]] = {
    "rand": lambda x, _: torch.rand(x.shape) + torch.rand(4) + torch.rand(x.shape[0], 4),
    "randn_like": lambda x, _: torch.randn_like(x),
    "randint": lambda x, _: torch.randint(0, 5, (x.shape[0], 4)) + torch.randint(3, (4,)),
    "randperm of features": lambda x, _: x[:, torch.randperm(4)],
    "normal_": lambda x, _: torch.empty_like(x).normal_(),
    "bernoulli": lambda x, _: torch.bernoulli(torch.sigmoid(x)),
    "dropout": lambda x, _: F.dropout(x, 0.5) + F.dropout(x, 0.5, training=False),
    "alpha_dropout": lambda x, _: F.alpha_dropout(x, 0.3, training=True),
    "multinomial": lambda x, _: torch.multinomial(torch.softmax(x, -1), 2)[:, :1],
    "poisson": lambda x, _: torch.poisson(5.0 * x.detach() ** 2),
    "distributions": lambda x, _: (
        torch.distributions.Normal(x, 1.0).rsample() + torch.distributions.Gamma(torch.exp(x), 1.0).rsample()
    ),
    "manual_seed in call": lambda x, _: fixed_in_torch(x),
    "torch and Keras": lambda x, _: torch.randn_like(x) + draw.gamma((x.shape[0], 4), 2.0),
    "numpy": lambda x, _: as_tensor(
        np.random.normal(0.0, 1.0, (x.shape[0], 4)) + np.random.randn(x.shape[0], 4) + np.random.rand(4)
    ),
    "numpy, other forms": lambda x, _: as_tensor(
        np.random.randint(0, 5, size=(x.shape[0], 1)) + np.random.permutation(4) + np.random.uniform()
    ),
    "random": lambda x, _: x * random.random() + random.randint(1, 3),
}


def model_of(function: Callable[[Any, Any], Any]) -> keras.Model:
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(1)(Drawing(function)(layers.Dense(4)(inputs))))


def batch(n: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 4)).astype("float32"), rng.normal(size=(n, 1)).astype("float32")


def numbers_of_generators() -> list[Any]:
    """The next numbers of everybody who draws after the model."""
    state = global_seed_generator().state.value.tolist()
    return [*state, float(draw.normal(())), random.random(), float(torch.rand(())), float(np.random.rand())]


def story(build: Callable[[], keras.Model], gpus: int | None, settings: Any = None, **options: Any) -> list[np.ndarray]:
    """A script that trains, tests, predicts, draws itself, and seeds again; everything that it sees."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    model = build()
    trained = model if gpus is None else fastdp.wrap(model, gpus=gpus, check_replicas=True, **options)
    trained.compile(**(settings() if settings else {"loss": "mse"}), **({} if settings else {"optimizer": "sgd"}))
    x, y = batch()
    seen: list[Any] = [trained.train_on_batch(x[:9], y[:9]) for _ in range(3)]
    seen += [trained.train_on_batch(x[:3], y[:3]), trained.test_on_batch(x, y), trained.predict_on_batch(x)]
    seen += [trained.predict(x, verbose=0, batch_size=6), *numbers_of_generators()]
    keras.utils.set_random_seed(9)
    seen += [trained.train_on_batch(x, y), trained.predict_on_batch(x)]
    history = trained.fit(x, y, epochs=2, batch_size=6, verbose=0, validation_split=0.2)
    seen += [*history.history.values(), *numbers_of_generators(), *model.get_weights()]
    return [np.asarray(value, dtype="float64") for value in seen]


def assert_same(one: list[np.ndarray], many: list[np.ndarray]) -> None:
    for place, (a, b) in enumerate(zip(one, many, strict=True)):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=f"value {place} of the script")


@pytest.mark.parametrize("name", KERAS)
def test_what_keras_random_draws_in_a_layer_is_what_plain_keras_draws(name: str) -> None:
    build = lambda: model_of(KERAS[name])  # noqa: E731
    plain = story(build, None)
    for gpus in (1, 3, 8):
        assert_same(plain, story(build, gpus, compile=None))


@pytest.mark.parametrize("name", ["normal", "randint", "truncated_normal", "a noise for each feature", "a fixed seed"])
def test_a_captured_step_draws_what_plain_keras_draws(name: str) -> None:
    build = lambda: model_of(KERAS[name])  # noqa: E731
    assert_same(story(build, None), story(build, 2, compile="trace"))


@pytest.mark.parametrize("name", HOST)
def test_what_torch_numpy_and_python_draw_in_a_layer_is_what_one_device_draws(name: str) -> None:
    build = lambda: model_of(HOST[name])  # noqa: E731
    plain = story(build, None)
    for gpus in (1, 3):
        assert_same(plain, story(build, gpus, compile=None))


def test_layers_of_keras_draw_what_plain_keras_draws() -> None:
    def build() -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(4),
                layers.GaussianNoise(0.3),
                layers.Dense(4),
                DrawsTwice(),
                layers.Dense(1),
            ]
        )

    assert_same(story(build, None), story(build, 3))


class DrawsTwice(keras.layers.Layer):
    """Two layers that share a generator, and one of which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = keras.random.SeedGenerator(4)
        self.one, self.two = Drawing(self.draw), Drawing(self.draw)

    def draw(self, x: Any, _: Any) -> Any:
        return draw.normal((rows(x), 4), seed=self.shared) + draw.normal((rows(x), 4))

    def call(self, x: Any) -> Any:
        return self.two(self.one(x))


def noisy_loss(y: Any, y_pred: Any) -> Any:
    """Not known as a sum over samples, and with a noise of its own."""
    return keras.ops.mean((y + 0.1 * draw.normal((rows(y), 1)) - y_pred) ** 2)


class NoisyNorm(keras.regularizers.Regularizer):
    """Draws in the shape of a weight, which has as many rows as a replica."""

    def __call__(self, w: Any) -> Any:
        return 0.01 * keras.ops.sum(w * draw.normal(w.shape))

    def get_config(self) -> dict[str, Any]:
        return {}


class NoisyMean(keras.metrics.Mean):
    def update_state(self, y: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(y_pred + draw.normal((rows(y), 1)))


class NoisySgd(keras.optimizers.SGD):
    """Steps with noise, as in Langevin dynamics."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient + 0.1 * draw.normal(gradient.shape), variable, learning_rate)


def test_losses_metrics_activations_and_optimizers_draw_as_in_plain_keras() -> None:
    def build() -> keras.Model:
        noisy = lambda x: x + 0.1 * draw.normal(keras.ops.shape(x))  # noqa: E731
        inputs = keras.Input((4,))
        x = layers.Dense(4, activation=noisy)(inputs)
        return keras.Model(inputs, layers.Dense(1)(x))

    def settings() -> dict[str, Any]:
        return {"optimizer": NoisySgd(0.05), "loss": noisy_loss, "metrics": [NoisyMean(name="noisy")]}

    plain = story(build, None, settings)
    for gpus in (2, 3):
        assert_same(plain, story(build, gpus, settings, compile=None))


def test_a_regularizer_draws_in_the_shape_of_its_weight() -> None:
    x, y = batch()

    def losses(gpus: int | None) -> list[np.ndarray]:
        keras.utils.set_random_seed(1)
        dense = layers.Dense(4, kernel_regularizer=NoisyNorm())
        model = keras.Sequential([keras.Input((4,)), dense, Drawing(KERAS["normal"]), layers.Dense(1)])
        trained = model if gpus is None else fastdp.wrap(model, gpus=gpus)
        trained.compile(optimizer="sgd", loss="mse")
        return [np.asarray(trained.train_on_batch(x[:8], y[:8])) for _ in range(3)]

    assert_same(losses(None), losses(2))  # four rows each, as the weight has


class Variational(keras.Model):
    """A model with a step of its own, whose layer samples."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.noise, self.decode = layers.Dense(4), Drawing(KERAS["normal"]), layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.decode(self.noise(self.encode(x)))

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = (keras.ops.convert_to_tensor(part) for part in data[:2])
        self.zero_grad()
        h = self.encode(x)
        shift = draw.normal((1, 4))  # the step draws too, between the layers
        loss = keras.ops.mean((self(x + 0.1 * shift) + self.decode(h) - y) ** 2)
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in self.trainable_variables], self.trainable_variables)
        return {"loss": loss}


def test_steps_of_a_models_own_draw_as_in_plain_keras() -> None:
    def build() -> keras.Model:
        model = Variational()
        model(np.zeros((2, 4), "float32"))
        return model

    plain = story(build, None)
    for gpus in (2, 3):
        assert_same(plain, story(build, gpus))


def test_a_script_under_install_draws_as_plain_keras() -> None:
    def build() -> keras.Model:
        return model_of(KERAS["normal"])

    plain = story(build, None)
    fastdp.install(gpus=3)
    try:
        assert_same(plain, story(build, None))
    finally:
        fastdp.uninstall()


def test_two_models_take_turns_with_the_generator() -> None:
    def losses(gpus: int | None) -> list[np.ndarray]:
        keras.utils.set_random_seed(1)
        models = [model_of(KERAS["normal"]), model_of(KERAS["uniform"])]
        trained = models if gpus is None else [fastdp.wrap(model, gpus=gpus) for model in models]
        for one in trained:
            one.compile(optimizer="sgd", loss="mse")
        x, y = batch()
        return [np.asarray(one.train_on_batch(x, y)) for _ in range(2) for one in trained] + [
            numbers_of_generators()[2]
        ]

    assert_same(losses(None), losses(3))


@pytest.mark.parametrize("gpus", [1, 2])
def test_unseeded_dropout_changes_from_step_to_step_and_repeats_after_set_random_seed(gpus: int) -> None:
    model = keras.Sequential([keras.Input((64,)), layers.Dropout(0.5), layers.Dropout(0.5)])
    parts = keras.Model(model.inputs, [model.layers[0].output, model.layers[1].output])
    parallel = fastdp.wrap(parts, gpus=gpus)
    seen: list[list[np.ndarray]] = []

    class Keep(keras.losses.Loss):
        def call(self, y: Any, y_pred: Any) -> Any:
            seen[-1].append(y_pred.detach().numpy().copy())
            return keras.ops.mean(y_pred, axis=-1)

    parallel.compile(optimizer="sgd", loss=[Keep(), Keep()])
    x = np.ones((4, 64), "float32")

    def step() -> list[np.ndarray]:
        seen.append([])
        with pytest.warns(UserWarning, match="trainable weights"):
            parallel.train_on_batch(x, [x, x])
        first, both = seen[-1][-2:]
        return [first != 0, both != 0]

    keras.utils.set_random_seed(5)
    one, two = step(), step()
    keras.utils.set_random_seed(5)
    again = step()
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert (one[0] != two[0]).mean() > 0.3
    second = one[1][one[0]]  # what the second layer kept of the first one's
    assert 0.2 < second.mean() < 0.8


@pytest.mark.parametrize("how", ["compile", "eager"])
def test_a_trial_moves_no_generator(how: str) -> None:
    x, y = batch()
    model = model_of(lambda x, _: HOST["rand"](x, _) + draw.normal((rows(x), 4)) + np.random.rand() + random.random())
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile(optimizer="sgd", loss="mse")
    program = parallel.engine.program
    keras.utils.set_random_seed(1)
    if how == "eager":
        draw.normal(())  # the generator is there
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    state = None if how == "compile" else global_seed_generator().state.value.tolist()
    program.inspect(make_batch((x, y, None)))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    if state is not None:
        assert global_seed_generator().state.value.tolist() == state


def test_a_step_that_fails_leaves_the_generators_as_they_were() -> None:
    fails: list[bool] = [False]

    def function(x: torch.Tensor, _: Any) -> Any:
        drawn = draw.normal((rows(x), 4)) + torch.randn_like(x) + np.random.rand() + random.random()
        if fails[0]:
            raise ArithmeticError("told to")
        return drawn

    x, y = batch()
    parallel = fastdp.wrap(model_of(function), gpus=2, compile=None)
    parallel.compile(optimizer="sgd", loss="mse")
    parallel.train_on_batch(x, y)
    keras.utils.set_random_seed(1)
    global_seed_generator()
    before = random.getstate(), torch.get_rng_state().tolist(), global_seed_generator().state.value.tolist()
    fails[0] = True
    with pytest.raises(Exception, match="told to"):
        parallel.train_on_batch(x, y)
    assert (random.getstate(), torch.get_rng_state().tolist(), global_seed_generator().state.value.tolist()) == before


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "rows on two axes": (lambda x, _: draw.normal((rows(x), rows(x))).sum(1, keepdim=True), "an axis other than"),
    "a permutation of rows": (lambda x, _: x[torch.randperm(x.shape[0])], "permutes the rows"),
    "a generator that the layer holds": (lambda x, layer: x * layer.held.normal(), "'drawing' holds as 'held'"),
    "parameters for each row": (lambda x, _: as_tensor(np.random.poisson(x.detach().abs())), "parameters for each row"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_draws_that_no_device_can_make_for_its_rows_are_refused_before_the_step(name: str) -> None:
    function, said = REFUSED[name]
    inputs = keras.Input((4,))
    layer = Drawing(function, name="drawing")
    layer.held = np.random.default_rng(1)
    model = keras.Model(inputs, layers.Dense(1)(layer(inputs)))
    before = model.get_weights()
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile(optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match=said):
        parallel.train_on_batch(*batch())
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
