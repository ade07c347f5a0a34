"""What scripts do around `fit`: models with metrics of their own, recompiling, copying, deleting, wrong batches."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest

import fastdp

layers = keras.layers
X = np.random.default_rng(0).normal(size=(21, 3)).astype("float32")
Y = X[:, :1] ** 2


@pytest.fixture(scope="module", autouse=True)
def virtual_devices() -> Iterator[None]:
    fastdp.set_virtual_devices(4)
    yield
    fastdp.set_virtual_devices(0)


def small() -> keras.Model:
    inputs = keras.Input((3,), name="first")
    return keras.Model(inputs, layers.Dense(1, name="last")(layers.Dense(4, activation="tanh")(inputs)), name="small")


class Autoencoder(keras.Model):
    """Keeps a metric of its own, as Keras's guides do, and updates it in `compute_loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(3)
        self.twice = keras.metrics.Mean(name="twice")

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        loss = keras.ops.mean(keras.ops.square(x - y_pred))
        self.twice.update_state(2.0 * loss)
        return loss


class WithItsOwnList(Autoencoder):
    """Lists its metrics itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mine = keras.metrics.Mean(name="loss")

    @property
    def metrics(self) -> list[Any]:
        return [self.mine, self.twice]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.mine.update_state(loss)
        return loss


class WithComputeMetrics(Autoencoder):
    """Adds a number to its metrics."""

    def compute_metrics(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().compute_metrics(*args, **kwargs), "one": 1.0}


@pytest.mark.parametrize("kind", [Autoencoder, WithItsOwnList, WithComputeMetrics])
@pytest.mark.parametrize("owner_compiles", [False, True])
def test_metrics_of_the_template_are_reported_and_start_anew_each_epoch(
    kind: type[keras.Model], owner_compiles: bool
) -> None:
    def history(gpus: int | None) -> dict[str, list[float]]:
        keras.utils.set_random_seed(1)
        template = kind()
        template(X[:1])
        model = template if gpus is None else fastdp.wrap(template, gpus=gpus)
        model.compile(keras.optimizers.SGD(0.1))
        if owner_compiles and gpus is not None:
            template.compile("adam")
        return model.fit(X, epochs=3, batch_size=8, shuffle=False, verbose=0, validation_data=(X,)).history

    one, many = history(None), history(3)
    assert list(many) == list(one)
    assert {"twice", "loss", "val_twice"} <= set(many)
    for key, expected in one.items():
        np.testing.assert_allclose(many[key], expected, rtol=1e-5)


def test_a_template_that_its_owner_compiles_later_keeps_those_settings() -> None:
    model = small()
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile("sgd", "mse")
    assert model.optimizer is parallel.optimizer
    model.compile("adam", "mae")
    its_own = model.optimizer
    parallel.compile("rmsprop", "mse")
    assert model.optimizer is its_own
    assert model.loss == "mae"


def test_a_template_without_settings_follows_each_compile_of_any_parallel_model() -> None:
    model = small()
    for gpus in (2, 3):
        parallel = fastdp.wrap(model, gpus=gpus)
        for optimizer in ("sgd", "adam"):
            parallel.compile(optimizer, "mse")
            assert model.optimizer is parallel.optimizer


def test_a_deleted_parallel_model_leaves_no_replica_in_memory() -> None:
    model = small()
    parallel = fastdp.wrap(model, gpus=4)
    parallel.compile("sgd", "mse")
    parallel.fit(X, Y, verbose=0)
    left = [weakref.ref(parallel), weakref.ref(parallel.engine)]
    del parallel
    gc.collect()
    assert [one() for one in left] == [None, None]
    model.fit(X, Y, verbose=0)  # goes on with the shared settings


def test_a_template_with_its_own_predict_step_is_refused_by_predict() -> None:
    class Sevens(keras.Sequential):
        def predict_step(self, data: Any) -> Any:
            return 0.0 * super().predict_step(data) + 7.0

    parallel = fastdp.wrap(Sevens([keras.Input((3,)), layers.Dense(1)]), gpus=2)
    for predict in (parallel.predict, parallel.predict_on_batch):
        with pytest.raises(ValueError, match=r"overrides predict_step.*template\.predict"):
            predict(X)


def test_the_shapes_of_inputs_and_outputs_are_the_templates() -> None:
    model = small()
    parallel = fastdp.wrap(model, gpus=2)
    assert parallel.input_shape == model.input_shape == (None, 3)
    assert parallel.output_shape == model.output_shape == (None, 1)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), keras.models.clone_model],
    ids=["copy", "deepcopy", "pickle", "clone_model"],
)
def test_copying_a_parallel_model_says_to_copy_its_template(duplicate: Callable[[Any], Any]) -> None:
    parallel = fastdp.wrap(small(), gpus=2)
    with pytest.raises(ValueError, match=r"parallel\.template"):
        duplicate(parallel)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copied_template_has_the_trained_weights_and_memory_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    model = small()
    parallel = fastdp.wrap(model, gpus=3)
    parallel.compile("sgd", "mse")
    parallel.fit(X, Y, verbose=0)
    twin = duplicate(model)
    before = twin.get_weights()
    for expected, found in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    parallel.fit(X, Y, verbose=0)
    for expected, found in zip(before, twin.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_parallel_model_inside_another_model_says_that_this_one_trains_on_one_device() -> None:
    parallel = fastdp.wrap(small(), gpus=2)
    with pytest.warns(UserWarning, match=r"one device.*parallel\.template"):
        outer = keras.Model(parallel.inputs, parallel(parallel.inputs[0]))
    np.testing.assert_allclose(outer.predict(X, verbose=0), parallel.predict(X, verbose=0), rtol=1e-6)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((X[:8], Y[:1]), r"same number of rows.*'x': 8, 'y': 1"),
        ((X[:1], Y[:8]), r"same number of rows.*'x': 1, 'y': 8"),
        ((X[:4], Y[:4], np.ones(3)), r"same number of rows.*'sample_weight': 3"),
        ((np.float32(3), Y), r"rows along its first axis.*'x'"),
        ((X[:0], Y[:0]), "at least one row"),
        ((None,), "at least one array"),
    ],
)
def test_a_batch_with_wrong_rows_says_which_array(batch: Any, said: str) -> None:
    parallel = fastdp.wrap(small(), gpus=2)
    parallel.compile("sgd", "mse")
    parallel.train_on_batch(X, Y)
    for step in (parallel.train_on_batch, parallel.test_on_batch):
        with pytest.raises(ValueError, match=said):
            step(*batch)
    parallel.train_on_batch(X, Y)
