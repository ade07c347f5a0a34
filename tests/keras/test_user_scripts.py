"""What scripts do around `fit`: any data, callbacks, metrics of their own, copying, deleting, wrong batches."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

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


def test_a_template_with_its_own_predict_step_predicts_by_it() -> None:
    class Sevens(keras.Sequential):
        def predict_step(self, data: Any) -> Any:
            return 0.0 * super().predict_step(data) + 7.0

    parallel = fastdp.wrap(Sevens([keras.Input((3,)), layers.Dense(1)]), gpus=2)
    for outputs in (parallel.predict(X, verbose=0), parallel.predict_on_batch(X)):
        np.testing.assert_array_equal(outputs, np.full((len(X), 1), 7.0))


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


class Batches(keras.utils.PyDataset):
    """Batches of 8 rows."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        rows = slice(8 * index, 8 * index + 8)
        return X[rows], Y[rows], np.linspace(0.5, 1.5, 21)[rows]


def generated() -> Iterator[Any]:
    """Batches of 8 rows, without end."""
    while True:
        yield from (Batches()[i] for i in range(3))


def loader() -> Any:
    """A torch loader of batches of 8 rows."""
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=8)


def twins(make: Callable[[], keras.Model], **settings: Callable[[], Any]) -> Iterator[keras.Model]:
    """The same compiled model, plain and then parallel."""
    for gpus in (None, 3):
        keras.utils.set_random_seed(1)
        template = make()
        model = template if gpus is None else fastdp.wrap(template, gpus=gpus)
        model.compile(**{name: value() for name, value in settings.items()})
        yield model


def assert_same_training(one: keras.Model, many: keras.Model) -> None:
    for expected, found in zip(one.get_weights(), many.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert list(many.history.history) == list(one.history.history)
    for key, expected in one.history.history.items():
        np.testing.assert_allclose(many.history.history[key], expected, rtol=1e-5, atol=1e-6)


def sgd() -> Any:
    return keras.optimizers.SGD(0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (lambda: (generated(),), {"steps_per_epoch": 3}),
        (lambda: (Batches(),), {}),
        (lambda: (Batches(workers=2),), {}),
        (lambda: (loader(),), {}),
        (lambda: (torch.tensor(X), torch.tensor(Y)), {"batch_size": 8}),
        (lambda: (X.astype("float64"), Y.astype("float64")), {"batch_size": 8}),
        (lambda: (X[::-1], np.asfortranarray(Y)), {"batch_size": 8, "validation_split": 0.3}),
    ],
    ids=["generator", "PyDataset", "PyDataset with workers", "DataLoader", "torch", "float64", "strided"],
)
def test_fit_of_any_source_of_batches_equals_one_device(data: Callable[[], Any], options: dict[str, Any]) -> None:
    trained = []
    for model in twins(small, optimizer=sgd, loss=lambda: "mse", metrics=lambda: ["mae"]):
        model.fit(*data(), epochs=2, shuffle=False, verbose=0, **options)
        trained.append(model)
    assert_same_training(*trained)


@pytest.mark.parametrize("every", [{"swap_on_epoch": True}, {}], ids=["by epoch", "by evaluation"])
def test_swapping_in_averaged_weights_equals_one_device(every: dict[str, bool]) -> None:
    trained = []

    def averaging() -> Any:
        return keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.8)

    for model in twins(small, optimizer=averaging, loss=lambda: "mse"):
        swap = keras.callbacks.SwapEMAWeights(**every)
        model.fit(X, Y, epochs=3, batch_size=8, verbose=0, validation_data=(X, Y), callbacks=[swap])
        trained.append(model)
    assert_same_training(*trained)


def test_a_csv_log_has_the_columns_and_rows_of_one_device(tmp_path: Path) -> None:
    logs = []
    for i, model in enumerate(twins(small, optimizer=sgd, loss=lambda: "mse", metrics=lambda: ["mae"])):
        log = keras.callbacks.CSVLogger(tmp_path / f"{i}.csv")
        model.fit(X, Y, epochs=3, batch_size=8, verbose=0, validation_data=(X, Y), callbacks=[log])
        logs.append((tmp_path / f"{i}.csv").read_text().splitlines())
    one, many = logs
    assert many[0] == one[0]
    values = [np.array([line.split(",") for line in log[1:]], float) for log in (one, many)]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-5)


def test_a_loss_that_is_no_number_ends_training_where_one_device_ends() -> None:
    broken = X.copy()
    broken[9] = np.nan
    ended = []
    for model in twins(small, optimizer=sgd, loss=lambda: "mse"):
        seen: list[int] = []
        batches = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs, seen=seen: seen.append(batch))
        callbacks = [keras.callbacks.TerminateOnNaN(), batches]
        model.fit(broken, Y, epochs=3, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
        ended.append((model.stop_training, seen))
    assert ended[0] == ended[1] == (True, [0, 1])


def test_bytes_of_images_are_scaled_on_the_way_in_as_on_one_device() -> None:
    images = np.random.default_rng(1).integers(0, 256, (21, 8, 8, 3), dtype=np.uint8)

    def build() -> keras.Model:
        stack = [layers.Rescaling(1 / 255), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(1)]
        return keras.Sequential([keras.Input((8, 8, 3), dtype="uint8"), *stack])

    trained = []
    for model in twins(build, optimizer=lambda: keras.optimizers.SGD(0.01), loss=lambda: "mse"):
        model.fit(images, Y, epochs=2, batch_size=8, shuffle=False, verbose=0)
        trained.append(model)
    assert_same_training(*trained)
