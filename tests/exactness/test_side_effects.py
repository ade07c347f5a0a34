"""What a forward pass leaves behind: added losses, and variables that layers assign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import fastdp

layers, ops = keras.layers, keras.ops


def batches(sizes: Any = (9, 8, 3, 1)) -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    return [
        {"x": rng.normal(size=(n, 3)).astype("float32"), "y": rng.normal(size=(n, 1)).astype("float32")} for n in sizes
    ]


def settings() -> dict[str, Any]:
    return {"optimizer": keras.optimizers.SGD(0.05), "loss": "mse", "metrics": ["mae"]}


def between(layer: Callable[[], keras.layers.Layer]) -> Callable[[], keras.Model]:
    return lambda: keras.Sequential([keras.Input((3,)), layers.Dense(4), layer(), layers.Dense(1)])


class Added(layers.Layer):
    """Adds a loss of its input."""

    def __init__(self, function: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(**options)
        self.function = function

    def call(self, x: Any) -> Any:
        self.add_loss(self.function(x))
        return x


ADDED: dict[str, Callable[[Any], Any]] = {
    "mean": lambda x: 0.1 * ops.mean(x**2),
    "sum": lambda x: 0.01 * ops.sum(x**2),
}


@pytest.mark.parametrize("gpus", [2, 3, 8])
@pytest.mark.parametrize("kind", ADDED)
def test_add_loss_of_a_mean_or_a_sum_equals_one_device(kind: str, gpus: int, equals_one_device: Any) -> None:
    equals_one_device(between(lambda: Added(ADDED[kind])), settings, batches(), gpus=gpus)


def test_add_loss_of_a_mean_and_a_sum_together_equals_one_device(equals_one_device: Any) -> None:
    build = lambda: keras.Sequential(  # noqa: E731
        [keras.Input((3,)), layers.Dense(4), *(Added(f) for f in ADDED.values()), layers.Dense(1)]
    )
    equals_one_device(build, settings, batches(), gpus=3)
    equals_one_device(build, settings, data=batches()[0], gpus=3, epochs=2, batch_size=4)


def test_add_loss_with_a_custom_loss_on_the_merged_outputs_equals_one_device(equals_one_device: Any) -> None:
    def whole(y_true: Any, y_pred: Any) -> Any:
        return ops.std(y_true - y_pred)

    made = lambda: {"optimizer": "sgd", "loss": whole}  # noqa: E731
    equals_one_device(between(lambda: Added(ADDED["sum"])), made, batches((9, 8, 3)), gpus=3)


def test_add_loss_that_is_neither_a_mean_nor_a_sum_is_a_value_error_that_names_its_layer() -> None:
    model = between(lambda: Added(lambda x: ops.sqrt(ops.mean(x**2)), name="rooted"))()
    parallel = fastdp.wrap(model, gpus=3)
    parallel.compile(**settings())
    before = model.get_weights()
    for _ in range(2):  # the second time too
        with pytest.raises(
            ValueError,
            match=r"term of the layer 'rooted' \(Added\) is neither a mean nor a sum.*gpus",
        ):
            parallel.train_on_batch(**batches()[0])
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_add_loss_that_is_neither_is_found_though_the_first_rows_are_alike() -> None:
    model = between(lambda: Added(lambda x: ops.max(ops.abs(x))))()
    parallel = fastdp.wrap(model, gpus=3)
    parallel.compile(**settings())
    batch = batches()[0]
    batch["x"][1] = batch["x"][0]
    with pytest.raises(ValueError, match="the maximum over rows"):
        parallel.train_on_batch(**batch)


@pytest.mark.parametrize("kind", ["L1", "L2"])
def test_activity_regularizers_equal_one_device(kind: str, equals_one_device: Any) -> None:
    build = lambda: keras.Sequential(  # noqa: E731
        [keras.Input((3,)), layers.Dense(4, activity_regularizer=kind.lower()), layers.Dense(1)]
    )
    equals_one_device(build, settings, batches(), gpus=3)
    equals_one_device(between(lambda: layers.ActivityRegularization(0.1, 0.1)), settings, batches(), gpus=3)


def test_spectral_normalization_equals_one_device(equals_one_device: Any) -> None:
    build = lambda: keras.Sequential(  # noqa: E731
        [keras.Input((3,)), layers.SpectralNormalization(layers.Dense(4)), layers.Dense(1)]
    )
    equals_one_device(build, settings, batches(), gpus=3)


class Counter(layers.Layer):
    """Counts its training steps, and the rows that it has seen."""

    def __init__(self, dtype_of_steps: str = "int32") -> None:
        super().__init__()
        self.kind = dtype_of_steps

    def build(self, shape: Any) -> None:
        self.steps = self.add_weight(shape=(), dtype=self.kind, initializer="zeros", trainable=False)
        self.rows = self.add_weight(shape=(), dtype="float32", initializer="zeros", trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.steps.assign_add(ops.cast(1, self.kind))
            self.rows.assign_add(float(x.shape[0]))
        return x


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_counters_of_steps_and_rows_equal_one_device(kind: str, equals_one_device: Any) -> None:
    run = equals_one_device(between(lambda: Counter(kind)), settings, batches(), gpus=3)
    counter = run.model.layers[1]
    assert (int(counter.steps), int(counter.rows)) == (4, 21)


class RunningMean(layers.Layer):
    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.always = always

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(shape=shape[1:], initializer="zeros", trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        if training or self.always:
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x, axis=0))
        return x - self.mean


def test_a_running_mean_equals_one_device_where_it_is_not_used_in_the_step(equals_one_device: Any) -> None:
    class Unused(RunningMean):
        def call(self, x: Any, training: bool = False) -> Any:
            super().call(x, training)
            return x

    equals_one_device(between(Unused), settings, batches(), gpus=3)
    equals_one_device(between(lambda: Unused(always=True)), settings, batches(), gpus=3)


def test_a_running_mean_of_equal_first_rows_equals_one_device(equals_one_device: Any) -> None:
    class Unused(RunningMean):
        def call(self, x: Any, training: bool = False) -> Any:
            super().call(x, training)
            return x

    data = batches()
    data[0]["x"][1] = data[0]["x"][0]  # says nothing about how the mean depends on rows
    equals_one_device(between(Unused), settings, data, gpus=3)


def test_normalizing_layers_do_not_mix_rows_in_the_trial() -> None:
    model = keras.Sequential(
        [keras.Input((4, 4, 6)), layers.Conv2D(6, 2), layers.BatchNormalization(), layers.GroupNormalization(3)]
    )
    model.add(layers.LayerNormalization())
    model.add(layers.Dropout(0.5))
    x = np.random.default_rng(0).normal(size=(6, 4, 4, 6)).astype("float32")
    assert fastdp.wrap(model, gpus=2).predict(x, verbose=0).shape == (6, 3, 3, 6)


class Adaptive(keras.losses.Loss):
    """Divides by a running mean of itself, which it keeps in a variable of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = keras.Variable(1.0, trainable=False, name="running")

    def call(self, y: Any, y_pred: Any) -> Any:
        error = ops.mean(ops.square(y - y_pred), axis=-1)
        self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(error))
        return error / self.mean


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_a_variable_that_a_loss_assigns_equals_one_device(gpus: int, twins: Any, same: Any) -> None:
    """The loss sees the merged outputs, so its variable moves once a step."""
    losses: list[Adaptive] = []

    def made() -> dict[str, Any]:
        losses.append(Adaptive())
        return {"optimizer": "sgd", "loss": losses[-1]}

    recipe = twins(between(lambda: layers.Activation("tanh")), made)
    same(recipe.by_batches(None, batches()), recipe.by_batches(gpus, batches()))
    expected, found = (float(loss.mean) for loss in losses)
    assert expected != 1.0
    assert found == pytest.approx(expected, rel=1e-5)


def counting(count: keras.Variable) -> keras.Model:
    def warm(x: Any) -> Any:
        count.assign_add(1.0)
        return x * ops.minimum(count / 4, 1.0)

    keras.utils.set_random_seed(1)
    model = between(lambda: layers.Lambda(warm, output_shape=(4,)))()
    count.assign(0.0)
    return model


def test_a_variable_of_nobody_that_call_assigns_is_an_error_on_several_devices() -> None:
    count = keras.Variable(0.0, trainable=False, name="count")
    parallel = fastdp.wrap(counting(count), gpus=3)
    parallel.compile(**settings())
    with pytest.raises(ValueError, match=r"assigns the variable 'count'.*belongs to no layer.*add_weight"):
        parallel.train_on_batch(**batches()[0])
    assert float(count) == 0.0


@pytest.mark.parametrize("how", ["one", "own step", "install"])
@pytest.mark.filterwarnings("ignore:fastdp. train steps")
def test_such_a_variable_moves_as_often_as_in_plain_keras_on_one_device(how: str) -> None:
    runs = []
    for gpus in (0, 1):
        count = keras.Variable(0.0, trainable=False)
        model = counting(count)
        trained = fastdp.wrap(model, gpus=1) if gpus and how == "one" else model
        if gpus and how != "one":
            fastdp.install(3)
        trained.compile(**settings())
        logs = [trained.train_on_batch(**batch) for batch in batches()]
        fastdp.uninstall()
        runs.append([*np.ravel(logs), float(count), *(w.sum() for w in model.get_weights())])
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5, atol=1e-6)


class Scaled(layers.Layer):
    """Keeps the largest input in a variable that is overwritten with its gradient, as float8 layers do."""

    def build(self, shape: Any) -> None:
        self.largest = self.add_weight(shape=(), initializer="zeros", name="largest")
        self.largest.overwrite_with_gradient = True

    def call(self, x: Any) -> Any:
        @ops.custom_gradient
        def passed_on(x: Any, largest: Any) -> Any:
            value = ops.max(ops.abs(x))
            return x * 1.0, lambda *args, upstream=None: (args[0] if upstream is None else upstream, value)

        return passed_on(x, self.largest.value)


@pytest.mark.filterwarnings("ignore:fastdp. (train steps of )?the model")
def test_a_variable_that_is_overwritten_with_its_gradient_is_refused_or_on_one_device() -> None:
    ways: dict[str, Any] = {"plain": None, "one": {"gpus": 1}, "merge": {"gpus": 3, "rows": "merge"}, "run": None}
    found = []
    for way, options in ways.items():
        keras.utils.set_random_seed(1)
        model = between(Scaled)()
        trained = model if options is None else fastdp.wrap(model, **options)
        if way == "run":
            fastdp.install(3)
        trained.compile(**settings())
        for batch in batches():
            trained.train_on_batch(**batch)
        fastdp.uninstall()
        found.append(model.get_weights())
    for weights in found[1:]:
        for one, other in zip(found[0], weights, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    parallel = fastdp.wrap(between(Scaled)(), gpus=3)
    parallel.compile(**settings())
    with pytest.raises(ValueError, match=r"largest' is overwritten with its gradient"):
        parallel.train_on_batch(**batches()[0])
