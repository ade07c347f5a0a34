"""Losses that layers add and variables that they assign, of whatever dependence on the rows of the batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import fastdp

layers, ops = keras.layers, keras.ops
GPUS = [2, 3, 8]


def batches(sizes: Any = (9, 8, 3, 1), seed: int = 4) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.normal(size=(n, 3)).astype("float32"), "y": rng.normal(size=(n, 1)).astype("float32")} for n in sizes
    ]


def settings() -> dict[str, Any]:
    return {"optimizer": keras.optimizers.SGD(0.05), "loss": "mse", "metrics": ["mae"]}


def between(layer: Callable[[], keras.layers.Layer]) -> Callable[[], keras.Model]:
    return lambda: keras.Sequential([keras.Input((3,)), layers.Dense(4), layer(), layers.Dense(1)])


class Keeping(layers.Layer):
    """Keeps a number of each column in a variable, by a function of its value and of the batch."""

    def __init__(self, function: Callable[[Any, Any], Any], start: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.function, self.start = function, start

    def build(self, shape: Any) -> None:
        start = keras.initializers.Constant(self.start)
        self.kept = self.add_weight(shape=shape[1:], initializer=start, trainable=False, name="kept")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.kept.assign(self.function(self.kept.value, x))
        return x


EXACT: dict[str, Callable[[Any, Any], Any]] = {
    "a running mean": lambda v, x: 0.9 * v + 0.1 * ops.mean(x, axis=0),
    "a sum": lambda v, x: v + ops.sum(x, axis=0),
    "a decaying sum": lambda v, x: 0.9 * v + 0.1 * ops.sum(x, axis=0),
    "the last sum": lambda v, x: ops.sum(x, axis=0),
    "the largest": lambda v, x: ops.maximum(v, ops.max(x, axis=0)),
    "the smallest": lambda v, x: ops.minimum(v, ops.min(x, axis=0)),
    "an average of the largest": lambda v, x: 0.9 * v + 0.1 * ops.max(x, axis=0),
    "steps": lambda v, x: v + 1.0,
}


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("start", [0.0, 2.0])
@pytest.mark.parametrize("kind", EXACT)
def test_means_sums_and_extremes_equal_one_device_without_a_word(
    kind: str, start: float, gpus: int, equals_one_device: Any
) -> None:
    equals_one_device(between(lambda: Keeping(EXACT[kind], start)), settings, batches(), gpus=gpus)


BY_MERGING: dict[str, Callable[[Any, Any], Any]] = {
    "a norm": lambda v, x: 0.9 * v + 0.1 * ops.sqrt(ops.sum(x**2, axis=0)),
    "the last row": lambda v, x: v + x[-1],
    "the first row": lambda v, x: v + x[0],
    "a median": lambda v, x: 0.9 * v + 0.1 * ops.median(x, axis=0),
    "a product": lambda v, x: v + ops.prod(1 + 0.1 * x, axis=0),
}


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("kind", BY_MERGING)
def test_variables_of_any_dependence_equal_one_device_when_merged(kind: str, gpus: int, equals_one_device: Any) -> None:
    equals_one_device(
        between(lambda: Keeping(BY_MERGING[kind])), settings, batches(), gpus=gpus, wrap={"rows": "merge"}
    )


# The first row is a sum and a part that is there without it, as far as three rows tell: it is merged.
@pytest.mark.parametrize("kind", [kind for kind in BY_MERGING if kind != "the first row"])
def test_variables_of_any_dependence_are_an_error_that_names_the_layer(kind: str) -> None:
    model = between(lambda: Keeping(BY_MERGING[kind], name="keeper"))()
    parallel = fastdp.wrap(model, gpus=3)
    parallel.compile(**settings())
    before = [np.array(v) for v in model.variables]
    named = r"The layer 'keeper' \(Keeping\) assigns the variable .*keeper/kept.*rows=\"merge\""
    for _ in range(2):
        with pytest.raises(ValueError, match=named):
            parallel.train_on_batch(**batches()[0])
    assert all(np.array_equal(a, b) for a, b in zip(before, map(np.array, model.variables), strict=True))


def test_by_replica_such_a_variable_is_the_mean_of_the_devices() -> None:
    model = between(lambda: Keeping(lambda v, x: x[0], name="keeper"))()
    parallel = fastdp.wrap(model, gpus=2, rows="replica")
    parallel.compile(keras.optimizers.SGD(0.0), "mse")
    batch = batches()[0]
    with pytest.warns(UserWarning, match=r"'keeper' .*assigns the variable.*rows=\"replica\""):
        parallel.train_on_batch(**batch)
    given = np.asarray(model.layers[0](batch["x"]).detach())
    np.testing.assert_allclose(model.layers[1].kept, (5 * given[0] + 4 * given[5]) / 9, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel.train_on_batch(**batches()[1])


class Quantizer(layers.Layer):
    """A codebook that follows its rows by decaying sums, as that of a VQ-VAE."""

    def build(self, shape: Any) -> None:
        rng = np.random.default_rng(0).normal(size=(5, shape[-1])).astype("float32")
        make = keras.initializers.Constant
        self.counts = self.add_weight(shape=(5,), initializer="ones", trainable=False)
        self.sums = self.add_weight(shape=(5, shape[-1]), initializer=make(rng), trainable=False)
        self.codes = self.add_weight(shape=(5, shape[-1]), initializer=make(rng), trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        nearest = ops.argmin(ops.sum((x[:, None] - self.codes) ** 2, axis=-1), axis=1)
        hot = ops.one_hot(nearest, 5)
        quantized = ops.matmul(hot, self.codes)
        if training:
            self.counts.assign(0.9 * self.counts + 0.1 * ops.sum(hot, axis=0))
            self.sums.assign(0.9 * self.sums + 0.1 * ops.matmul(ops.transpose(hot), x))
            self.codes.assign(self.sums / self.counts[:, None])
        self.add_loss(0.25 * ops.mean((ops.stop_gradient(quantized) - x) ** 2))
        return x + ops.stop_gradient(quantized - x)


@pytest.mark.parametrize("gpus", GPUS)
def test_a_codebook_that_follows_its_rows_equals_one_device_when_merged(gpus: int, equals_one_device: Any) -> None:
    equals_one_device(between(Quantizer), settings, batches(), gpus=gpus, wrap={"rows": "merge"})


class Read(layers.Layer):
    """Subtracts a mean that it has assigned in the same call."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(shape=shape[1:], initializer="zeros", trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x, axis=0))
        return x - self.mean


@pytest.mark.parametrize("gpus", GPUS)
def test_a_mean_that_is_used_in_the_step_equals_one_device_when_merged(gpus: int, equals_one_device: Any) -> None:
    equals_one_device(between(Read), settings, batches(), gpus=gpus, wrap={"rows": "merge"})
    parallel = fastdp.wrap(between(Read)(), gpus=gpus)
    parallel.compile(**settings())
    with pytest.raises(ValueError, match=r"The layer 'read.*' \(Read\) mixes the rows"):
        parallel.train_on_batch(**batches()[0])


def test_a_mean_that_another_layer_reads_equals_one_device_when_merged(equals_one_device: Any) -> None:
    class Reader(layers.Layer):
        def __init__(self, keeper: Any) -> None:
            super().__init__()
            self.keeper = [keeper]  # not to be tracked twice

        def call(self, x: Any) -> Any:
            return x - self.keeper[0].kept

    def build() -> keras.Model:
        keeper = Keeping(EXACT["a running mean"])
        return keras.Sequential([keras.Input((3,)), layers.Dense(4), keeper, Reader(keeper), layers.Dense(1)])

    equals_one_device(build, settings, batches(), gpus=3, wrap={"rows": "merge"})


# What the rows that were tried have not shown.


class Rare(layers.Layer):
    """Counts, and adds, what few rows have."""

    def build(self, shape: Any) -> None:
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.number = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False)

    def call(self, x: Any) -> Any:
        large = ops.relu(x[:, 0] - 50.0)
        self.seen.assign_add(ops.sum(large))
        self.number.assign_add(ops.sum(ops.cast(large > 0, "int32")))
        self.add_loss(1e-3 * ops.sum(large))
        return x


@pytest.mark.parametrize("gpus", GPUS)
def test_what_shows_in_later_rows_alone_equals_one_device(gpus: int, equals_one_device: Any) -> None:
    data = batches((9, 8, 9))
    data[1]["x"][6, 0] = data[2]["x"][8, 0] = 70.0
    build = lambda: keras.Sequential([keras.Input((3,)), Rare(), layers.Dense(1, kernel_initializer="zeros")])  # noqa: E731
    made = lambda: {"optimizer": keras.optimizers.SGD(1e-5), "loss": "mse"}  # noqa: E731
    run = equals_one_device(build, made, data, gpus=gpus)
    assert int(run.model.layers[0].number) >= 2


class Sometimes(layers.Layer):
    """Assigns in every third step, and what it assigns depends on the rows."""

    def build(self, shape: Any) -> None:
        self.steps = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False)
        self.total = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.steps.assign_add(1)
            if int(self.steps.value) % 3 == 0:
                self.total.assign_add(ops.sum(x))
        return x


@pytest.mark.parametrize("gpus", GPUS)
def test_what_is_assigned_in_some_steps_only_equals_one_device(gpus: int, equals_one_device: Any) -> None:
    equals_one_device(between(Sometimes), settings, batches((9, 8, 7, 6, 5, 4)), gpus=gpus)


def test_what_looked_the_same_and_is_not_stops_the_step_before_its_update() -> None:
    model = between(lambda: Keeping(lambda v, x: ops.where(x[0] > 50, x[0], 1.0), name="keeper"))()
    model.layers[0].set_weights([np.ones((3, 4), "float32"), np.zeros(4, "float32")])
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile(**settings())
    first, second = batches((9, 9))
    parallel.train_on_batch(**first)
    assert np.all(np.asarray(model.layers[1].kept.value.detach()) == 1)
    before = [np.asarray(v.value.detach()).copy() for v in model.variables]
    second["x"][5] = 70.0  # the first row of the second device
    with pytest.raises(ValueError, match=r"The layer 'keeper' \(Keeping\) assigns the variable .*keeper/kept"):
        parallel.train_on_batch(**second)
    after = [np.asarray(v.value.detach()) for v in model.variables]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


# add_loss and activity regularizers.


class Added(layers.Layer):
    def __init__(self, function: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(**options)
        self.function = function

    def call(self, x: Any) -> Any:
        self.add_loss(self.function(x))
        return x


LOSSES: dict[str, Callable[[Any], Any]] = {
    "root of a mean": lambda x: ops.sqrt(ops.mean(x**2)),
    "deviation": lambda x: ops.mean(ops.std(x, axis=0)),
    "largest": lambda x: 0.1 * ops.max(ops.abs(x)),
    "median": ops.median,
    "covariance": lambda x: ops.sum(ops.matmul(ops.transpose(x), x) ** 2) * 1e-3,
}


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_any_dependence_equal_one_device_when_merged(kind: str, gpus: int, equals_one_device: Any) -> None:
    equals_one_device(
        between(lambda: Added(LOSSES[kind])), settings, batches((9, 8, 3)), gpus=gpus, wrap={"rows": "merge"}
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_any_dependence_are_an_error_that_names_the_layer(kind: str) -> None:
    parallel = fastdp.wrap(between(lambda: Added(LOSSES[kind], name="adding"))(), gpus=2)
    parallel.compile(**settings())
    with pytest.raises(ValueError, match=r"add_loss\(\) term of the layer 'adding' \(Added\) is .*rows=\"merge\""):
        parallel.train_on_batch(**batches()[0])


def test_an_activity_regularizer_of_the_batch_names_its_layer_and_runs_on_one_device(equals_one_device: Any) -> None:
    build = lambda: keras.Sequential(  # noqa: E731
        [keras.Input((3,)), layers.Dense(4, activity_regularizer=ops.std, name="spread"), layers.Dense(1)]
    )
    parallel = fastdp.wrap(build(), gpus=2)
    parallel.compile(**settings())
    with pytest.raises(ValueError, match=r"activity regularizer of the layer 'spread' \(Dense\) is neither"):
        parallel.train_on_batch(**batches()[0])
    with pytest.warns(UserWarning, match=r"runs on one device, with all rows.*regularizer of the layer 'spread'"):
        equals_one_device(build, settings, batches((9, 8, 3)), gpus=2, wrap={"rows": "merge"})


# Under fastdp.install, which promises plain Keras's numbers.

INSTALLED = {
    "a layer that mixes": (Read, False),
    "a decaying sum": (lambda: Keeping(EXACT["a decaying sum"]), False),
    "a codebook": (Quantizer, False),
    "a loss": (lambda: Added(LOSSES["deviation"]), False),
    "a regularizer": (lambda: layers.Dense(4, activity_regularizer=ops.std), True),
}


@pytest.mark.parametrize("kind", INSTALLED)
def test_installed_models_give_plain_numbers(kind: str) -> None:
    make, falls_back = INSTALLED[kind]

    def numbers() -> list[Any]:
        keras.utils.set_random_seed(3)
        model = between(make)()
        model.compile(**settings())
        found = [model.train_on_batch(**batch) for batch in batches((9, 8, 3))]
        return [*np.ravel(found), *(np.array(v) for v in model.variables)]

    plain = numbers()
    fastdp.install(gpus=3)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = numbers()
    finally:
        fastdp.uninstall()
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    about = [str(one.message) for one in said if "fastdp" in str(one.message)]
    assert len(about) == falls_back, about
    assert all("as plain Keras: The activity regularizer of the layer" in one for one in about)
