"""Metrics see the merged outputs, once: they equal one device's, and are never averaged over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

CLASSES = 3


class Extremes(keras.metrics.Metric):
    """The largest minus the smallest prediction: no mean of replicas' values gives it."""

    def __init__(self, name: str = "extremes") -> None:
        super().__init__(name=name)
        self.high = self.add_weight(shape=(), initializer="zeros", name="high")
        self.low = self.add_weight(shape=(), initializer="zeros", name="low")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.high.assign(keras.ops.maximum(self.high, keras.ops.max(y_pred)))
        self.low.assign(keras.ops.minimum(self.low, keras.ops.min(y_pred)))

    def result(self) -> Any:
        return self.high - self.low


BINARY: dict[str, Callable[[], keras.metrics.Metric]] = {
    "AUC": lambda: keras.metrics.AUC(num_thresholds=50),
    "PR": lambda: keras.metrics.AUC(curve="PR", num_thresholds=50),
    "Precision": keras.metrics.Precision,
    "Recall": keras.metrics.Recall,
    "SensitivityAtSpecificity": lambda: keras.metrics.SensitivityAtSpecificity(0.5),
    "R2Score": keras.metrics.R2Score,
    "MeanIoU": lambda: keras.metrics.MeanIoU(2, sparse_y_pred=True),
    "BinaryAccuracy": keras.metrics.BinaryAccuracy,
    "RootMeanSquaredError": keras.metrics.RootMeanSquaredError,
    "Extremes": Extremes,
}
CATEGORICAL: dict[str, Callable[[], keras.metrics.Metric]] = {
    "F1Score": lambda: keras.metrics.F1Score(average="macro"),
    "FBeta": lambda: keras.metrics.FBetaScore(beta=2.0),
    "TopK": lambda: keras.metrics.TopKCategoricalAccuracy(2),
    "OneHotMeanIoU": lambda: keras.metrics.OneHotMeanIoU(CLASSES),
    "CategoricalAccuracy": keras.metrics.CategoricalAccuracy,
    "ConcordanceCorrelation": keras.metrics.ConcordanceCorrelation,
    "PearsonCorrelation": keras.metrics.PearsonCorrelation,
}
UNWEIGHTED = {"Extremes", "MeanIoU", "OneHotMeanIoU"}  # the last two take whole weights only


def build(units: int) -> Callable[[], keras.Model]:
    activation = "sigmoid" if units == 1 else "softmax"
    return lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, activation=activation)])


def batches(units: int, sizes: list[int], weights: bool = True) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    made = []
    for n in sizes:
        x = rng.normal(size=(n, 4)).astype("float32")
        y = (x[:, :1] > 0) if units == 1 else np.eye(units)[np.argmax(x[:, :units], 1)]
        batch = {"x": x, "y": y.astype("float32")}
        if weights:
            batch["sample_weight"] = rng.choice([0.0, 1.0, 3.0], n).astype("float32")
        made.append(batch)
    return made


@pytest.mark.parametrize("gpus", [3, 8])
@pytest.mark.parametrize("name", [*BINARY, *CATEGORICAL])
def test_metric_equals_one_device(name: str, gpus: int, equals_one_device: Any) -> None:
    units = 1 if name in BINARY else CLASSES
    metric = {**BINARY, **CATEGORICAL}[name]

    def made() -> dict[str, Any]:
        loss = "binary_crossentropy" if units == 1 else "categorical_crossentropy"
        weighted = [] if name in UNWEIGHTED else [metric()]
        return {"optimizer": "sgd", "loss": loss, "metrics": [metric()], "weighted_metrics": weighted}

    data = batches(units, [11, 8, 3])
    equals_one_device(build(units), made, data, gpus=gpus)
    equals_one_device(build(units), made, data=data[0], gpus=gpus, epochs=2, batch_size=4)


def test_metric_names_and_functions_equal_one_device(equals_one_device: Any) -> None:
    def distance(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.max(keras.ops.abs(keras.ops.subtract(y_true, y_pred)), axis=-1)

    made = lambda: {"optimizer": "sgd", "loss": "mse", "metrics": ["accuracy", "mse", distance]}  # noqa: E731
    run = equals_one_device(build(CLASSES), made, batches(CLASSES, [11, 2]), gpus=3)
    assert set(run.logs[0]) == {"loss", "accuracy", "mse", "distance"}


def test_validation_data_and_validation_split_equal_one_device(equals_one_device: Any) -> None:
    made = lambda: {"optimizer": "sgd", "loss": "mse", "metrics": [keras.metrics.AUC(num_thresholds=20)]}  # noqa: E731
    data = batches(1, [23], weights=False)[0]
    other = tuple(batches(1, [9], weights=False)[0].values())
    equals_one_device(build(1), made, data=data, gpus=3, epochs=2, batch_size=5, validation_split=0.3)
    equals_one_device(build(1), made, data=data, gpus=3, epochs=2, batch_size=5, validation_data=other)


def test_metrics_of_a_layer_equal_one_device(equals_one_device: Any) -> None:
    class Watched(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1)
            self.size = keras.metrics.Mean(name="size")

        def build(self, shape: Any) -> None:
            self.dense.build(shape)

        def call(self, x: Any) -> Any:
            y = self.dense(x)
            self.size.update_state(keras.ops.abs(y))
            return y

    model = lambda: keras.Sequential([keras.Input((4,)), Watched()])  # noqa: E731
    made = lambda: {"optimizer": "sgd", "loss": "mse"}  # noqa: E731
    data = batches(1, [11, 8, 3])
    run = equals_one_device(model, made, data, gpus=3)
    assert "size" in run.logs[0]
    equals_one_device(model, made, data=data[0], gpus=3, epochs=2, batch_size=4)


def test_metrics_that_a_layer_updates_by_numbers_of_the_batch_equal_one_device(equals_one_device: Any) -> None:
    class Watched(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.by_batch = keras.metrics.Mean(name="by_batch")
            self.by_row = keras.metrics.Mean(name="by_row")
            self.often_zero = keras.metrics.Mean(name="often_zero")
            self.in_all = keras.metrics.Sum(name="in_all")

        def call(self, x: Any) -> Any:
            self.by_batch.update_state(keras.ops.mean(keras.ops.square(x)))
            self.by_row.update_state(keras.ops.sum(x, axis=-1))
            self.often_zero.update_state(keras.ops.mean(keras.ops.relu(x - 1.0)))
            self.in_all.update_state(x)
            return x

    model = lambda: keras.Sequential([keras.Input((4,)), Watched(), keras.layers.Dense(1)])  # noqa: E731
    made = lambda: {"optimizer": "sgd", "loss": "mse"}  # noqa: E731
    data = batches(1, [11, 8, 3])
    data[0]["x"][:2] = np.minimum(data[0]["x"][:2], 0.5)  # on the rows that are tried nothing is above 1
    run = equals_one_device(model, made, data, gpus=3)
    assert set(run.logs[0]) == {"loss", "by_batch", "by_row", "often_zero", "in_all"}
    assert run.logs[0]["often_zero"] > 0
    equals_one_device(model, made, data=data[0], gpus=8, epochs=2, batch_size=5)


@pytest.mark.parametrize("gpus", [1, 3])
def test_an_overridden_compute_loss_equals_one_device(gpus: int, equals_one_device: Any) -> None:
    class Own(keras.Model):
        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
        ) -> Any:
            spread = keras.ops.std(y_pred)  # of the whole batch
            return super().compute_loss(x, y, y_pred, sample_weight, training) + 0.1 * spread

    def model() -> keras.Model:
        x = keras.Input((4,))
        return Own(x, keras.layers.Dense(1, kernel_regularizer="l2", activity_regularizer="l2")(x))

    made = lambda: {"optimizer": "sgd", "loss": "mse", "metrics": ["mae"]}  # noqa: E731
    data = batches(1, [11, 8, 2])
    equals_one_device(model, made, data, gpus=gpus)
    equals_one_device(model, made, data=data[0], gpus=gpus, epochs=2, batch_size=4)


def test_an_overridden_compute_metrics_equals_one_device(equals_one_device: Any) -> None:
    class Own(keras.Model):
        def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            logs = super().compute_metrics(x, y, y_pred, sample_weight)
            return {**logs, "largest": float(keras.ops.max(keras.ops.abs(y_pred)).detach())}

    def model() -> keras.Model:
        x = keras.Input((4,))
        return Own(x, keras.layers.Dense(1)(x))

    made = lambda: {"optimizer": "sgd", "loss": "mse", "metrics": ["mae"]}  # noqa: E731
    run = equals_one_device(model, made, batches(1, [11, 8, 2]), gpus=3)
    assert "largest" in run.logs[0]


@pytest.mark.parametrize("gpus", [1, 3])
def test_a_metric_that_an_overridden_compute_loss_updates_equals_one_device(gpus: int, equals_one_device: Any) -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.custom = keras.metrics.Mean(name="custom")
            self.dense = keras.layers.Dense(1, activity_regularizer="l2")

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
        ) -> Any:
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            self.custom.update_state(sum(self.losses))
            return loss

    def model() -> keras.Model:
        made = Own()
        made(np.zeros((2, 4), "float32"))
        return made

    equals_one_device(model, lambda: {"optimizer": "sgd", "loss": "mse"}, batches(1, [11, 8, 2]), gpus=gpus)
