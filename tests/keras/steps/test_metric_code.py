"""Metrics of Keras's own leave captured steps alone between two batches; code of the user's does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

import fastdp

metrics = keras.metrics


def own(y: Any, y_pred: Any) -> Any:
    return keras.ops.mean(keras.ops.abs(y - y_pred), -1)


class Doubled(metrics.MeanSquaredError):
    def update_state(self, y: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(y, 2 * y_pred, sample_weight)


def overwritten() -> Any:
    metric = metrics.MeanSquaredError()
    metric.result = lambda: 1.0
    return metric


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    fastdp.set_virtual_devices(1)
    yield
    fastdp.set_virtual_devices(0)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: "mae", True),
        (metrics.RootMeanSquaredError, True),
        (lambda: own, False),
        (Doubled, False),
        (lambda: metrics.MeanMetricWrapper(own), False),
        (overwritten, False),
    ],
)
def test_only_metrics_of_kerass_run_no_code_of_the_users(make: Any, expected: bool) -> None:
    x = np.random.default_rng(0).random((8, 3), "float32")
    parallel = fastdp.wrap(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), gpus=1, compile="trace")
    parallel.compile("sgd", "mse", metrics=[make()])
    parallel.fit(x, x[:, :1], batch_size=4, verbose=0)
    assert parallel._steps.runs_no_other_code() is expected
